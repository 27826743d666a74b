"""The engine's process and its asyncio side, with an engine that has no model."""

import asyncio
import multiprocessing.context
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llmtool.config import EngineConfig
from llmtool.core.admission import sibling_seed
from llmtool.core.request import BeamParams, FinishReason, SamplingParams
from llmtool.core.stats import SpecCounters
from llmtool.core.steplog import replay
from llmtool.errors import EngineDead, ModelError, QueueFull, RequestError, RequestTooLong, UsageError
from llmtool.runtime.async_engine import OPENMP_WAITING, AsyncEngine, RequestStream
from tests.support.core import expected

FACTORY = "tests.support.engine:build"


@asynccontextmanager
async def started(**settings: object) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.start(EngineConfig(**settings), factory=FACTORY)  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        await engine.close()


def run(body: Callable[[], Awaitable[None]], seconds: float = 60.0) -> None:
    async def limited() -> None:
        await asyncio.wait_for(body(), seconds)  # type: ignore[arg-type]

    asyncio.run(limited())


async def tokens_of(stream: RequestStream) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    async for output in stream:
        answers.setdefault(output.index, []).extend(output.token_ids)
    return answers


async def idle(engine: AsyncEngine) -> None:
    """Until the engine reports that nothing runs and no page is in use."""
    for _ in range(500):
        stats = engine.stats
        if not (stats.num_running or stats.num_waiting or stats.pages_used):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not idle: {engine.stats}")


async def counted(engine: AsyncEngine, accepted: int) -> SpecCounters:
    """The counters of speculation, once more than so many tokens were accepted: snapshots lag behind."""
    for _ in range(500):
        if (spec := engine.stats.spec) is not None and spec.accepted_tokens > accepted:
            return spec
        await asyncio.sleep(0.01)
    raise AssertionError(f"not accepted: {engine.stats.spec}")


def test_many_requests_at_once() -> None:
    async def body() -> None:
        steps: list[int] = []
        progress: list[tuple[str, float]] = []
        engine = await AsyncEngine.start(
            EngineConfig(), factory=FACTORY, progress=lambda t, f: progress.append((t, f))
        )
        engine.on_step = steps.append

        async def ask(i: int) -> None:
            prompt, n = [i % 90, 5, 7, i % 3], 1 + i % 3
            params = SamplingParams(max_tokens=4 + i % 9, n=n, temperature=1.0, seed=i)
            stream = await engine.add(f"r{i}", prompt, params)
            want = {k: expected(prompt, 4 + i % 9, sibling_seed(i, k)) for k in range(n)}
            assert await tokens_of(stream) == want

        await asyncio.gather(*(ask(i) for i in range(120)))
        await idle(engine)
        assert progress[0] == ("Loading nothing", 0.5)
        assert engine.info.pid not in (0, os.getpid()) and engine.info.load_seconds > 0
        assert engine.stats.steps > 0 and sum(steps) > 0
        await engine.close()
        await engine.close()

    run(body)


def test_beams_and_finish_reasons_arrive() -> None:
    async def body() -> None:
        async with started() as engine:
            params = SamplingParams(max_tokens=5, n=2, temperature=0.0, beam=BeamParams(3))
            stream = await engine.add("r", [1, 2, 3], params)
            outputs = [output async for output in stream]
            assert [(o.index, o.finish_reason) for o in outputs] == [
                (0, FinishReason.LENGTH),
                (1, FinishReason.LENGTH),
            ]
            assert outputs[0].cumulative_logprob > outputs[1].cumulative_logprob

    run(body)


def test_refusals_come_at_once_and_by_name() -> None:
    async def refused(
        engine: AsyncEngine, error: type[Exception], prompt: Sequence[int], **params: object
    ) -> str:
        with pytest.raises(error) as caught:
            await engine.add("r", prompt, SamplingParams(**params))  # type: ignore[arg-type]
        return str(caught.value)

    async def body() -> None:
        async with started(max_num_seqs=2, max_waiting=1, max_model_len=32) as engine:
            assert "32 tokens" in await refused(engine, RequestTooLong, [1] * 32)
            assert "96" in await refused(engine, RequestError, [97])
            assert "no tokens" in await refused(engine, RequestError, [])
            streams = [await engine.add(f"s{i}", [i] * 8, SamplingParams(max_tokens=20)) for i in range(3)]
            assert "limit is 3" in await refused(engine, QueueFull, [1])
            with pytest.raises(RequestError, match="in use"):
                await engine.add("s0", [1], SamplingParams())
            for stream in streams:
                await tokens_of(stream)
            await idle(engine)

    run(body)


def test_the_event_loop_never_waits_for_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("TEST_ENGINE_GATE", str(gate))

    async def body() -> None:
        async with started(max_model_len=50_000, kv_cache_memory_bytes=2**24) as engine:
            stuck = await engine.add("stuck", [94], SamplingParams(max_tokens=1))
            # Megabytes of prompts, more than a pipe holds, while the engine sits in a step and reads nothing.
            adds = [
                asyncio.create_task(engine.add(f"r{i}", [1] * 20_000, SamplingParams(max_tokens=1)))
                for i in range(40)
            ]
            await asyncio.sleep(0.1)
            gate.touch()  # were the loop stuck in a write, nobody would open the gate
            assert len((await tokens_of(stuck))[0]) == 1
            for stream in await asyncio.gather(*adds):
                stream.abort()

    run(body)


def test_a_cancelled_add_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = tmp_path / "gate"
    monkeypatch.setenv("TEST_ENGINE_GATE", str(gate))

    async def body() -> None:
        async with started() as engine:
            stuck = await engine.add("stuck", [94], SamplingParams(max_tokens=1))
            while not (tmp_path / "reached").exists():  # from here on it takes no command
                await asyncio.sleep(0.01)
            add = asyncio.create_task(engine.add("r", [1], SamplingParams(max_tokens=100)))
            await asyncio.sleep(0.05)
            add.cancel()
            with pytest.raises(asyncio.CancelledError):
                await add
            gate.touch()
            await tokens_of(stuck)
            assert await engine.drain(30), "the cancelled request was aborted, not run to its end"
            assert engine.stats.generation_tokens < 100

    run(body)


def test_abort_and_cancel_free_the_pages() -> None:
    async def body() -> None:
        async with started(max_num_seqs=4) as engine:
            streams = [
                await engine.add(f"r{i}", [i] * 20, SamplingParams(max_tokens=90, n=2, temperature=1.0))
                for i in range(8)
            ]
            async for _ in streams[0]:
                break
            for stream in streams:
                stream.abort()
                stream.abort()
            for stream in streams:
                reasons = [o.finish_reason async for o in stream if o.finish_reason]
                assert reasons[-1] == FinishReason.ABORT
            stream = await engine.add(
                "one", [1, 2], SamplingParams(max_tokens=60, n=2, temperature=1.0, seed=3)
            )
            stream.abort(1)
            answers = await tokens_of(stream)
            assert answers[0] == expected([1, 2], 60, 3) and len(answers.get(1, [])) < 60
            await idle(engine)

    run(body)


@pytest.mark.parametrize("how", ["kill", "exit", "exception"])
def test_death_is_loud(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    async def body() -> None:
        async with started() as engine:
            stream = await engine.add("r", [1] * 20, SamplingParams(max_tokens=100))
            if how == "kill":
                os.kill(engine.info.pid, signal.SIGKILL)
            else:
                poison = engine.add("poison", [96 if how == "exit" else 95], SamplingParams(max_tokens=1))
                with pytest.raises(EngineDead):
                    await tokens_of(await poison)
            with pytest.raises(EngineDead) as caught:
                await tokens_of(stream)
            reason = {"kill": "exit code -9", "exit": "exit code 9", "exception": "this executor is broken"}[
                how
            ]
            assert reason in str(caught.value)
            assert (await engine.wait_dead()) is engine.dead
            with pytest.raises(EngineDead):
                await engine.add("later", [1], SamplingParams())

    run(body)
    if how == "exception":
        assert "Traceback" in capfd.readouterr().err


def test_a_model_that_cannot_be_loaded() -> None:
    async def body() -> None:
        with pytest.raises(ModelError, match="no model 'missing'") as caught:
            await AsyncEngine.start(EngineConfig(model="missing"), factory=FACTORY)
        assert caught.value.remedy == "Give another one."

    run(body)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_process_starts_is_kept(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reaches the parent's handler, and not the child, which it would end during its imports."""
    start = multiprocessing.context.SpawnProcess.start
    heard: list[int] = []

    def interrupted(process: multiprocessing.context.SpawnProcess) -> None:
        os.kill(os.getpid(), number)
        start(process)
        assert process.pid is not None
        os.kill(process.pid, number)

    async def body() -> None:
        async with started() as engine:
            stream = await engine.add("r", [1], SamplingParams(max_tokens=3))
            assert len((await tokens_of(stream))[0]) == 3

    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", interrupted)
    before = signal.signal(number, lambda number, frame: heard.append(number))
    try:
        run(body)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    finally:
        signal.signal(number, before)
    assert heard == [number]


def test_closing_is_not_dying() -> None:
    async def body() -> None:
        async with started() as engine:
            pass
        for _ in range(200):
            if engine.dead is not None:
                break
            await asyncio.sleep(0.01)
        assert str(engine.dead) == "The engine is closed."

    run(body)


def test_a_step_log_that_cannot_be_written() -> None:
    async def body() -> None:
        with pytest.raises(UsageError, match=r"/nowhere/x.jsonl cannot be written: No such file"):
            await AsyncEngine.start(EngineConfig(step_log="/nowhere/x.jsonl"), factory=FACTORY)

    run(body)


def test_drain_waits_then_aborts() -> None:
    async def body() -> None:
        async with started() as engine:
            stream = await engine.add("r", [1], SamplingParams(max_tokens=20))
            drained = asyncio.create_task(engine.drain(10))
            await asyncio.sleep(0)
            with pytest.raises(QueueFull, match="shutting down"):
                await engine.add("late", [1], SamplingParams())
            assert len((await tokens_of(stream))[0]) == 20
            assert await drained
        async with started() as engine:
            stream = await engine.add("r", [1], SamplingParams(max_tokens=120))
            assert not await engine.drain(0.01)
            assert [o.finish_reason async for o in stream][-1] == FinishReason.ABORT

    run(body)


def test_the_step_log_replays(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"

    async def body() -> None:
        async with started(step_log=str(path), kv_cache_memory_bytes=512 * 40, max_num_seqs=8) as engine:
            streams = [
                await engine.add(f"r{i}", [i, 1, 2] * 6, SamplingParams(max_tokens=30, n=2, temperature=1.0))
                for i in range(12)
            ]
            streams[3].abort()
            await asyncio.gather(*(tokens_of(s) for s in streams))

    run(body)
    result = replay(path)
    assert result.mismatch is None and result.steps > 30


def test_the_first_pause_is_used_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "idle"
    monkeypatch.setenv("TEST_ENGINE_IDLE", str(file))

    async def body() -> None:
        async with started() as engine:
            for seed in range(2):
                stream = await engine.add(
                    f"r{seed}", [4, 5], SamplingParams(max_tokens=3, temperature=0.0, seed=0)
                )
                assert await tokens_of(stream) == {0: expected([4, 5], 3, 0)}
                for _ in range(500):
                    if file.exists():
                        break
                    await asyncio.sleep(0.01)
                await idle(engine)
                await asyncio.sleep(0.6)
            assert file.read_text() == "idle\n"

    run(body)


def test_the_memory_s_ledger_is_read_between_steps() -> None:
    async def body() -> None:
        async with started() as engine:
            empty = await engine.memory()
            assert sum(empty.parts.values()) == empty.arena == empty.parts["free"] > 0
            assert empty.arena == engine.info.num_pages * engine.info.page_bytes
            stream = await engine.add("a", [5] * 40, SamplingParams(max_tokens=80, ignore_eos=True))
            both = await asyncio.gather(engine.memory(), engine.memory())
            assert all(sum(view.parts.values()) == empty.arena for view in both)
            stream.abort()
        with pytest.raises(EngineDead):
            await engine.memory()

    run(body)


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "PASSIVE"), ({"GOMP_SPINCOUNT": "9"}, ""), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")],
)
def test_openmp_threads_of_the_engine_sleep_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], found: str
) -> None:
    for name in OPENMP_WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before, said = dict(os.environ), []

    async def body() -> None:
        factory = "tests.support.engine:tell_openmp"
        engine = await AsyncEngine.start(
            EngineConfig(), factory=factory, progress=lambda t, f: said.append(t)
        )
        await engine.close()

    run(body)
    assert said[0] == f"OMP_WAIT_POLICY={found}" and dict(os.environ) == before


def test_speculation_through_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Several tokens a step reach the caller, the counters come over the pipe, and what was learned is kept."""
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path))

    async def body() -> None:
        prompt = [5, 6, 7, 8]
        for spec in ("4", "auto"):
            async with started(spec=spec) as engine:
                for i in range(3):  # the same request again: its text is in the corpus
                    params = SamplingParams(max_tokens=30, temperature=0, seed=3)
                    assert await tokens_of(await engine.add(f"r{i}", prompt, params)) == {
                        0: expected(prompt, 30, 3)
                    }
                counters = await counted(engine, 30 if spec == "4" else -1)
                assert counters.explain is not None and counters.explain["controller"] == spec
        async with started() as engine:
            with pytest.raises(RequestError, match="this server makes none"):
                await engine.add("r", prompt, SamplingParams(max_tokens=3, spec=2))
            assert await tokens_of(await engine.add("r", prompt, SamplingParams(max_tokens=3, spec=0)))
            assert engine.stats.spec is None
        for bad in ({"spec": "sometimes"}, {"spec": "auto", "proposer": "eagle"}):
            with pytest.raises(UsageError):
                async with started(**bad):
                    pass

    run(body)
    (kept,) = (tmp_path / "speculation").iterdir()
    assert kept.name.startswith("auto-cpu-1-float32")
