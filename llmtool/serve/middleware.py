"""What happens to every request before and around the routes: id, API key, body limit, counting.

Plain ASGI, because Starlette's BaseHTTPMiddleware puts a task and a queue between a stream and its client.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmtool.serve.errors import envelope

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
BODY_TIMEOUT = 60.0  # seconds a client may take to send its body
_GOOD_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestId:
    """Echoes X-Request-Id, or makes one. Also in scope["state"]: request_id, and arrival by time.monotonic()."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {}).update(request_id=request_id, arrival=time.monotonic())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class HeadAsGet:
    """Answers HEAD as GET without its body, as probes and load balancers expect of every GET route."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, send_head)


class ApiKey:
    """Asks for `Authorization: Bearer <key>` except on the paths that probes and scrapers use."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        message = "This server needs an API key: send the header Authorization: Bearer <key>."
        body = envelope(401, message, code="invalid_api_key")
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        # Compared in constant time, so that the time does not tell how many characters were right.
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1"), self._key)


class BodyLimit:
    """Reads the body up to `max_bytes` and hands it on whole; refuses a larger one without reading it all."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and int(length[:20]) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                body = await self._read(receive)
        except TimeoutError:
            message = f"The body did not arrive within {BODY_TIMEOUT:g} seconds."
            await JSONResponse(envelope(408, message), 408)(scope, receive, send)
            return
        if body is None:
            return  # the client hung up
        if len(body) > self.max_bytes:
            await self._refuse(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if not message.get("more_body", False) or size > self.max_bytes:
                return b"".join(chunks)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = envelope(413, f"The body is larger than this server takes, {self.max_bytes} bytes.")
        await JSONResponse(body, 413)(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` at once, then goes on to what follows: the disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
