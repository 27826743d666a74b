"""An engine in its own process, driven from asyncio: what the HTTP server and in-process benches hold.

This side never imports torch. A reader thread takes messages off the pipe and hands them to the event loop, so
the engine's writes never wait for a busy loop.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection

from llmtool.config import EngineConfig
from llmtool.core.request import SamplingParams, SequenceOutput
from llmtool.core.stats import EngineStats, FleetView, MemoryView
from llmtool.errors import EngineDead, KVLost, LLMToolError, QueueFull, RequestError
from llmtool.runtime import engine_process
from llmtool.runtime.parts import EngineInfo, Progress
from llmtool.runtime.place import Place

TORCH_FACTORY = "llmtool.runtime.build:build"
OPENMP_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # settings of how its threads wait


@contextmanager
def calm_openmp(environment: MutableMapping[str, str]) -> Iterator[None]:
    """What is started meanwhile has OpenMP threads that sleep as soon as they have nothing to do, unless the user
    says otherwise. By default they spin for milliseconds after each of torch's operators, on the cores that the CPU
    kernels' own threads need: steps of two and more sequences, whose logits torch looks through in parallel, took
    up to twice as long."""
    chosen = any(name in environment for name in OPENMP_WAITING)
    if not chosen:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        yield
    finally:
        if not chosen:
            environment.pop("OMP_WAIT_POLICY", None)


@contextmanager
def _holding_signals() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end of the block; processes that it starts inherit the mask. Were they
    ignored instead, one that comes meanwhile would be lost, and with it the wish to stop.
    """
    resource_tracker.ensure_running()  # its start, in the block, would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, engine_process.STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RequestStream:
    """Outputs of one request, in order, until all its answers have ended. `async for` it once."""

    def __init__(self, engine: AsyncEngine, request_id: str, answers: int) -> None:
        self.request_id = request_id
        self._engine = engine
        self._open = answers
        self._outputs: deque[SequenceOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: LLMToolError | None = None

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> SequenceOutput:
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if self._open <= 0:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        output = self._outputs.popleft()
        if output.finish_reason is not None:
            self._open -= 1
        return output

    def abort(self, index: int | None = None) -> None:
        """End the request, or one answer of it. Cheap, and harmless when it has ended already."""
        self._engine._abort(self.request_id, index)

    def _push(self, output: SequenceOutput) -> None:
        self._outputs.append(output)
        self._wake()

    def _fail(self, error: LLMToolError) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncEngine:
    """Start with `await AsyncEngine.start(config)`; end with `await engine.close()`.

    info: facts fixed at start. stats: the latest snapshot the engine pushed. dead: why it can serve no more.
    on_step: called with the number of batched tokens of every committed step. heard: when the process last said
    anything, by time.monotonic(). fleet: None, for it is one engine.
    """

    fleet: FleetView | None = None

    def __init__(self, config: EngineConfig, factory: str, place: Place | None = None) -> None:
        self.config = config
        self.heard = time.monotonic()
        self.info: EngineInfo
        self.stats = EngineStats()
        self.dead: LLMToolError | None = None
        self.on_step: Callable[[int], None] | None = None
        self._streams: dict[str, RequestStream] = {}
        self._unfinished: dict[str, int] = {}
        self._admissions: dict[str, asyncio.Future[None]] = {}
        self._views: deque[asyncio.Future[MemoryView]] = deque()  # asked for, oldest first
        self._sending: dict[str, asyncio.Future[int]] = {}  # KV under way to another engine
        self._draining = False
        self._closing = False
        self._killed: LLMToolError | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._died = asyncio.Event()
        self._seeds = random.Random(config.seed)
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[EngineInfo] = self._loop.create_future()
        self._progress: Progress | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=engine_process.main,
            args=(theirs, config, factory, os.getpid(), place or Place()),
            name="llmtool-engine",
            daemon=True,
        )
        # Ctrl-C during its imports is not the child's business.
        with _holding_signals(), calm_openmp(os.environ):
            self._process.start()
        theirs.close()
        # Writing has its own thread too: a full pipe to an engine in the middle of a step must not stop the loop.
        self._commands: queue.SimpleQueue[engine_process.Command] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="llmtool-engine-writer", daemon=True).start()
        self._reader = threading.Thread(
            target=self._read, args=(self._connection,), name="llmtool-engine-reader", daemon=True
        )
        self._reader.start()

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        progress: Progress | None = None,
        factory: str = TORCH_FACTORY,
        place: Place | None = None,
    ) -> AsyncEngine:
        """Spawn the process, load the model, wait until it is ready. place: its share of the machine; None for all
        of it. Raises what the loading raised."""
        engine = cls(config, factory, place)
        engine._progress = progress
        try:
            engine.info = await engine._started
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def load(self) -> int:
        """Requests that it has and has not ended."""
        return len(self._streams)

    def __contains__(self, request_id: str) -> bool:
        """Whether it has this request, unfinished."""
        return request_id in self._streams

    # -- requests ------------------------------------------------------------------------------------------

    async def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        handoff: bool = False,
        given: Sequence[int] = (),
        moved: bool = False,
    ) -> RequestStream:
        """Queue a request; returns when the engine has admitted it to its queue. handoff, given, moved: as of
        `Scheduler.add`, for engines that have a link (Place.key); KV that moved has been sent by `send_kv`.

        Raises RequestTooLong, RequestError, QueueFull, EngineDead.
        """
        if self.info.pooling is not None:
            raise RequestError("This model is an encoder: it generates nothing.", "Use it for embeddings.")
        self._check(request_id, prompt_token_ids)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        moves = (handoff, tuple(given), moved)
        command = ("add", request_id, list(prompt_token_ids), params, priority, cache_salt, seed, *moves)
        return await self._admitted(request_id, params.n, command)

    async def pool(
        self,
        request_id: str,
        inputs: Sequence[Sequence[int]],
        *,
        segments: Sequence[int] = (),
        priority: int = 0,
    ) -> RequestStream:
        """Queue inputs of an encoder; their vectors come as outputs with the input's index, in any order.

        segments: where the second text of each pair begins (0: no pair), or nothing. Raises as `add`.
        """
        if self.info.pooling is None:
            raise RequestError("This model generates text: it has no embeddings.", "Serve an encoder.")
        self._check(request_id, *inputs, param="input")
        command = ("pool", request_id, [list(token_ids) for token_ids in inputs], list(segments), priority)
        return await self._admitted(request_id, len(inputs), command)

    async def memory(self) -> MemoryView:
        """The KV memory's ledger, between two steps. Raises EngineDead."""
        if self.dead is not None:
            raise self.dead
        asked: asyncio.Future[MemoryView] = self._loop.create_future()
        self._views.append(asked)
        self._send(("memory",))
        return await asked

    async def send_kv(self, request_id: str, address: tuple[str, int]) -> int:
        """Send the KV of a request that ended here with its first token to another engine. Returns the bytes.
        Raises KVLost where it did not arrive, EngineDead."""
        if self.dead is not None:
            raise self.dead
        sent: asyncio.Future[int] = self._loop.create_future()
        self._sending[request_id] = sent
        self._send(("send", request_id, address))
        try:
            return await sent
        finally:
            self._sending.pop(request_id, None)

    def drop_kv(self, request_id: str) -> None:
        """KV that was kept for another engine, or came from one, is of no use any more."""
        if self.dead is None:
            self._send(("drop", request_id))

    async def _admitted(
        self, request_id: str, answers: int, command: engine_process.Command
    ) -> RequestStream:
        stream = RequestStream(self, request_id, answers)
        admitted: asyncio.Future[None] = self._loop.create_future()
        self._streams[request_id] = stream
        self._unfinished[request_id] = answers
        self._admissions[request_id] = admitted
        self._idle.clear()
        self._send(command)
        try:
            await admitted
        except asyncio.CancelledError:
            self._abort(request_id, None)
            raise
        return stream

    def _check(self, request_id: str, *prompts: Sequence[int], param: str = "prompt") -> None:
        if self.dead is not None:
            raise self.dead
        if self._draining:
            raise QueueFull(
                "The server is shutting down.", "Send the request to another one.", retry_after=30.0
            )
        if request_id in self._streams or "/" in request_id:
            raise RequestError(
                f"The request id {request_id!r} is in use, or has a slash, which ids may not.",
                param="request_id",
            )
        for prompt in prompts:
            if prompt and not (min(prompt) >= 0 and max(prompt) < self.info.vocab_size):
                bad = min(prompt) if min(prompt) < 0 else max(prompt)
                raise RequestError(
                    f"The {param} has token id {bad}; ids go from 0 to {self.info.vocab_size - 1}.",
                    param=param,
                )

    def _abort(self, request_id: str, index: int | None) -> None:
        if request_id in self._streams and self.dead is None:
            self._send(("abort", request_id, index))

    def _send(self, command: engine_process.Command) -> None:
        self._commands.put(command)

    def _write(self) -> None:
        """The writer thread; ends with the close command."""
        while True:
            command = self._commands.get()
            try:
                self._connection.send(command)
            except OSError:  # the reader thread sees the same end and says why
                return
            if command[0] == "close":
                return

    # -- messages ------------------------------------------------------------------------------------------

    def _read(self, connection: Connection) -> None:
        """The reader thread."""
        failure: LLMToolError | None = None
        try:
            while True:
                message = connection.recv()
                self.heard = time.monotonic()
                if message[0] == "failed":
                    failure = message[1]
                else:
                    self._loop.call_soon_threadsafe(self._dispatch, message)
        except (EOFError, OSError):
            pass
        except RuntimeError:  # the event loop is closed
            return
        self._process.join(timeout=10)
        code = self._process.exitcode
        if self._closing:
            failure = EngineDead("The engine is closed.")
        failure = failure or self._killed
        error = failure or EngineDead(
            f"The engine process ended unexpectedly (exit code {code}).", "Restart the server; see its log."
        )
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, error)

    def _dispatch(self, message: engine_process.Message) -> None:
        match message:
            case ("step", plain, outputs, num_tokens):
                for request_id, index, token_ids in plain:
                    self._deliver(SequenceOutput(request_id, index, token_ids))
                for output in outputs:
                    self._deliver(output)
                if num_tokens and self.on_step is not None:
                    self.on_step(num_tokens)
            case ("stats", stats):
                self.stats = stats
            case ("memory", view):
                asked = self._views.popleft()
                if not asked.done():
                    asked.set_result(view)
            case ("sent", request_id, nbytes, why_not):
                sent = self._sending.get(request_id)
                if sent is not None and not sent.done():
                    if why_not:
                        sent.set_exception(KVLost(f"The KV did not arrive: {why_not}."))
                    else:
                        sent.set_result(nbytes)
            case ("admitted", request_id):
                self._settle(request_id, None)
            case ("refused", request_id, error):
                self._forget(request_id)
                self._settle(request_id, error)
            case ("progress", text, fraction):
                if self._progress is not None:
                    self._progress(text, fraction)
            case ("ready", info):
                if not self._started.done():
                    self._started.set_result(info)

    def _settle(self, request_id: str, error: LLMToolError | None) -> None:
        admitted = self._admissions.pop(request_id, None)
        if admitted is None or admitted.done():
            return
        if error is None:
            admitted.set_result(None)
        else:
            admitted.set_exception(error)

    def _deliver(self, output: SequenceOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        if output.finish_reason is not None:
            self._unfinished[output.request_id] -= 1
            if self._unfinished[output.request_id] == 0:
                self._forget(output.request_id)
        stream._push(output)

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._unfinished.pop(request_id, None)
        if not self._streams:
            self._idle.set()

    def _end(self, error: LLMToolError) -> None:
        """The process is gone."""
        self.dead = error
        self._died.set()
        if not self._started.done():
            self._started.set_exception(error)
        for asked in self._views:
            if not asked.done():
                asked.set_exception(error)
        self._views.clear()
        for sent in self._sending.values():
            if not sent.done():
                sent.set_exception(error)
        for admitted in self._admissions.values():
            if not admitted.done():
                admitted.set_exception(error)
        self._admissions.clear()
        for stream in list(self._streams.values()):
            stream._fail(error)
        self._streams.clear()
        self._unfinished.clear()
        self._idle.set()

    # -- the end -------------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Have the process say something between two steps, if it still can."""
        self._send(("ping",))

    def kill(self, why: LLMToolError) -> None:
        """End the process at once, whatever it does; its requests fail with `why`."""
        self._killed = why
        self._process.kill()

    async def wait_dead(self) -> LLMToolError:
        """Returns when the engine can serve no more, with the reason."""
        await self._died.wait()
        assert self.dead is not None
        return self.dead

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the running ones, at most `timeout` seconds; then abort what is left.
        True when everything finished by itself."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            for request_id in list(self._streams):
                self._abort(request_id, None)
            return False
        return True

    async def close(self) -> None:
        """End the process; safe to call twice."""
        if self._closing:
            return
        self._closing = True
        if self._started.done():
            self._send(("close",))
        else:  # it is loading a model and would not hear
            self._process.kill()
        await asyncio.to_thread(self._process.join, 10)
        if self._process.is_alive():
            self._process.kill()
            await asyncio.to_thread(self._process.join, 10)
        self._connection.close()
