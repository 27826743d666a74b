"""One engine of a fleet: started, watched for signs of life, and started again when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from llmtool.config import EngineConfig
from llmtool.core.stats import EngineStats, ReplicaView, past, total
from llmtool.errors import EngineDead, LLMToolError
from llmtool.runtime.async_engine import AsyncEngine
from llmtool.runtime.parts import Progress
from llmtool.runtime.place import Place

log = logging.getLogger("llmtool.fleet")


@dataclass(frozen=True, slots=True)
class Care:
    """How a replica is looked after; seconds. silence: one that says nothing for so long, though asked, is killed:
    longer than any step takes. first, longest: waits before it is started again, doubled each time. failures: in a
    row, after which it is given up. settled: up for so long, it counts as healthy again. start: limit on loading.
    """

    silence: float = 60.0
    first: float = 1.0
    longest: float = 30.0
    failures: int = 5
    settled: float = 60.0
    start: float = 1800.0

    def wait(self, failures: int) -> float:
        """Seconds before the next start, after so many failures in a row."""
        return min(self.longest, self.first * 2.0 ** (failures - 1))


class Replica:
    """number: among the fleet's. role: both | prefill | decode. on_change: called when it comes up, goes down or is
    given up. engine: the one that runs, None while there is none that can take requests."""

    def __init__(
        self,
        number: int,
        role: str,
        config: EngineConfig,
        factory: str,
        place: Place,
        care: Care,
        on_change: Callable[[Replica], None],
    ) -> None:
        self.number = number
        self.role = role
        self.state = "starting"
        self.restarts = 0
        self.incoming = 0  # requests on their way here from another engine
        self.silent = False  # it has not answered for a quarter of what it may: others go first
        self.engine: AsyncEngine | None = None
        self.failure: LLMToolError | None = None  # why it went down last
        self.on_step: Callable[[int], None] | None = None
        self._config = config
        self._factory = factory
        self._place = place
        self._care = care
        self._on_change = on_change
        self._past = EngineStats()
        self._task: asyncio.Task[None] | None = None

    @property
    def taking(self) -> AsyncEngine | None:
        """The engine, if it can take requests. Its death is noticed here before it is dealt with."""
        return None if self.engine is None or self.engine.dead is not None else self.engine

    @property
    def load(self) -> int:
        return self.incoming + (0 if self.engine is None else self.engine.load)

    @property
    def stats(self) -> EngineStats:
        """Totals since the fleet's start, gauges of now."""
        return self._past if self.engine is None else total((self._past, self.engine.stats))

    def view(self) -> ReplicaView:
        pid = 0 if self.engine is None else self.engine.info.pid
        return ReplicaView(self.number, self.role, self.state, pid, self.load, self.restarts, self.stats)

    async def start(self, progress: Progress | None = None) -> None:
        """The first start, and from then on it is watched. Raises what the loading raised."""
        await self._up(progress)
        self._task = asyncio.create_task(self._live(), name=f"replica-{self.number}")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self.engine is not None:
            await self.engine.close()

    # -- its life ------------------------------------------------------------------------------------------

    async def _up(self, progress: Progress | None = None) -> None:
        config = replace(self._config, step_log=self._step_log())
        starting = AsyncEngine.start(config, progress=progress, factory=self._factory, place=self._place)
        try:
            async with asyncio.timeout(self._care.start):
                engine = await starting
        except TimeoutError:
            raise EngineDead(
                f"Replica {self.number} was not ready after {self._care.start:g} seconds."
            ) from None
        engine.on_step = self._step
        self.engine, self.state = engine, "up"
        self._on_change(self)

    def _step(self, num_tokens: int) -> None:
        if self.on_step is not None:
            self.on_step(num_tokens)

    def _step_log(self) -> str | None:
        """A file for each process: run.jsonl is run.1.jsonl of replica 1, and run.1-2.jsonl after its second
        restart."""
        if self._config.step_log is None:
            return None
        path = Path(self._config.step_log)
        which = f"{self.number}-{self.restarts}" if self.restarts else f"{self.number}"
        return str(path.with_name(f"{path.stem}.{which}{path.suffix}"))

    async def _live(self) -> None:
        failures = 0
        while True:
            if self.engine is not None:
                since = time.monotonic()
                self.failure = await self._until_dead(self.engine)
                failures = 1 if time.monotonic() - since >= self._care.settled else failures + 1
                engine, self.engine = self.engine, None
                self._past = past(total((self._past, engine.stats)))
                await engine.close()
            self.state = "down" if failures < self._care.failures else "dead"
            log.error("replica %d is %s: %s", self.number, self.state, self.failure)
            self._on_change(self)
            if self.state == "dead":
                return
            await asyncio.sleep(self._care.wait(failures))
            self.restarts += 1
            try:
                await self._up()
                log.warning("replica %d is up again, after %d restarts", self.number, self.restarts)
            except (LLMToolError, OSError) as error:  # no process, no memory: perhaps the next time
                started = f"It could not be started: {error}."
                self.failure = error if isinstance(error, LLMToolError) else EngineDead(started)
                failures += 1

    async def _until_dead(self, engine: AsyncEngine) -> LLMToolError:
        """Until the process has ended, by itself or because it gave no sign of life."""
        died = asyncio.create_task(engine.wait_dead())
        interval, silent = self._care.silence / 4, 0
        try:
            while not died.done():
                asked = time.monotonic()
                engine.ping()
                await asyncio.wait((died,), timeout=interval)
                # Rounds are counted, not seconds: this process may have been stopped meanwhile itself.
                silent = silent + 1 if engine.heard < asked else 0
                self.silent = silent > 0
                if silent >= 4 and not died.done():
                    engine.kill(
                        EngineDead(f"It said nothing for {self._care.silence:g} seconds and was killed.")
                    )
                    return await died
            return died.result()
        finally:
            self.silent = False
            died.cancel()
