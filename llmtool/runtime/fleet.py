"""Several engines with the whole model each behind one front: data parallelism (`--data-parallel-size`), and
engines of their own for prompts (`--disaggregate`).

A router of llmtool/core/routing.py, which `plan` simulates too, says which engine gets a request. When an engine
dies or hangs, what it had given no token of is asked of another one, what had begun fails with ReplicaLost, and the
engine is started again (replica.py).
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from llmtool.config import EngineConfig
from llmtool.core.request import SamplingParams
from llmtool.core.routing import Router, make_router
from llmtool.core.stats import EngineStats, FleetView, MemoryView, Transfers, memory_total, total
from llmtool.errors import (
    EngineDead,
    InfeasibleError,
    LLMToolError,
    NoReplica,
    QueueFull,
    ReplicaLost,
    RequestError,
)
from llmtool.runtime.async_engine import TORCH_FACTORY, AsyncEngine, RequestStream
from llmtool.runtime.fleet_stream import RETRIES, FleetStream, SplitStream
from llmtool.runtime.parts import EngineInfo, Progress
from llmtool.runtime.place import places
from llmtool.runtime.replica import Care, Replica

ROUTER = "prefix-aware"
PAUSE = 0.02  # seconds between looks while a queue is full, or draining


class Fleet:
    """Start with `await Fleet.start(config)`; end with `await fleet.close()`. Otherwise like an AsyncEngine.

    info: of one engine, with pages, weights and limits of all together. stats: sums. dead: set when no engine is
    left and none will be started again.
    """

    def __init__(self, config: EngineConfig, factory: str, care: Care, router: str) -> None:
        self.config = config
        self.info: EngineInfo
        self.dead: LLMToolError | None = None
        self._seeds = random.Random(config.seed)
        self._changed = asyncio.Event()
        self._died = asyncio.Event()
        self._draining = False
        self._closing = False
        self._retried = self._lost = 0
        self._between: set[FleetStream] = set()
        self._transfers = Transfers()
        key = os.urandom(32) if config.split else None
        roles = ["both"] * config.engines
        if config.split:
            roles = ["prefill"] * config.split[0] + ["decode"] * config.split[1]
        self._routers: dict[str, Router] = {role: make_router(router) for role in roles}
        device = "cuda" if config.device.startswith("cuda") else config.device
        each = replace(config, device=device)
        self.replicas = [
            Replica(place.number, role, each, factory, replace(place, key=key), care, self._on_change)
            for place, role in zip(places(config.engines, config.ranks, config.device), roles, strict=True)
        ]

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        factory: str = TORCH_FACTORY,
        care: Care | None = None,
        router: str = ROUTER,
    ) -> Fleet:
        """Start all engines and wait until they are ready. Raises what the loading of one raised, and
        InfeasibleError where there are too few GPUs."""
        fleet = cls(config, factory, care or Care(silence=config.replica_timeout), router)
        first = fleet.replicas[0]
        try:
            async with asyncio.TaskGroup() as starting:
                for replica in fleet.replicas:
                    starting.create_task(replica.start(progress if replica is first else None))
            fleet.info = fleet._describe()
        except BaseExceptionGroup as group:
            await fleet.close()
            raise group.exceptions[0] from None
        except BaseException:
            await fleet.close()
            raise
        return fleet

    def _describe(self) -> EngineInfo:
        infos = [r.engine.info for r in self.replicas if r.engine is not None]
        first = infos[0]
        if len({info.device.partition(":")[0] for info in infos}) > 1:
            raise InfeasibleError(
                f"Of {len(infos)} replicas some run on {first.device} and some do not: there are too few GPUs.",
                "Lower --data-parallel-size, or give --device.",
            )
        return replace(
            first,
            max_model_len=min(info.max_model_len for info in infos),
            max_num_seqs=sum(info.max_num_seqs for info in infos),
            max_waiting=sum(info.max_waiting for info in infos),
            num_pages=sum(info.num_pages for info in infos),
            host_pages=sum(info.host_pages for info in infos),
            weight_bytes=sum(info.weight_bytes for info in infos),
            aot_bytes=sum(info.aot_bytes for info in infos),
            load_seconds=max(info.load_seconds for info in infos),
        )

    # -- looking in ----------------------------------------------------------------------------------------

    @property
    def stats(self) -> EngineStats:
        return total(r.stats for r in self.replicas)

    @property
    def fleet(self) -> FleetView:
        return FleetView(
            tuple(r.view() for r in self.replicas),
            self._retried,
            self._lost,
            replace(self._transfers) if self.config.split else None,
        )

    @property
    def on_step(self) -> Callable[[int], None] | None:
        return self.replicas[0].on_step

    @on_step.setter
    def on_step(self, call: Callable[[int], None] | None) -> None:
        for replica in self.replicas:
            replica.on_step = call

    async def memory(self) -> MemoryView:
        """The ledgers of all engines that are up, summed. Raises EngineDead when there is none."""
        engines = self._up()
        views = await asyncio.gather(*(e.memory() for e in engines), return_exceptions=True)
        found = [view for view in views if isinstance(view, MemoryView)]
        if not found:
            raise self.dead or EngineDead("No replica is up.", "Try again later.")
        return memory_total(found)

    def _up(self) -> list[AsyncEngine]:
        return [engine for r in self.replicas if (engine := r.taking) is not None]

    # -- requests ------------------------------------------------------------------------------------------

    async def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> FleetStream:
        """As of AsyncEngine. Raises NoReplica, too."""
        prompt = list(prompt_token_ids)
        if params.seed is None:  # chosen here, so that another engine says the same
            params = replace(params, seed=self._seeds.getrandbits(63))
        if self._splits(prompt, params):
            return await self._add(SplitStream(self, request_id, prompt, params, priority, cache_salt))

        def ask(engine: AsyncEngine) -> Awaitable[RequestStream]:
            return engine.add(request_id, prompt, params, priority=priority, cache_salt=cache_salt)

        return await self._add(FleetStream(self, request_id, "decode", prompt, cache_salt, ask))

    def _splits(self, prompt: Sequence[int], params: SamplingParams) -> bool:
        """Whether a request is one sequence of more than one token, and both kinds of engines are up."""
        if not self.config.split or params.n > 1 or params.beam is not None or params.max_tokens == 1:
            return False
        if len(prompt) + 1 >= self.info.max_model_len:
            return False
        return {r.role for r in self.replicas if r.taking is not None} == {"prefill", "decode"}

    async def pool(
        self,
        request_id: str,
        inputs: Sequence[Sequence[int]],
        *,
        segments: Sequence[int] = (),
        priority: int = 0,
    ) -> FleetStream:
        """As of AsyncEngine. Raises NoReplica, too."""

        def ask(engine: AsyncEngine) -> Awaitable[RequestStream]:
            return engine.pool(request_id, inputs, segments=segments, priority=priority)

        return await self._add(FleetStream(self, request_id, "both", (), "", ask))

    async def _add(self, stream: FleetStream) -> FleetStream:
        if self._draining:
            raise QueueFull(
                "The server is shutting down.", "Send the request to another one.", retry_after=30.0
            )
        if any(stream.request_id in engine for engine in self._up()):
            raise RequestError(f"The request id {stream.request_id!r} is in use.", param="request_id")
        stream.inner = await self.place(stream)
        return stream

    async def place(
        self, stream: FleetStream, retry: bool = False, at: Replica | None = None
    ) -> RequestStream:
        """Have an engine admit the request. retry: it was admitted before, and waits for one that has room. at: the
        one to try first, which means the same, chosen by `choose`.

        Raises NoReplica, EngineDead and what the engine raises; QueueFull only when all queues are full.
        """
        full: QueueFull | None = None
        tried: set[int] = set()
        self._retried += retry
        patient = retry or at is not None
        while True:
            if self.dead is not None:
                raise self.dead
            chosen = at if at is not None and at.taking is not None else self._choose(stream, tried)
            at = None
            if chosen is None:
                if full is not None and not patient:
                    raise full
                if full is not None:
                    full = None
                    tried.clear()
                    await asyncio.sleep(PAUSE)
                elif patient:
                    await self._changed.wait()
                else:
                    raise NoReplica(
                        f"None of {len(self.replicas)} replicas is up, they are being restarted.",
                        "Send the request again.",
                        retry_after=5.0,
                    )
                continue
            engine = chosen.taking
            assert engine is not None
            stream.replica = chosen
            try:
                return await stream.ask(engine)
            except QueueFull as error:
                full = error
                tried.add(chosen.number)
            except EngineDead:  # it died with the request at its door
                if stream.retries >= RETRIES:
                    self.count_lost()
                    raise ReplicaLost(
                        f"The request was tried {stream.retries + 1} times, and each engine died.",
                        "Send it again.",
                    ) from None
                stream.retries += 1
                self._retried += 1
                patient = True

    def choose(self, stream: FleetStream) -> Replica | None:
        return self._choose(stream, set())

    def _choose(self, stream: FleetStream, tried: set[int]) -> Replica | None:
        """Of the engines of its role, if one is up, else of all: each could do everything."""
        able = [r for r in self.replicas if r.taking is not None and r.number not in tried]
        able = [r for r in able if not r.silent] or able
        role = stream.role if stream.role in {r.role for r in able} else None
        loads = [r.load if r in able and role in (None, r.role) else None for r in self.replicas]
        if not able:
            return None
        router = self._routers[role or self.replicas[0].role]
        prompt = () if role == "decode" and isinstance(stream, SplitStream) else stream.prompt
        return self.replicas[router.pick(loads, prompt, stream.salt)]

    def count_lost(self) -> None:
        self._lost += 1

    def count_transfer(self, nbytes: int, seconds: float) -> None:
        done = self._transfers
        done.failed += nbytes == 0
        done.done += nbytes > 0
        done.nbytes += nbytes
        done.seconds += seconds

    def between(self, stream: FleetStream, is_between: bool) -> None:
        if is_between:
            self._between.add(stream)
        else:
            self._between.discard(stream)

    # -- comings and goings --------------------------------------------------------------------------------

    def _on_change(self, replica: Replica) -> None:
        if replica.state != "up":
            self._routers[replica.role].forget(replica.number)
        if all(r.state == "dead" for r in self.replicas):
            self.dead = EngineDead(
                f"All {len(self.replicas)} replicas are dead, the last one: {replica.failure}",
                "Restart the server; see its log.",
            )
            self._died.set()
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_dead(self) -> LLMToolError:
        await self._died.wait()
        assert self.dead is not None
        return self.dead

    async def drain(self, timeout: float) -> bool:
        """As of AsyncEngine: of all engines. Requests still move between them meanwhile."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout):
                while self.dead is None and (self._between or any(e.load for e in self._up())):
                    await asyncio.sleep(PAUSE)
        except TimeoutError:
            for stream in list(self._between):
                stream.abort()
            await asyncio.gather(*(engine.drain(0.0) for engine in self._up()))
            return False
        return True

    async def close(self) -> None:
        """End all processes; safe to call twice."""
        if self._closing:
            return
        self._closing = True
        await asyncio.gather(*(replica.close() for replica in self.replicas))


async def start_engine(
    config: EngineConfig, *, progress: Progress | None = None, factory: str = TORCH_FACTORY
) -> AsyncEngine | Fleet:
    """What `config` asks for: one engine, or several behind a router."""
    if config.engines == 1:
        return await AsyncEngine.start(config, progress=progress, factory=factory)
    return await Fleet.start(config, progress=progress, factory=factory)
