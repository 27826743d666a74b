"""The policy of encoders: order, budget, limits, aborts; the same decisions every time."""

from __future__ import annotations

import random

import pytest

from llmtool.config import SchedulerConfig
from llmtool.core.pooling import PoolingBatch, PoolingEngine, PoolingResult, PoolingScheduler
from llmtool.core.ports import VirtualClock
from llmtool.core.request import FinishReason, SequenceOutput
from llmtool.errors import QueueFull, RequestError, RequestTooLong


class Summing:
    """The vector of a sequence is its tokens' sum, spelled in bytes; token 99 fails."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int]]] = []

    def run(self, batch: PoolingBatch) -> PoolingResult:
        self.batches.append([(r.group, r.index) for r in batch.requests])
        vectors = [str(sum(r.token_ids)).encode() for r in batch.requests]
        errors = {i: "It is 99." for i, r in enumerate(batch.requests) if 99 in r.token_ids}
        return PoolingResult(vectors, errors, seconds=0.5)


def make(**limits: object) -> PoolingEngine:
    settings = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 12,
        "max_model_len": 8,
        "max_waiting": 6,
    } | limits
    return PoolingEngine(PoolingScheduler(SchedulerConfig(**settings)), Summing(), VirtualClock())  # type: ignore[arg-type]


def drain(engine: PoolingEngine) -> list[SequenceOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.scheduler.check()
    return outputs


def test_a_step_is_filled_in_order_of_arrival_and_sorted_by_length() -> None:
    engine = make()
    engine.pool("a", [[1] * 5, [2] * 2, [3] * 4, [4] * 3])
    assert [(o.index, o.vector) for o in engine.step()] == [(1, b"4"), (2, b"12"), (0, b"5")]
    assert engine.last_step is not None and engine.last_step.num_tokens == 11
    assert [(o.index, o.vector) for o in engine.step()] == [(3, b"12")]
    assert not engine.has_work and engine.step() == []


def test_a_step_holds_no_more_sequences_than_allowed() -> None:
    engine = make()
    engine.pool("a", [[1]] * 9)
    drain(engine)
    assert [len(batch) for batch in engine.executor.batches] == [4, 4, 1]  # type: ignore[attr-defined]


def test_outputs_say_all_there_is() -> None:
    engine = make()
    engine.clock.elapse(2.0)
    engine.pool("a", [[1, 2]], segments=[1])
    engine.clock.elapse(1.0)
    (out,) = engine.step()
    assert out.request_id == "a" and out.finish_reason is FinishReason.STOP and out.num_prompt_tokens == 2
    assert out.times is not None
    assert (out.times.arrival, out.times.first_scheduled, out.times.finished) == (2.0, 3.0, 3.5)
    stats = engine.stats
    assert (stats.steps, stats.prompt_tokens, stats.num_running, stats.num_waiting) == (1, 2, 0, 0)
    assert stats.finished == {"stop": 1}


def test_what_fails_ends_alone() -> None:
    engine = make()
    engine.pool("a", [[1], [99], [2]])
    outputs = {o.index: o for o in engine.step()}
    assert outputs[1].finish_reason is FinishReason.ERROR and outputs[1].error == "It is 99."
    assert outputs[1].vector == b"" and outputs[0].vector == b"1" and outputs[2].vector == b"2"


def test_limits_are_said_with_their_numbers() -> None:
    engine = make()
    with pytest.raises(RequestTooLong, match="9 tokens, but this model takes 8"):
        engine.pool("long", [[1], [1] * 9])
    with pytest.raises(RequestError, match="no tokens"):
        engine.pool("empty", [[1], []])
    with pytest.raises(RequestError, match="no input"):
        engine.pool("none", [])
    assert not engine.has_work
    engine.pool("large", [[1]] * 50)  # more than the queue, but it was empty
    with pytest.raises(QueueFull, match="50 sequences"):
        engine.pool("late", [[1]])
    assert len(drain(engine)) == 50
    engine.pool("late", [[1]])


def test_aborts() -> None:
    engine = make()
    engine.pool("a", [[1] * 8, [2]])
    engine.pool("b", [[3]])
    (gone,) = engine.abort("a", 0)
    assert gone.finish_reason is FinishReason.ABORT and gone.index == 0
    assert engine.abort("a", 0) == [] and engine.abort("nobody") == []
    engine.scheduler.check()
    assert {(o.request_id, o.index) for o in drain(engine)} == {("a", 1), ("b", 0)}
    engine.pool("a", [[1], [2]])
    assert len(engine.abort("a")) == 2 and not engine.has_work and engine.step() == []
    engine.pool("a", [[5]])  # the name is free again, and its old entries do not come back
    assert [o.vector for o in drain(engine)] == [b"5"]


def test_an_abort_while_it_runs_silences_it() -> None:
    engine = make()
    engine.pool("a", [[1], [2]])
    batch = engine.scheduler.schedule(0.0)
    assert batch is not None
    assert len(engine.abort("a", 1)) == 1
    engine.scheduler.check()
    outputs = engine.scheduler.update(batch, engine.executor.run(batch), 1.0)
    assert [o.index for o in outputs] == [0]
    engine.scheduler.check()


def test_priority_goes_first_only_where_it_counts() -> None:
    for policy, first in (("priority", "b"), ("fcfs", "a")):
        engine = make(policy=policy, max_num_seqs=1)
        engine.pool("a", [[1]], priority=5)
        engine.pool("b", [[2]], priority=1)
        assert engine.step()[0].request_id == first


def test_nobody_is_lost_and_decisions_repeat() -> None:
    def play() -> tuple[list[list[tuple[str, int]]], dict[tuple[str, int], bytes]]:
        rng, engine = random.Random(7), make(max_waiting=1000)
        outputs, wanted = [], {}
        for i in range(60):
            inputs = [[rng.randrange(90) for _ in range(rng.randint(1, 8))] for _ in range(rng.randint(1, 5))]
            engine.pool(f"r{i}", inputs)
            wanted |= {(f"r{i}", k): str(sum(ids)).encode() for k, ids in enumerate(inputs)}
            if rng.random() < 0.2:
                wanted = {k: v for k, v in wanted.items() if k[0] != f"r{i}"}
                engine.abort(f"r{i}")
            if rng.random() < 0.7:
                outputs += engine.step()
            engine.scheduler.check()
        outputs += drain(engine)
        assert {(o.request_id, o.index): o.vector for o in outputs} == wanted
        for batch in engine.executor.batches:  # type: ignore[attr-defined]
            assert len(batch) <= 4
        return engine.executor.batches, wanted  # type: ignore[attr-defined]

    assert play() == play()
