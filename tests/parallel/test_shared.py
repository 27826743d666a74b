"""Sums in shared memory, by real processes: right, the same bits on all, in any order of haste; and a rank that
does not come."""

from __future__ import annotations

import mmap
import multiprocessing
import random
import time
from typing import Any

import pytest
import torch

from llmtool.runtime.parallel import shared
from llmtool.runtime.parallel.shared import SharedPeers, most_bytes, size_of

SIZES = [1, 7, 64, 5000, 40000]


class Refuses:
    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x.fill_(-1)


def given(rank: int, turn: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    dtype = (torch.float32, torch.bfloat16)[turn % 2]
    return torch.randn(SIZES[turn % len(SIZES)], generator=generator).to(dtype)


def work(rank: int, size: int, path: str, answers: Any) -> None:
    torch.set_num_threads(1)
    memory = shared._map(path, size_of(size))
    assert memory is not None
    peers = SharedPeers(Refuses(), memory, rank, size, 30.0)  # type: ignore[arg-type]
    rng, out = random.Random(rank), []
    for turn in range(60):
        if rng.random() < 0.2:
            time.sleep(rng.random() * 0.01)
        out.append(peers.sum(given(rank, turn)))
    answers.put((rank, [x.float().numpy() for x in out]))


@pytest.mark.parametrize("size", [2, 3])
def test_sums_are_right_and_the_same_on_all(size: int) -> None:
    path = shared._make(size_of(size))
    assert path
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [context.Process(target=work, args=(rank, size, path, answers)) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        said = dict(answers.get(timeout=60) for _ in processes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()
        shared.Path(path).unlink()
    for turn in range(60):
        expected = given(0, turn)
        for rank in range(1, size):
            expected = expected + given(rank, turn)
        for rank in range(size):
            assert torch.equal(torch.from_numpy(said[rank][turn]), expected.float())


def test_large_sums_go_another_way_and_a_late_rank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = mmap.mmap(-1, size_of(2))
    peers = SharedPeers(Refuses(), memory, 0, 2, 0.2)  # type: ignore[arg-type]
    assert peers.sum(torch.zeros(most_bytes(2) // 4 + 1)).eq(-1).all()
    with pytest.raises(RuntimeError, match=r"timed out after 0\.2 s: no sum from part \[1\]"):
        peers.sum(torch.zeros(3))

    def gone() -> None:
        raise ConnectionError("rank 1 is gone")

    peers.health = gone
    with pytest.raises(ConnectionError, match="gone"):
        peers.sum(torch.zeros(3))
