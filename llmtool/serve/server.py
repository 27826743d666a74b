"""The process around the application: sockets, signals, drain, and a loud end when the engine dies."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmtool.config import ServerConfig
from llmtool.errors import EngineDead, UsageError
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.app import create_app
from llmtool.serve.ports import Engine
from llmtool.serve.sse import ABORT_EXTENSION

log = logging.getLogger("llmtool.serve")

Start = Callable[[], Awaitable[tuple[Engine, Tokenizer]]]
Listening = Callable[[str, int], None]

DEATH_GRACE = 2.0  # seconds for streams to get their error event after the engine died
CLOSE_GRACE = 2.0  # seconds for connections to close once their work is done
PAUSE = 0.5  # seconds between looks whether the engine is idle
BACKLOG = 2048


def run_server(start: Start, config: ServerConfig, *, on_listening: Listening | None = None) -> None:
    """Start engine and tokenizer, serve until SIGTERM or SIGINT, drain, close the engine.

    on_listening: called with the host and the bound port (which `port=0` leaves open) once requests are taken.
    Raises UsageError when the address cannot be bound, EngineDead when the engine dies, and what `start` raises.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_main(start, config, on_listening))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on this platform
        return None
    return uvloop.new_event_loop


async def _main(start: Start, config: ServerConfig, on_listening: Listening | None) -> None:
    listener = bind(config.host, config.port)  # before the model is loaded: a taken port should fail at once
    try:
        engine, tokenizer = await start()
        try:
            await serve(engine, tokenizer, config, listener, on_listening=on_listening)
        finally:
            await engine.close()
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not listening yet. Raises UsageError with the reason."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as e:
        raise UsageError(
            f"Cannot listen on {host}:{port}: {e.strerror or e}.", "Choose another --host or --port."
        ) from e
    return listener


async def serve(
    engine: Engine,
    tokenizer: Tokenizer,
    config: ServerConfig,
    listener: socket.socket,
    *,
    on_listening: Listening | None = None,
    handle_signals: bool = True,
    stop: asyncio.Event | None = None,
    send_timeout: float = 30.0,
) -> None:
    """Serve a started engine on a bound socket until a signal, or `stop`, then drain. Raises EngineDead."""
    stop = asyncio.Event() if stop is None else stop
    hurry = asyncio.Event()
    app = create_app(engine, tokenizer, config, send_timeout=send_timeout)
    server = _Server(_uvicorn_config(app))
    if handle_signals:
        _stop_on_signals(stop, hurry)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stopped = asyncio.create_task(stop.wait())
    died = asyncio.create_task(engine.wait_dead())
    preparing = asyncio.create_task(_prepare_grammars(app, engine))
    try:
        await _until_started(server, serving)
        if on_listening is not None:
            on_listening(config.host, listener.getsockname()[1])
        await asyncio.wait((serving, stopped, died), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() and not died.done():
            await _drain(app, engine, config.drain_seconds, hurry)
        elif died.done():
            log.critical("the engine is dead: %s", died.result())
            await _settle(server, DEATH_GRACE)
        await _shut_down(server, serving)
        if died.done():
            raise EngineDead(
                f"The engine died: {died.result()}", "See the lines above; then start the server again."
            )
    finally:
        for task in (serving, stopped, died, preparing):
            task.cancel()
        await asyncio.gather(serving, stopped, died, preparing, return_exceptions=True)


async def _prepare_grammars(app: FastAPI, engine: Engine) -> None:
    """Once nobody waits for an answer: what the first structured output would otherwise have to wait for."""
    await asyncio.sleep(PAUSE)
    while engine.stats.num_running or engine.stats.num_waiting:
        await asyncio.sleep(PAUSE)
    await asyncio.to_thread(app.state.context.check_grammar.prepare)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers, which know nothing of draining."""

    @contextmanager
    def capture_signals(self) -> Any:
        yield


class _Protocol(HttpToolsProtocol):
    """Lets a response drop its connection with what is still buffered: a client that does not read never
    lets a polite close finish.
    """

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT_EXTENSION: {"drop": self._abort}}

    def _abort(self) -> None:
        self.transport.abort()


def _uvicorn_config(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(CLOSE_GRACE),
    )


def _stop_on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT drains; a second one cuts the drain short."""

    def on_signal() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


async def _until_started(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    while not server.started and not serving.done():
        await asyncio.sleep(0.005)
    if serving.done():
        serving.result()


async def _drain(app: FastAPI, engine: Engine, seconds: float, hurry: asyncio.Event) -> None:
    """Refuse what is new, let finish what runs, unless there is a `hurry`. Connections stay open so that /ready
    can say 503 meanwhile.
    """
    app.state.context.draining = True
    log.info("draining: up to %g seconds for running requests", seconds)
    drained = asyncio.create_task(engine.drain(seconds))
    hurried = asyncio.create_task(hurry.wait())
    await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    if drained.done():
        if not drained.result():
            log.warning("requests were still running after %g seconds and were aborted", seconds)
        return
    drained.cancel()
    await asyncio.gather(drained, return_exceptions=True)
    if not await engine.drain(0.0):
        log.warning("requests were still running and were aborted: told to stop a second time")


async def _settle(server: uvicorn.Server, seconds: float) -> None:
    """Until every request in progress has its answer, at most `seconds`."""
    try:
        async with asyncio.timeout(seconds):
            while server.server_state.tasks:
                await asyncio.sleep(0.02)
    except TimeoutError:
        log.warning("%d responses could not be finished", len(server.server_state.tasks))


async def _shut_down(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await serving
