"""A recorded run replays to the same decisions; both clocks give the same steps."""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llmtool.core.engine import Arrival, Engine
from llmtool.core.ports import (
    Clock,
    NewRequest,
    RealClock,
    ScheduledRequest,
    SchedulerOutput,
    VirtualClock,
)
from llmtool.core.request import BeamParams, Grammar, SamplingParams
from llmtool.core.steplog import StepLogWriter, decision, params_from_dict, params_to_dict, read_rows, replay
from llmtool.errors import UsageError
from tests.support.core import make_engine


def drive(engine: Engine) -> list[dict[str, object]]:
    """Arrivals and aborts tied to steps, not to time: the same trace under any clock."""
    rng = random.Random(4)
    steps = []
    for step in range(2000):
        if step < 60 and rng.random() < 0.8:
            params = SamplingParams(max_tokens=rng.randint(1, 20), n=rng.choice([1, 1, 2]), temperature=1.0)
            if rng.random() < 0.2:
                params = SamplingParams(max_tokens=6, temperature=0.0, beam=BeamParams(3))
            engine.add(f"r{step}", [rng.randrange(9)] * rng.randint(1, 30), params, seed=step)
        if step > 60 and not engine.has_work:
            break
        if step % 17 == 9:
            engine.abort(f"r{step - 4}")
        engine.step()
        if engine.last_step is not None:
            steps.append(decision(engine.last_step))
    assert not engine.has_work and engine.stats.preemptions > 0
    return steps


@pytest.mark.parametrize("in_flight", [1, 2])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_replay_is_bit_for_bit(tmp_path: Path, preemption: str, in_flight: int) -> None:
    path = tmp_path / "run.steplog.jsonl"
    engine = make_engine(16, host_pages=16, preemption=preemption, clock=RealClock(), max_in_flight=in_flight)
    with path.open("w") as file:
        engine._log = StepLogWriter(file, engine.scheduler)
        steps = drive(engine)
    result = replay(path)
    assert result.mismatch is None
    assert result.steps >= len({s["step"] for s in steps}) > 100


def test_replay_notices_a_different_policy(tmp_path: Path) -> None:
    path = tmp_path / "run.steplog.jsonl"
    engine = make_engine(16)
    with path.open("w") as file:
        engine._log = StepLogWriter(file, engine.scheduler)
        drive(engine)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["config"]["max_num_batched_tokens"] += 1
    path.write_text("\n".join(map(json.dumps, rows)))
    assert replay(path).mismatch is not None


def test_decisions_are_compared_whole() -> None:
    new = NewRequest("r", [1, 2], 2, SamplingParams(), 7, [[0]])
    entry = ScheduledRequest("r", 0, 2, True)
    base = decision(SchedulerOutput(1, new=[new], scheduled=[entry]))
    others = [
        SchedulerOutput(1, new=[replace(new, **change)], scheduled=[entry])
        for change in (
            {"token_ids": [1, 3]},
            {"num_prompt_tokens": 1},
            {"seed": 8},
            {"params": SamplingParams(top_k=3)},
            {"tables": [[720]]},
        )
    ]
    others.append(SchedulerOutput(1, new=[new], scheduled=[replace(entry, sample=False)]))
    assert all(decision(other) != base for other in others)


def test_a_timed_trace_runs_on_the_real_clock() -> None:
    engine = make_engine(clock=RealClock())
    started = time.monotonic()
    arrivals = [Arrival(0.05 * i, f"r{i}", [i], SamplingParams(max_tokens=2)) for i in range(3)]
    assert sum(o.finish_reason is not None for o in engine.run_trace(arrivals)) == 3
    assert time.monotonic() - started >= 0.1, "it waited for the last arrival"


def test_both_clocks_give_the_same_steps() -> None:
    def steps(clock: Clock) -> list[dict[str, object]]:
        return drive(make_engine(16, clock=clock))

    assert steps(RealClock()) == steps(VirtualClock())


def test_params_survive_the_log() -> None:
    params = SamplingParams(
        max_tokens=3, logit_bias={5: 1.5}, stop_token_ids=(1, 2), grammar=Grammar("regex", "a+"), seed=3
    )
    assert params_from_dict(json.loads(json.dumps(params_to_dict(params)))) == params
    beam = SamplingParams(temperature=0.0, beam=BeamParams(4, 0.5, True))
    assert params_from_dict(json.loads(json.dumps(params_to_dict(beam)))) == beam
    assert params_to_dict(SamplingParams()) == {}


def test_bad_logs_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"kind":"schedule"}\n')
    with pytest.raises(UsageError, match="header"):
        list(read_rows(path))
    path.write_text('{"kind":"header","version":1}\nnot json\n')
    with pytest.raises(UsageError, match="Line 2"):
        list(read_rows(path))
