"""Where the choice between torch and our kernels is made."""

from __future__ import annotations

import functools
import logging

from torch import Tensor

log = logging.getLogger(__name__)


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels (`llmtool_kernels.gpu`) take x. They are imported only where this says so."""
    return x.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    """False, with a warning, where torch has to serve on a GPU too."""
    try:
        import triton  # noqa: F401
    except (ImportError, OSError) as error:
        log.warning("Triton's kernels are not available: %s. PyTorch's own operators serve, slower.", error)
        return False
    return True
