"""A chain of Triton kernels that can be launched before their predecessor ends (programmatic dependent launch)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

N = 1024


@triton.jit
def add_one(x, DEPENDENT: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    if DEPENDENT:
        gdc_wait()  # the predecessor's writes are there
    tl.store(x + at, tl.load(x + at) + 1)
    if DEPENDENT:
        gdc_launch_dependents()


def chain(launches: int, dependent: bool, device: torch.device) -> Callable[[], None]:
    """What replays so many launches, captured."""
    x = torch.zeros(N, device=device)

    def step() -> None:
        for _ in range(launches):
            add_one[(1,)](x, dependent, N, num_warps=4, launch_pdl=dependent)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
