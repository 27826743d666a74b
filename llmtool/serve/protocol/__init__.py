"""The HTTP bodies: OpenAI's, with vLLM's names for what OpenAI lacks. pydantic lives here and nowhere deeper."""
