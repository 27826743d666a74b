"""Ranks that die, hang, do not fit or do not come: a clear error in bounded time, and no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from llmtool.config import EngineConfig
from llmtool.core.request import SamplingParams
from llmtool.errors import EngineDead, LLMToolError, ModelError, UsageError
from llmtool.runtime.async_engine import AsyncEngine
from llmtool.runtime.parallel.executor import build_parallel
from llmtool.runtime.parallel.rendezvous import gather_nodes, host, join, reach, settings
from tests.parallel.engine import SETTINGS
from tests.runtime.tiny import TinyModel, make_tiny_model

BOUND = 40.0  # seconds; what it takes on a busy machine, most of it to start processes
ANY = SamplingParams(temperature=0, max_tokens=120)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def config_of(tiny: TinyModel, **settings: object) -> EngineConfig:
    chosen = {**SETTINGS, "tensor_parallel_size": 2, **settings}
    # There is no tokenizer beside it, and none is needed: config.json names the end of sequence.
    return EngineConfig(model=str(tiny.directory), **chosen)  # type: ignore[arg-type]


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    found = []
    for task in tasks.iterdir() if tasks.is_dir() else []:
        with suppress(OSError):  # a thread that has just ended
            found += [int(child) for child in (task / "children").read_text().split()]
    return [child for child in found if b"parallel.worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pids: list[int], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if alive(pid)]
        time.sleep(0.05)


def fail(config: EngineConfig, harm: Callable[[int, list[int]], None], busy: bool) -> LLMToolError:
    """What an engine says that was harmed while it was busy, or idle. harm: (engine's process, its workers)."""

    async def run() -> LLMToolError:
        engine = await AsyncEngine.start(config)
        pid, workers = engine.info.pid, children(engine.info.pid)
        assert len(workers) == config.ranks - 1
        try:
            reading: Awaitable[None] | None = None
            if busy:
                stream = await engine.add("x", [5, 6, 7], ANY)
                await anext(stream)

                async def read() -> None:
                    async for _ in stream:
                        pass

                reading = asyncio.ensure_future(read())
            harm(pid, workers)
            error = await asyncio.wait_for(engine.wait_dead(), BOUND)
            if reading is not None:
                with pytest.raises(EngineDead):
                    await reading
            return error
        finally:
            await engine.close()
            wait_gone([pid, *workers])

    return asyncio.run(run())


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_killed_rank(tiny: TinyModel, busy: bool) -> None:
    error = fail(config_of(tiny), lambda _, workers: os.kill(workers[0], signal.SIGKILL), busy)
    assert "Rank 1 of 2" in error.message and "killed by SIGKILL" in error.message


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_hung_rank(tiny: TinyModel, busy: bool) -> None:
    config = config_of(
        tiny, distributed_timeout_seconds=5.0, pipeline_parallel_size=2, tensor_parallel_size=1
    )
    error = fail(config, lambda _, workers: os.kill(workers[0], signal.SIGSTOP), busy)
    assert "Rank 1 of 2 has not been heard of for 5 s" in error.message


def test_nobody_outlives_the_engine(tiny: TinyModel) -> None:
    error = fail(config_of(tiny), lambda pid, _: os.kill(pid, signal.SIGKILL), False)
    assert "ended unexpectedly" in error.message


def test_a_port_in_use(tiny: TinyModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = config_of(tiny, master_port=taken.getsockname()[1])
        with pytest.raises(
            UsageError, match=f"meet at 127.0.0.1:{config.master_port}: Address already in use"
        ):
            build_parallel(config, tiny.directory, lambda text, fraction: None)
    assert not children(os.getpid())


def test_an_error_while_a_rank_loads_is_said_by_all(tiny: TinyModel, tmp_path: Path) -> None:
    """Rank 1 holds the last layer, which the file lacks; rank 0 has all of its own."""
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny.directory / name).read_bytes())
    weights = load_file(tiny.directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    config = replace(config_of(tiny), model=str(tmp_path), tensor_parallel_size=1, pipeline_parallel_size=2)
    with pytest.raises(ModelError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        build_parallel(config, tmp_path, lambda text, fraction: None)
    assert not children(os.getpid()) and not dist.is_initialized()


# -- nodes that do not fit ---------------------------------------------------------------------------------------


def meet(ours: EngineConfig, *others: EngineConfig) -> list[LLMToolError | None]:
    """What node 0 and the others say when they meet."""
    store, port = host(ours)
    said: list[LLMToolError | None] = [None] * (1 + len(others))

    def note(i: int, work: Callable[[], None]) -> None:
        try:
            work()
        except LLMToolError as error:
            said[i] = error

    def come(config: EngineConfig) -> None:
        join(reach("127.0.0.1", port, config), config)

    threads = [
        threading.Thread(target=note, args=(i, lambda c=config: come(c)))
        for i, config in enumerate(others, 1)
    ]
    for thread in threads:
        thread.start()
    note(0, lambda: gather_nodes(store, ours))
    for thread in threads:
        thread.join(BOUND)
        assert not thread.is_alive()
    return said


def nodes(tiny: TinyModel, count: int, **settings: object) -> list[EngineConfig]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    base = config_of(
        tiny, nnodes=count, master_port=port, **{"distributed_timeout_seconds": 10.0, **settings}
    )
    return [replace(base, node_rank=rank) for rank in range(count)]


def test_nodes_that_fit(tiny: TinyModel) -> None:
    first, second = nodes(tiny, 2)
    assert meet(first, replace(second, num_threads=3)) == [None, None]
    assert "tensor_parallel_size" in settings(first)


def test_a_node_with_other_settings(tiny: TinyModel) -> None:
    first, second = nodes(tiny, 2)
    said = meet(first, replace(second, tensor_parallel_size=4, dtype="bfloat16"))
    for error in said:
        assert isinstance(error, UsageError)
        assert "Node 1 was started with other settings" in error.message
        assert "tensor_parallel_size 4 there and 2 on node 0" in error.message
        assert "dtype 'bfloat16' there and 'float32'" in error.message


def test_two_nodes_of_one_rank(tiny: TinyModel) -> None:
    first, second, _ = nodes(tiny, 3, tensor_parallel_size=3)
    said = meet(first, second, second)
    assert all("Two nodes say that they are node 1" in str(error) for error in said)


def test_a_node_that_does_not_come(tiny: TinyModel) -> None:
    first, _ = nodes(tiny, 2, distributed_timeout_seconds=1.0)
    (error,) = meet(first)
    assert isinstance(error, EngineDead) and "Of 2 nodes, 1 did not come" in error.message


def test_a_node_0_that_is_not_there(tiny: TinyModel) -> None:
    _, second = nodes(tiny, 2, distributed_timeout_seconds=1.0)
    with pytest.raises(EngineDead, match="Node 0 does not answer"):
        reach(second.master_addr, second.master_port, second)
