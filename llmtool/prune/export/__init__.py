"""Writing pruned models so that others load them: transformers, ONNX Runtime, llama.cpp."""
