"""The engine's own process: commands come in over a pipe, outputs go out, and in between it steps.

Nothing here waits for HTTP, JSON or a tokenizer. Messages are small tuples; see `Command` and `Message`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from llmtool.config import EngineConfig
from llmtool.core.engine import Engine
from llmtool.core.pooling import PoolingEngine, PoolingScheduler
from llmtool.core.ports import Drafts, MovesPages, RealClock
from llmtool.core.request import SequenceOutput
from llmtool.core.scheduler import Scheduler
from llmtool.core.speculation.build import check_speculation, speculator_of
from llmtool.core.stats import MemoryView, memory_view
from llmtool.core.steplog import StepLogWriter
from llmtool.errors import EngineDead, LLMToolError, UsageError
from llmtool.models.cache import cache_dir
from llmtool.runtime.kv_link import KVLink, SocketLink
from llmtool.runtime.lifeline import die_with
from llmtool.runtime.parts import EngineParts, PoolingParts
from llmtool.runtime.place import Place
from llmtool.runtime.spec_state import Learned

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # the parent's business, also when the whole group gets them
PAUSE = 0.5  # seconds without a request before the engine gets ready what only some requests need
QUIET = 5.0  # the same, before it checks itself
HEALTH = 0.5  # and between looks at whether the other ranks, if there are any, are still there
COMMANDS_PER_STEP = 256
STATS_INTERVAL = 0.1  # seconds between snapshots while the engine is busy

# ("add", id, prompt, params, priority, cache_salt, seed, handoff, given, moved)
# | ("pool", id, inputs, segments, priority) | ("abort", id, index) | ("send", id, address)
# | ("drop", id) | ("memory",) | ("ping",) | ("close",)
Command = tuple[Any, ...]
# ("progress", text, fraction) | ("ready", EngineInfo) | ("admitted", id) | ("refused", id, error)
# | ("step", plain, outputs, num_tokens) | ("stats", EngineStats) | ("memory", MemoryView) | ("pong",)
# | ("sent", id, bytes, why not)
# | ("failed", error, traceback)
# where plain = [(id, index, token_ids), ...], the outputs that carry nothing else
Message = tuple[Any, ...]


def main(connection: Connection, config: EngineConfig, factory: str, parent: int, place: Place) -> None:
    """Entry of the process. factory: "module:function", an EngineFactory. parent: the id of the process that
    started this one."""
    die_with(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the parent held them until here
    log_file = link = None
    close: Callable[[], None] | None = None
    try:
        started = time.monotonic()
        place.take()
        # These two before the model is loaded: bad settings and a bad path should fail at once.
        check_speculation(config.spec, config.proposer, config.spec_branches)
        log_file = _open_log(config.step_log)
        parts = _build(connection, config, factory)
        drafts = learned = health = None
        if isinstance(parts, EngineParts):
            health, close = parts.health, parts.close
            drafts = speculator_of(config.spec, config.proposer, parts.drafter, config.spec_branches)
        if drafts is not None:
            proposer = (
                config.proposer if config.spec_branches == 1 else f"{config.proposer}-{config.spec_branches}"
            )
            learned = Learned(cache_dir(), parts.info, drafts.controller, proposer)
        engine = _engine(parts, config, log_file, drafts)
        info = replace(parts.info, load_seconds=time.monotonic() - started, pid=os.getpid())
        if place.key is not None:
            link = _link(parts, place.key)
            info = replace(info, kv_address=link.address)
        connection.send(("ready", info))
        _Loop(connection, engine, parts.when_idle, learned, link, health).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except LLMToolError as error:
        _report(connection, error, "")
    except Exception as error:
        # The last line of defence: the parent must hear of it, whatever it was.
        _report(connection, EngineDead(f"The engine failed: {error!r}."), traceback.format_exc())
    finally:
        if close is not None:
            close()
        if log_file is not None:
            log_file.close()
        if link is not None:
            link.close()


def _link(parts: EngineParts | PoolingParts, key: bytes) -> SocketLink:
    if isinstance(parts, PoolingParts):
        raise UsageError("This model is an encoder: it has no KV to move.", "Leave out --disaggregate.")
    if not isinstance(parts.executor, MovesPages):
        raise UsageError("This engine's KV cannot be moved to another one.", "Leave out --disaggregate.")
    return SocketLink(key)


def _open_log(path: str | None) -> IO[str] | None:
    try:
        return None if path is None else Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The step log {path} cannot be written: {error.strerror}.") from None


def _build(connection: Connection, config: EngineConfig, factory: str) -> EngineParts | PoolingParts:
    module, _, function = factory.partition(":")
    build = getattr(import_module(module), function)
    parts = build(config, lambda text, fraction: connection.send(("progress", text, fraction)))
    assert isinstance(parts, EngineParts | PoolingParts)
    return parts


def _engine(
    parts: EngineParts | PoolingParts, config: EngineConfig, log_file: IO[str] | None, drafts: Drafts | None
) -> Engine | PoolingEngine:
    if isinstance(parts, PoolingParts):
        return PoolingEngine(PoolingScheduler(parts.scheduler), parts.executor, RealClock())
    allocator = parts.allocator(config.enable_prefix_caching)
    scheduler = Scheduler(parts.scheduler, allocator, parts.info.eos_token_ids, drafts)
    log = None if log_file is None else StepLogWriter(log_file, scheduler, parts.info.kv_cache_dtype)
    return Engine(scheduler, parts.executor, RealClock(), log)


def _report(connection: Connection, error: LLMToolError, trace: str) -> None:
    if trace:
        sys.stderr.write(trace)
    try:
        connection.send(("failed", error, trace))
    except OSError:
        sys.stderr.write(f"{error}\n")
    sys.exit(error.exit_code)


class _Loop:
    def __init__(
        self,
        connection: Connection,
        engine: Engine | PoolingEngine,
        when_idle: Callable[[], None] | None = None,
        learned: Learned | None = None,
        link: KVLink | None = None,
        health: Callable[[], None] | None = None,
    ) -> None:
        self._link = link
        self._lock = threading.Lock()  # the link's threads report, too
        self._learned = learned
        self._health = health
        self._trips = 0
        self._connection = connection
        self._engine = engine
        self._when_idle = when_idle
        self._closing = False
        self._stats_due = 0.0

    def run(self) -> None:
        try:
            self._serve()
        finally:
            if self._learned is not None:
                self._learned.keep()

    def _serve(self) -> None:
        while not self._closing:
            if not self._engine.has_work:
                self._send_stats()
                if self._when_idle is not None and not self._connection.poll(PAUSE):
                    self._when_idle()
                    self._when_idle = None
                if not self._connection.poll(QUIET):
                    self._engine.scheduler.check()  # our own invariants, when nobody is kept waiting
                while self._health is not None and not self._connection.poll(HEALTH):
                    self._health()
                self._handle(self._connection.recv())
            for _ in range(COMMANDS_PER_STEP):  # a flood of new requests must not starve the running ones
                if not self._connection.poll():
                    break
                self._handle(self._connection.recv())
            if self._engine.has_work:
                self._step()

    def _handle(self, command: Command) -> None:
        match command:
            case ("add", request_id, prompt, params, priority, cache_salt, seed, handoff, given, moved):
                assert isinstance(self._engine, Engine)
                work = partial(self._engine.add, priority=priority, cache_salt=cache_salt, seed=seed)
                if self._link is not None:
                    kv = self._link.take(request_id)
                    work = partial(work, handoff=handoff, given=given, kv=kv if moved else None)
                self._admit(request_id, lambda: work(request_id, prompt, params))
            case ("pool", request_id, inputs, segments, priority):
                assert isinstance(self._engine, PoolingEngine)
                pool = partial(self._engine.pool, segments=segments, priority=priority)
                self._admit(request_id, lambda: pool(request_id, inputs))
            case ("abort", request_id, index):
                self._send(self._engine.abort(request_id, index), 0)
            case ("send", request_id, address):
                assert isinstance(self._engine, Engine) and self._link is not None
                kv = self._engine.leaving.pop(request_id, None)
                if kv is None:
                    self._say(("sent", request_id, 0, "it was not kept"))
                else:
                    self._link.send(address, request_id, kv, partial(self._sent, request_id))
            case ("drop", request_id):
                assert isinstance(self._engine, Engine)
                self._engine.leaving.pop(request_id, None)
                if self._link is not None:
                    self._link.take(request_id)
            case ("memory",):
                engine = self._engine
                view = memory_view(engine.scheduler.allocator) if isinstance(engine, Engine) else MemoryView()
                self._say(("memory", view))
            case ("ping",):
                self._say(("pong",))
            case ("close",):
                self._closing = True
            case _:
                raise AssertionError(f"unknown command {command[0]!r}")

    def _say(self, message: Message) -> None:
        with self._lock:
            self._connection.send(message)

    def _sent(self, request_id: str, nbytes: int, why_not: str) -> None:
        with suppress(OSError):  # the parent is gone: the loop hears of it, too
            self._say(("sent", request_id, nbytes, why_not))

    def _admit(self, request_id: str, work: Callable[[], None]) -> None:
        try:
            work()
        except LLMToolError as error:
            self._say(("refused", request_id, error))
        else:
            self._say(("admitted", request_id))

    def _step(self) -> None:
        outputs = self._engine.step()
        step = self._engine.last_step
        self._send(outputs, step.num_tokens if step is not None else 0)
        now = time.monotonic()
        if now >= self._stats_due:
            self._send_stats()
            self._stats_due = now + STATS_INTERVAL

    def _send(self, outputs: list[SequenceOutput], num_tokens: int) -> None:
        # Most outputs are one token and nothing else: send them as bare tuples, which pickle much faster.
        plain = [(o.request_id, o.index, o.token_ids) for o in outputs if _is_plain(o)]
        rest = [o for o in outputs if not _is_plain(o)]
        if outputs or num_tokens:
            self._say(("step", plain, rest, num_tokens))

    def _send_stats(self) -> None:
        stats = self._engine.stats
        stats.rss_bytes = rss_bytes()
        if stats.spec is not None and stats.spec.watchdog_trips > self._trips:
            self._trips = stats.spec.watchdog_trips
            sys.stderr.write(
                f"Speculation lost time at this load and is off for a while: {stats.spec.explain}\n"
            )
        self._say(("stats", stats))


def rss_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _is_plain(output: SequenceOutput) -> bool:
    return output.finish_reason is None and not output.logprobs and not output.num_prompt_tokens
