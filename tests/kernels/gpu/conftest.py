"""Where kernels run: a CUDA device, or Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def device() -> torch.device:
    """Skips where neither is at hand; `test_interpreter` runs such tests in a process of their own."""
    torch.manual_seed(0)
    if INTERPRETED:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; test_interpreter.py runs this test without one")
    return torch.device("cuda")
