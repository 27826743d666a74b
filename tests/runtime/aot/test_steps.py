"""A served decoder's captured steps: the same tokens as eager ones, whatever is captured when."""

import logging
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmtool.models.decoder import NativeDecoder
from llmtool.models.loader import load
from llmtool.runtime.aot import steps
from llmtool.runtime.aot.buckets import Ladder
from llmtool.runtime.aot.steps import StepGraphs
from llmtool.runtime.executor import TorchExecutor
from llmtool.runtime.kv_store import KVStore
from tests.runtime.tiny import EOS, MAX_LEN, Script, TinyModel, random_prompts


class FakeCapture:
    """Runs the step again where a graph would, with its result at the same address."""

    def __init__(self, fails: BaseException | None = None, after: int = 0) -> None:
        self.fails, self.after = fails, after
        self.captures = self.replays = 0

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        if self.fails is not None and self.captures >= self.after:
            raise self.fails
        self.captures += 1
        result = step().clone()

        def replay() -> None:
            self.replays += 1
            assert step.__closure__ is not None
            for cell in step.__closure__:  # torch's plans are made of lengths, and not refilled as ours are
                for batch in getattr(cell.cell_contents, "batches", ()):
                    batch._plans.clear()
            result.copy_(step())

        return result, replay


def executor(tiny: TinyModel, capture: FakeCapture, monkeypatch: pytest.MonkeyPatch) -> TorchExecutor:
    """Of the tiny model on torch's operators, as a GPU has it with kernels."""
    monkeypatch.setenv("LLMTOOL_CPU_KERNELS", "off")
    model = load(tiny.directory, torch.float32)
    assert isinstance(model, NativeDecoder)
    return TorchExecutor(model, KVStore(tiny.group(4), 120), 8, MAX_LEN, [EOS], capture=capture)


def graphs(executor: TorchExecutor) -> StepGraphs:
    assert executor._graphs is not None
    return executor._graphs


def test_decoding_in_buckets_gives_eager_tokens(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = FakeCapture()
    script = Script(executor(tiny, capture, monkeypatch))
    prompts = random_prompts(5, 1, high=20)
    wanted = [14, 9, 14, 6, 12]
    for i, prompt in enumerate(prompts):
        script.add(str(i), prompt)
    while any(len(script.live[str(i)].output) < n for i, n in enumerate(wanted)):
        script.step(
            {s: len(v.tokens) - v.computed for s, v in script.live.items() if len(v.output) < wanted[int(s)]}
        )
    for i, prompt in enumerate(prompts):
        assert script.live[str(i)].output == tiny.greedy(prompt, wanted[i])
    assert capture.replays >= 5
    assert set(graphs(script.executor).shapes) <= {(1,), (1,) * 2, (1,) * 4, (1,) * 8}


def test_random_steps_mixed_ones_too(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = FakeCapture()
    script = Script(executor(tiny, capture, monkeypatch), seed=3)
    prompts = random_prompts(3, 3, low=12, high=30)
    rng = random.Random(4)
    for i, prompt in enumerate(prompts):
        script.add(str(i), prompt)
    while any(len(v.output) < 20 for v in script.live.values()):
        width = rng.choice((1, 1, 2, 3))  # chunks of a prompt: as many for all, or as they come
        work = {
            s: min(width, len(v.tokens) - v.computed) for s, v in script.live.items() if len(v.output) < 20
        }
        script.step(work)
    for i, prompt in enumerate(prompts):
        assert script.live[str(i)].output == tiny.greedy(prompt, 20)
    shapes = graphs(script.executor).shapes
    assert capture.captures == len(shapes) > 1
    assert capture.replays > 10


def test_hot_shapes_are_captured_and_others_are_not(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = FakeCapture()
    script = Script(executor(tiny, capture, monkeypatch))
    script.add("a", list(range(2, 32)))
    script.step({"a": 7})
    script.step({"a": 11})
    script.step({"a": 12})
    assert not graphs(script.executor).shapes  # each came once
    for _ in range(5):
        script.step({"a": 1})
    assert graphs(script.executor).shapes == [(1,)]
    assert (capture.captures, capture.replays) == (1, 2)


def test_buckets_follow_the_sizes_that_come(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences decode: at first in a bucket of eight, then in one of their own, with the same tokens."""
    monkeypatch.setattr(Ladder, "FIRST", 12)
    capture = FakeCapture()
    script = Script(executor(tiny, capture, monkeypatch))
    prompts = random_prompts(5, 1, high=20)
    for i, prompt in enumerate(prompts):
        script.add(str(i), prompt)
        script.step({str(i): len(prompt)})
    for _ in range(24):
        script.step(dict.fromkeys(script.live, 1))
    assert graphs(script.executor).shapes == [(1,) * 8, (1,) * 5]
    for i, prompt in enumerate(prompts):
        assert script.live[str(i)].output == tiny.greedy(prompt, 25)


def test_large_steps_are_not_captured(tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "MAX_TOKENS", 6)
    capture = FakeCapture()
    script = Script(executor(tiny, capture, monkeypatch))
    script.add("a", [5] * 100)
    for _ in range(10):
        script.step({"a": 7})
    assert capture.captures == 0
    for _ in range(4):
        script.step({"a": 5})
    assert graphs(script.executor).shapes == [(5,)]


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (torch.OutOfMemoryError("no bytes left"), 0),
        (torch.OutOfMemoryError("no bytes left"), 1),
        (RuntimeError("operation not permitted when stream is capturing"), 0),
    ],
)
def test_a_capture_that_fails_leaves_eager_steps(
    tiny: TinyModel,
    error: BaseException,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    capture = FakeCapture(error, after)
    script = Script(executor(tiny, capture, monkeypatch))
    prompts = random_prompts(3, 7, high=12)
    for i, prompt in enumerate(prompts):
        script.add(str(i), prompt)
    with caplog.at_level(logging.WARNING, "llmtool.aot"):
        script.run(["0"], 12)
        script.run(["0", "1", "2"], 20)
    for i, prompt in enumerate(prompts):
        assert script.live[str(i)].output == tiny.greedy(prompt, 20)
    assert sum("run eagerly" in record.message for record in caplog.records) == 1
    assert len(graphs(script.executor).shapes) == after
    assert (capture.replays > 0) == bool(after)
