"""The sampling kernel against a sorting reference, the runtime's random numbers and the runtime's sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llmtool_kernels import dispatch
from llmtool_kernels.gpu import sample as kernels
from llmtool_kernels.gpu.sample import sample, sample_reference

from llmtool.core.request import SamplingParams
from llmtool.runtime import sampler
from llmtool.runtime.random import uniforms

OFF = (0, 1.0, float("-inf"))


def filters_of(rows: list[tuple[int, float, float]], device: torch.device) -> tuple[torch.Tensor, ...]:
    types = (torch.int64, torch.float64, torch.float32)
    return tuple(
        torch.tensor(column, dtype=t, device=device)
        for column, t in zip(zip(*rows, strict=True), types, strict=True)
    )


def random_numbers(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(uniforms(seeds.cpu().numpy().astype(np.uint64), positions.cpu().numpy()))


@pytest.mark.parametrize("filtered", [False, True])
def test_tokens_are_the_references(
    device: torch.device, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several blocks; every filter alone and together; seeds that use all 64 bits."""
    monkeypatch.setattr(kernels, "BLOCK", 64)
    monkeypatch.setattr(kernels, "BOUND_BLOCK", 32)
    rows = [OFF, (5, 1.0, OFF[2]), (0, 0.7, OFF[2]), (0, 1.0, -1.5), (20, 0.5, -4.0), (1, 1.0, OFF[2])]
    if filtered:
        chosen = filters_of(rows, device)
    else:
        rows, chosen = [OFF] * 6, None
    logits = 2 * torch.randn(6, 150, device=device)
    seeds = torch.tensor([0, 1, 2**62 + 7, -1, -(2**63), 12345], device=device)
    temperatures = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.3, 1.0], device=device)
    for position in (0, 3):
        positions = torch.full((6,), position, device=device)
        ours = sample(logits, seeds, positions, temperatures, chosen)
        u = random_numbers(seeds, positions)
        on_cpu = None if chosen is None else tuple(f.cpu() for f in chosen)
        assert ours.tolist() == sample_reference(logits.cpu(), u, temperatures.cpu(), on_cpu).tolist()


def test_tokens_are_the_samplers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row what the torch sampler draws: filters, temperatures, ties and tokens that are forbidden."""
    params = [
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(temperature=1.0, top_k=7, seed=-5),
        SamplingParams(temperature=1.5, top_p=0.6, min_p=0.01, seed=9),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.3, top_k=40, top_p=0.9, seed=11),
    ]
    index, positions = np.arange(5), np.array([5, 6, 7, 8, 9])
    logits = (3 * torch.randn(5, 90)).round() / 2  # many equal ones
    logits[:, ::7] = float("-inf")
    tokens = []
    for kernels_run, where in ((False, torch.device("cpu")), (True, device)):
        monkeypatch.setattr(dispatch, "on_gpu", lambda _, answer=kernels_run: answer)
        rows = sampler.SamplingRows(5, 90, [], where)
        for i, p in enumerate(params):
            rows.add(i, p, p.seed or 0, [1], [])
        drawn, _ = sampler.sample(logits.to(where), rows, index, positions, np.zeros(5, np.int64))
        tokens.append(drawn.tolist())
    assert tokens[0] == tokens[1]
