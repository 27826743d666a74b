"""Where the choice between torch and our kernels is made."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)
CAPABILITY = (8, 0)  # the lowest that Triton supports


def on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels (`llmtool_kernels.gpu`) take x. They are imported only where this says so."""
    return x.is_cuda and _runs_triton(x.device)


@functools.cache
def _runs_triton(device: torch.device) -> bool:
    """False, with a warning, where torch has to serve on a GPU too."""
    try:
        import triton  # noqa: F401

        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            needs, has = (".".join(map(str, version)) for version in (CAPABILITY, capability))
            raise ImportError(f"they need compute capability {needs}, and {device} has {has}")
    except (ImportError, OSError) as error:
        log.warning("Triton's kernels are not available: %s. PyTorch's own operators serve, slower.", error)
        return False
    return True
