"""A pruned model as an ONNX file that ONNX Runtime runs: one forward pass, any batch and length."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.errors import ModelError, UsageError
from llmtool.prune.latency import example
from llmtool.prune.model import Loaded

TOLERANCE = 1e-4


def require() -> None:
    """Raises UsageError where the packages that export and check are not installed."""
    missing = [
        name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(
            f"--export onnx needs {', '.join(missing)}, not installed.",
            "Install them: pip install 'llmtool[onnx]'",
        )


class _Answers(nn.Module):
    """Positional inputs and plain outputs, as a graph has them."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.options = model, names, options

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return tuple(value for value in outputs.values() if isinstance(value, Tensor))


@torch.no_grad()
def write(loaded: Loaded, small: Any, path: Path) -> float:
    """Write `small` in fp32 to `path`; the largest difference between its answers there and in torch, relative.

    Raises UsageError without the packages, ModelError where it cannot be exported or answers otherwise.
    """
    require()
    inputs = example(loaded, 2, 9, torch.device("cpu")).inputs
    names = tuple(inputs)
    options = {"use_cache": False} if loaded.causal else {}
    module = _Answers(small.float().cpu(), names, options).eval()
    axes = {0: torch.export.Dim("batch", min=1, max=4096)}
    if not loaded.is_image:
        axes[1] = torch.export.Dim("tokens", min=2, max=int(loaded.model.config.max_position_embeddings) - 2)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                str(path),
                input_names=list(names),
                dynamic_shapes=(tuple(axes for _ in names),),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no common class
        raise ModelError(f"The model cannot be exported to ONNX: {str(error).splitlines()[0]}") from error
    return _check(module, loaded, path)


def _check(module: nn.Module, loaded: Loaded, path: Path) -> float:
    """Against torch at a batch and a length that it was not exported with."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = example(loaded, 3, 14, torch.device("cpu")).inputs
    expected = module(*inputs.values())
    wanted = {i.name for i in session.get_inputs()}
    got = session.run(None, {name: t.numpy() for name, t in inputs.items() if name in wanted})
    error = max(
        float((torch.from_numpy(a) - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for a, b in zip(got, expected, strict=True)
    )
    if not error < TOLERANCE:
        raise ModelError(f"In ONNX Runtime the model's answers differ by {error:.1e} from torch's.")
    return error
