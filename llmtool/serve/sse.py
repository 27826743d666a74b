"""Server-sent events that survive bad clients, and work that ends when nobody listens.

A stream ends early in two ways: the client hangs up, or it stops reading. Both end the generation. Sending waits
for the socket, so a slow reader holds up only its own stream, and no more than `send_timeout` seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmtool.errors import LLMToolError
from llmtool.serve.errors import error_event

log = logging.getLogger("llmtool.serve")
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
ABORT_EXTENSION = "llmtool.abort"  # scope["extensions"]: drop the connection with what is still buffered
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


class ClientStalled(Exception):
    """The client is connected and does not read."""


async def until_disconnect(receive: Receive, work: Coroutine[None, None, T]) -> T:
    """The result of `work`; when the client hangs up first, cancel it and raise ClientGone."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` (encoded, with their blank lines), then [DONE].

    close: called at the very end, whatever happened, also when nothing was ever sent.
    send_timeout: seconds one event may wait for the client to read.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], close: Callable[[], None], send_timeout: float
    ) -> None:
        super().__init__(headers=_HEADERS, media_type=self.media_type)
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._send_timeout = send_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._stream(send))
        except ClientGone:
            pass
        except ClientStalled:
            log.warning("%s: the client does not read; stream dropped", scope.get("path", ""))
            extension = scope.get("extensions", {}).get(ABORT_EXTENSION)
            if extension is not None:
                extension["drop"]()
                await asyncio.sleep(0)  # lets the server see that the connection is lost
        finally:
            self._close()

    async def _stream(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._send(send, event)
        except LLMToolError as e:
            await self._send(send, error_event(e))
        except ClientStalled:
            raise
        except Exception as e:
            # The status line is out: all that is left is to say so in the stream, and to log it.
            log.exception("stream failed")
            await self._send(send, error_event(e))
        await self._send(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        try:
            async with asyncio.timeout(self._send_timeout):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except TimeoutError:
            raise ClientStalled from None
