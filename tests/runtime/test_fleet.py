"""Several engines behind one front, with engines that have no model: routing, death, restarts."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from llmtool.config import EngineConfig
from llmtool.core.request import SamplingParams
from llmtool.core.steplog import replay
from llmtool.errors import (
    EngineDead,
    InfeasibleError,
    ModelError,
    NoReplica,
    QueueFull,
    ReplicaLost,
    RequestError,
    RequestTooLong,
    UsageError,
)
from llmtool.runtime.async_engine import AsyncEngine
from llmtool.runtime.fleet import Fleet, start_engine
from llmtool.runtime.fleet_stream import FleetStream
from llmtool.runtime.place import places
from llmtool.runtime.replica import Care
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.workload import Workload, sim_request
from llmtool.workload.traces import TraceRow
from tests.plan.made import deployment
from tests.plan.made import run as simulated
from tests.runtime.test_async_engine import FACTORY, run
from tests.support.core import expected

QUICK = Care(silence=60.0, first=0.05, longest=0.2, failures=3, settled=60.0)


@asynccontextmanager
async def started(care: Care = QUICK, replicas: int = 2, **settings: object) -> AsyncIterator[Fleet]:
    """At the end no process may be left."""
    config = EngineConfig(data_parallel_size=replicas, **settings)  # type: ignore[arg-type]
    fleet = await Fleet.start(config, factory=FACTORY, care=care)
    pids = {r.pid for r in fleet.fleet.replicas}
    try:
        yield fleet
        pids |= {r.pid for r in fleet.fleet.replicas}
    finally:
        await fleet.close()
    assert not [pid for pid in pids if pid and alive(pid)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def tokens_of(stream: FleetStream) -> list[int]:
    return [token async for output in stream for token in output.token_ids]


def ask(fleet: Fleet, name: str, prompt: Sequence[int], count: int, seed: int = 0) -> asyncio.Task[list[int]]:
    async def answer() -> list[int]:
        return await tokens_of(await fleet.add(name, prompt, SamplingParams(max_tokens=count, seed=seed)))

    return asyncio.create_task(answer())


def ask_greedily(fleet: Fleet, name: str, prompt: Sequence[int], count: int) -> asyncio.Task[list[int]]:
    async def answer() -> list[int]:
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        return await tokens_of(await fleet.add(name, prompt, params))

    return asyncio.create_task(answer())


def number(stream: FleetStream) -> int:
    assert stream.replica is not None
    return stream.replica.number


def states(fleet: Fleet) -> list[str]:
    return [r.state for r in fleet.fleet.replicas]


def pid_of(fleet: Fleet, number: int) -> int:
    return fleet.fleet.replicas[number].pid


def test_requests_are_spread_and_answered() -> None:
    async def body() -> None:
        async with started(max_num_seqs=8, max_waiting=100) as fleet:
            steps: list[int] = []
            fleet.on_step = steps.append
            prompts = [[i % 90, 5, 7] for i in range(40)]
            answers = await asyncio.gather(*(ask(fleet, f"r{i}", p, 6, i) for i, p in enumerate(prompts)))
            assert answers == [expected(p, 6, i) for i, p in enumerate(prompts)]
            await until(lambda: fleet.stats.num_running == 0 and fleet.stats.generation_tokens == 240)
            made = [r.stats.generation_tokens for r in fleet.fleet.replicas]
            assert made == [120, 120] and sum(steps) > 0
            one = fleet.replicas[0].engine
            assert one is not None and fleet.info.num_pages == 2 * one.info.num_pages
            assert (fleet.info.max_num_seqs, fleet.info.max_waiting) == (16, 200)
            view = await fleet.memory()
            assert view.arena == fleet.info.num_pages * fleet.info.page_bytes == sum(view.parts.values())
            assert await fleet.drain(10)
            with pytest.raises(QueueFull, match="shutting down"):
                await fleet.add("late", [1], SamplingParams())

    run(body)


def test_serving_and_planning_route_a_trace_alike() -> None:
    """Two bursts of requests that share beginnings: which engine gets which is the same here and in a simulation of
    the same trace, and more than turns or loads would explain."""
    groups = [0, 1, 0, 2, 1, 0, 0, 2, 1, 1, 0, 0, 0, 0, 0, 0, 2, 2]
    bursts = [
        [TraceRow(at, 1024 + 8, 40, (groups[i], 10 + groups[i], 20 + i)) for i in range(len(groups))]
        for at in (0.0, 1000.0)
    ]
    rows = tuple(row for burst in bursts for row in burst)
    workload = Workload("bursts", rows)
    d = deployment(ParallelPlan(dp=3), max_len=2048, prefix_caching=True)
    planned = simulated(d, workload, router="prefix-aware").routes
    requests = [sim_request(i, row, 0.0) for i, row in enumerate(rows)]

    async def body() -> None:
        served: list[int] = []
        async with started(replicas=3, max_model_len=2048, kv_cache_memory_bytes=2**22) as fleet:
            for burst in (requests[: len(groups)], requests[len(groups) :]):
                params = SamplingParams(max_tokens=40)
                streams = await asyncio.gather(*(fleet.add(r.id, r.prompt, params) for r in burst))
                served += map(number, streams)
                await asyncio.gather(*map(tokens_of, streams))
        assert tuple(served) == planned

    run(body)
    for other in ("round-robin", "least-loaded"):
        assert simulated(d, workload, router=other).routes != planned


def test_refusals() -> None:
    async def body() -> None:
        async with started(max_num_seqs=1, max_waiting=1, max_model_len=100) as fleet:
            with pytest.raises(RequestTooLong):
                await fleet.add("long", [1] * 100, SamplingParams())
            params = SamplingParams(max_tokens=80)
            streams = [await fleet.add(f"r{i}", [i] * 8, params) for i in range(4)]
            assert Counter(map(number, streams)) == {0: 2, 1: 2}
            with pytest.raises(QueueFull, match="queue is full"):
                await fleet.add("more", [1], params)
            with pytest.raises(RequestError, match="in use"):
                await fleet.add("r3", [1], params)
            for stream in streams:
                stream.abort()
                assert len(await tokens_of(stream)) <= 80

    run(body)


def test_one_replica_is_an_engine_by_itself() -> None:
    async def body() -> None:
        engine = await start_engine(EngineConfig(), factory=FACTORY)
        assert isinstance(engine, AsyncEngine) and engine.fleet is None
        await engine.close()

    run(body)


def test_a_model_that_cannot_be_loaded() -> None:
    async def body() -> None:
        with pytest.raises(ModelError, match="no model 'missing'"):
            await start_engine(EngineConfig(model="missing", data_parallel_size=2), factory=FACTORY)

    run(body)


def test_each_replica_has_a_step_log(tmp_path: Path) -> None:
    async def body() -> None:
        async with started(step_log=str(tmp_path / "run.jsonl")) as fleet:
            await asyncio.gather(*(ask(fleet, f"r{i}", [i, 3] * 8, 20) for i in range(12)))

    run(body)
    for number in range(2):
        result = replay(tmp_path / f"run.{number}.jsonl")
        assert result.mismatch is None and result.steps >= 20


def test_shares_of_a_machine() -> None:
    quarters = places(3, 1, "cpu", tuple(range(8)), {})
    assert [p.cpus for p in quarters] == [(0, 1), (2, 3, 4), (5, 6, 7)]
    assert [p.gpus for p in quarters] == [None] * 3
    assert [p.cpus for p in places(2, 1, "cpu", (4,), {})] == [(), (4,)]
    assert places(1, 1, "auto", (0, 1), {})[0].cpus == ()
    assert [p.gpus for p in places(2, 2, "auto", (0, 1), {})] == ["0,1", "2,3"]
    named = {"CUDA_VISIBLE_DEVICES": "5,GPU-8,7"}
    assert [p.gpus for p in places(3, 1, "cuda", (0,), named)] == ["5", "GPU-8", "7"]
    with pytest.raises(InfeasibleError, match="need 4, and CUDA_VISIBLE_DEVICES names 3"):
        places(2, 2, "cuda", (0,), named)


# -- faults ------------------------------------------------------------------------------------------------


def test_kill_under_load() -> None:
    """What had given nothing moves; what had begun fails by name; the survivor serves on; the dead one returns."""

    async def body() -> None:
        async with started(max_num_seqs=4, max_waiting=500, max_model_len=128) as fleet:
            prompts = [[i % 90, 5, 7] for i in range(80)]
            tasks = [ask(fleet, f"r{i}", p, 60, i) for i, p in enumerate(prompts)]
            victim = pid_of(fleet, 0)
            await until(lambda: fleet.stats.generation_tokens > 200)
            os.kill(victim, signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            lost = [r for r in results if isinstance(r, ReplicaLost)]
            assert all(isinstance(r, list | ReplicaLost) for r in results)
            assert 1 <= len(lost) <= 4, "only what ran"
            assert "had begun its answer" in str(lost[0])
            for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
                assert isinstance(result, ReplicaLost) or result == expected(prompt, 60, i)
            view = fleet.fleet
            assert view.lost == len(lost) and view.retried >= 20
            await until(lambda: states(fleet) == ["up", "up"])
            assert pid_of(fleet, 0) not in (0, victim) and fleet.fleet.replicas[0].restarts == 1
            assert fleet.dead is None
            before = fleet.replicas[0].stats.generation_tokens
            assert before > 0, "totals outlive the process"
            await asyncio.gather(*(ask(fleet, f"again{i}", [1, 2], 5) for i in range(8)))
            await until(lambda: fleet.replicas[0].stats.generation_tokens == before + 20)

    run(body)


def test_a_request_without_a_seed_says_the_same_elsewhere() -> None:
    async def body() -> None:
        async with started(max_num_seqs=1) as fleet:
            first = ask(fleet, "first", [1] * 8, 100)
            await until(lambda: fleet.replicas[0].load == 1)
            blocked = ask(fleet, "other", [2] * 8, 100)
            await until(lambda: fleet.replicas[1].load == 1)
            seeds = fleet._seeds.getstate()
            stream = await fleet.add("waits", [3] * 8, SamplingParams(max_tokens=20, temperature=1.0))
            fleet._seeds.setstate(seeds)
            seed = fleet._seeds.getrandbits(63)
            assert number(stream) == 0
            os.kill(pid_of(fleet, 0), signal.SIGKILL)
            assert await tokens_of(stream) == expected([3] * 8, 20, seed)
            assert number(stream) == 1 and stream.retries == 1
            with suppress(ReplicaLost):
                await first
            await blocked

    run(body)


def test_a_hung_replica_is_killed_and_its_requests_move() -> None:
    async def body() -> None:
        async with started(Care(silence=1.0, first=0.05, failures=3), max_num_seqs=1) as fleet:
            stuck = pid_of(fleet, 0)
            os.kill(stuck, signal.SIGSTOP)  # it would hold its requests forever
            answers = await asyncio.gather(*(ask(fleet, f"r{i}", [i, 2], 5) for i in range(6)))
            assert answers == [expected([i, 2], 5) for i in range(6)]
            assert fleet.fleet.retried == 3 and fleet.fleet.lost == 0
            assert "said nothing for 1 seconds" in str(fleet.replicas[0].failure)
            await until(lambda: states(fleet) == ["up", "up"] and not alive(stuck))

    run(body)


def test_what_comes_while_a_replica_is_silent_goes_elsewhere() -> None:
    async def body() -> None:
        async with started(Care(silence=4.0, first=0.05, failures=3)) as fleet:
            os.kill(pid_of(fleet, 0), signal.SIGSTOP)
            await until(lambda: fleet.replicas[0].silent)
            answers = await asyncio.gather(*(ask(fleet, f"r{i}", [i, 2], 5) for i in range(6)))
            assert answers == [expected([i, 2], 5) for i in range(6)]
            assert fleet.fleet.retried == 0, "nobody waited for the end of it"
            await until(lambda: fleet.replicas[0].restarts == 1 and states(fleet) == ["up", "up"])
            assert not fleet.replicas[0].silent

    run(body)


def test_a_busy_replica_is_not_taken_for_a_hung_one() -> None:
    async def body() -> None:
        async with started(
            Care(silence=0.6, failures=3), max_model_len=1000, kv_cache_memory_bytes=2**20
        ) as fleet:
            assert len(await ask(fleet, "long", [1], 900)) == 900  # about two seconds of steps
            await asyncio.sleep(1.5)  # and idle ones answer
            assert [r.restarts for r in fleet.fleet.replicas] == [0, 0]

    run(body)


def test_a_request_that_kills_engines_is_given_up() -> None:
    async def body() -> None:
        async with started(max_num_seqs=4) as fleet:
            poison = ask(fleet, "poison", [96], 5)
            with pytest.raises(ReplicaLost, match="was tried 3 times"):
                await poison
            assert fleet.fleet.lost == 1 and fleet.fleet.retried == 2
            await until(lambda: states(fleet) == ["up", "up"])
            assert await ask(fleet, "after", [4, 5], 3) == expected([4, 5], 3)

    run(body)


def test_none_up_is_said_and_waited_out() -> None:
    async def body() -> None:
        async with started(Care(first=0.5, failures=9), max_num_seqs=1) as fleet:
            for r in fleet.fleet.replicas:
                os.kill(r.pid, signal.SIGKILL)
            await until(lambda: states(fleet) == ["down", "down"])
            with pytest.raises(NoReplica, match="None of 2 replicas is up") as caught:
                await fleet.add("early", [1], SamplingParams())
            assert (caught.value.http_status, caught.value.retry_after) == (503, 5.0)
            with pytest.raises(EngineDead, match="No replica is up"):
                await fleet.memory()
            assert fleet.dead is None and fleet.fleet.up == 0
            await until(lambda: fleet.fleet.up > 0)
            assert await ask(fleet, "later", [4, 5], 3) == expected([4, 5], 3)

    run(body)


def test_replicas_that_do_not_come_back_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with started() as fleet:
            waiting = ask(fleet, "r", [1] * 3, 100)
            for replica in fleet.replicas:  # every start from now on fails
                replica._factory = "tests.support.nothing:build"
            for r in fleet.fleet.replicas:
                os.kill(r.pid, signal.SIGKILL)
            began = time.monotonic()
            error = await asyncio.wait_for(fleet.wait_dead(), 40)
            assert "All 2 replicas are dead" in str(error) and states(fleet) == ["dead", "dead"]
            assert [r.restarts for r in fleet.fleet.replicas] == [2, 2]
            assert time.monotonic() - began > QUICK.wait(1) + QUICK.wait(2)
            with pytest.raises(EngineDead):
                await waiting
            with pytest.raises(EngineDead, match="All 2 replicas"):
                await fleet.add("later", [1], SamplingParams())

    run(body)


def test_waits_between_starts_are_bounded() -> None:
    assert [Care().wait(n) for n in range(1, 8)] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_closing_in_the_middle_of_a_restart_leaves_nothing() -> None:
    async def body() -> None:
        async with started(Care(first=0.05)) as fleet:
            os.kill(pid_of(fleet, 1), signal.SIGKILL)
            await until(lambda: fleet.replicas[1].restarts == 1)
            assert states(fleet)[0] == "up"

    run(body)


# -- prompts on engines of their own -----------------------------------------------------------------------


def made_by(fleet: Fleet) -> dict[str, list[int]]:
    """role -> (prompt tokens, generated tokens) of its engines."""
    found: dict[str, list[int]] = {}
    for r in fleet.fleet.replicas:
        counts = found.setdefault(r.role, [0, 0])
        counts[0] += r.stats.prompt_tokens
        counts[1] += r.stats.generation_tokens
    return found


def test_prompts_run_on_prefill_engines_and_the_rest_elsewhere() -> None:
    async def body() -> None:
        async with started(replicas=1, disaggregate="1:2", max_num_seqs=8) as fleet:
            assert [r.role for r in fleet.fleet.replicas] == ["prefill", "decode", "decode"]
            prompts = [[*range(24), i, 7] for i in range(30)]
            answers = await asyncio.gather(*(ask(fleet, f"r{i}", p, 9, i) for i, p in enumerate(prompts)))
            assert answers == [expected(p, 9, i) for i, p in enumerate(prompts)]
            assert await fleet.drain(10)
            await until(lambda: made_by(fleet) == {"prefill": [30 * 26, 30], "decode": [0, 30 * 8]})
            moved = fleet.fleet.transfers
            assert moved is not None and (moved.done, moved.failed) == (30, 0)
            assert moved.nbytes > 0 and moved.seconds > 0
            assert fleet.replicas[0].stats.prefix_hits == 29 * 24
            assert all(r.stats.generation_tokens > 0 for r in fleet.replicas)

    run(body)


def test_the_last_output_says_what_both_engines_know() -> None:
    async def body() -> None:
        async with started(replicas=1, disaggregate="1:1") as fleet:
            for name, cached in (("a", 0), ("b", 28)):
                stream = await fleet.add(name, [5] * 30, SamplingParams(max_tokens=6, logprobs=0, seed=1))
                outputs = [output async for output in stream]
                last = outputs[-1]
                assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
                assert last.finish_reason == "length" and last.times is not None
                assert (last.num_prompt_tokens, last.num_cached_tokens) == (30, cached)
                t = last.times
                assert 0 <= t.arrival <= t.first_scheduled <= t.first_token <= t.finished

    run(body)


def test_what_does_not_split_is_answered_too() -> None:
    async def body() -> None:
        async with started(replicas=1, disaggregate="1:1", max_model_len=64) as fleet:
            two = SamplingParams(max_tokens=5, n=2, temperature=1.0, seed=4)
            outputs = [o async for o in await fleet.add("two", [1, 2, 3], two)]
            answer = [t for o in outputs if o.index == 0 for t in o.token_ids]
            assert {o.index for o in outputs} == {0, 1} and answer == expected([1, 2, 3], 5, 4)
            assert await ask(fleet, "one", [1, 2], 1) == expected([1, 2], 1)
            assert await ask(fleet, "full", [3] * 63, 1) == expected([3] * 63, 1)
            open_end = await fleet.add("open", [3] * 63, SamplingParams(seed=0))
            assert await tokens_of(open_end) == expected([3] * 63, 1)
            assert fleet.fleet.transfers is not None and fleet.fleet.transfers.done == 0

    run(body)


def test_kv_that_does_not_arrive_is_computed_again() -> None:
    async def body() -> None:
        async with started(replicas=1, disaggregate="1:1") as fleet:
            decode = fleet.replicas[1].engine
            assert decode is not None
            address = decode.info.kv_address
            decode.info = dataclasses.replace(decode.info, kv_address=("127.0.0.1", 9))  # nobody is there
            assert await ask(fleet, "lost", [4] * 20, 9) == expected([4] * 20, 9)
            decode.info = dataclasses.replace(decode.info, kv_address=address)
            assert await ask(fleet, "sent", [4] * 20, 9) == expected([4] * 20, 9)
            moved = fleet.fleet.transfers
            assert moved is not None and (moved.done, moved.failed) == (1, 1)

    run(body)


@pytest.mark.parametrize("victim", [0, 1])
def test_with_one_side_dead_the_other_does_all(victim: int) -> None:
    async def body() -> None:
        care = dataclasses.replace(QUICK, first=3.0)
        async with started(care, replicas=1, disaggregate="1:1", max_num_seqs=4) as fleet:
            prompts = [[i % 90, 5, 7] for i in range(24)]
            tasks = [ask(fleet, f"r{i}", p, 30, i) for i, p in enumerate(prompts)]
            await until(lambda: fleet.stats.generation_tokens > 60)
            os.kill(pid_of(fleet, victim), signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
                assert isinstance(result, ReplicaLost) or result == expected(prompt, 30, i)
            lost = sum(isinstance(result, ReplicaLost) for result in results)
            assert lost <= 4 and fleet.fleet.lost == lost
            assert states(fleet)[victim] == "down"
            assert await ask(fleet, "after", [1, 2], 5) == expected([1, 2], 5)
            await until(lambda: states(fleet) == ["up", "up"])
            before = fleet.fleet.transfers
            assert await ask(fleet, "again", [1, 2], 5) == expected([1, 2], 5)
            after = fleet.fleet.transfers
            assert before is not None and after is not None and after.done == before.done + 1

    run(body)


def test_leaving_between_the_engines_keeps_nothing() -> None:
    async def body() -> None:
        async with started(replicas=1, disaggregate="1:1") as fleet:
            for i in range(3):
                stream = await fleet.add(f"r{i}", [6] * 20, SamplingParams(max_tokens=30))
                await anext(stream)
                stream.abort()
                if i == 0:  # whoever goes on listening hears the end
                    assert [o.finish_reason async for o in stream] == ["abort"]
            assert not fleet._between and await fleet.drain(5)
            assert fleet.fleet.transfers is not None and fleet.fleet.transfers.done == 0

    run(body)


def test_splits_are_checked() -> None:
    assert EngineConfig(disaggregate="2:3").engines == 5
    for bad in ("1", "0:1", "1:", "a:b", "1:1:1"):
        with pytest.raises(UsageError, match="two numbers of engines"):
            EngineConfig(disaggregate=bad)
    with pytest.raises(UsageError, match="how many engines"):
        EngineConfig(disaggregate="1:1", data_parallel_size=2)
