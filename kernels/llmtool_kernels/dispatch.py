"""Where the choice between torch and our kernels is made."""

from __future__ import annotations

from torch import Tensor


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels (`llmtool_kernels.gpu`) take x. They are imported only where this says so."""
    return x.is_cuda
