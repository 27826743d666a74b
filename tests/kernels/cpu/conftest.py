"""The builds of the C++ kernels. Where there is no compiler these tests have nothing to test, and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llmtool_kernels.cpu.native import Native, load


@pytest.fixture(params=["native", "portable", "emulated"], scope="session")
def native(request: pytest.FixtureRequest) -> Native:
    kernels = load(request.param)
    if kernels is None:
        pytest.skip("no C++ compiler is here, or it cannot build the kernels")
    return kernels


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads torch, and with it the kernels, may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
