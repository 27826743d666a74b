"""The server process's log: one line per request, and what goes wrong."""

from __future__ import annotations

import logging
import os
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmtool.errors import UsageError
from llmtool.serve.middleware import OPEN_PATHS

log = logging.getLogger("llmtool.serve.requests")

LEVELS = ("debug", "info", "warning", "error", "critical")
DEFAULT_LEVEL = "info"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(level: str | None = None) -> None:
    """Log to stderr: ours from `level` on, other libraries' from warning on.

    level: one of LEVELS in any case; None takes LLMTOOL_LOG_LEVEL, else info. Raises UsageError for another one.
    """
    given = level or os.environ.get("LLMTOOL_LOG_LEVEL") or DEFAULT_LEVEL
    if given.lower() not in LEVELS:
        raise UsageError(f"The log level cannot be {given!r}.", f"It is one of {', '.join(LEVELS)}.")
    logging.basicConfig(format=_FORMAT, level=logging.WARNING)
    logging.getLogger("llmtool").setLevel(given.upper())


class RequestLog:
    """One line per request when it ends: id, status, tokens, seconds since its arrival. Probes only at debug level.

    Reads request_id, arrival and usage of scope["state"].
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        level = logging.DEBUG if scope.get("path") in OPEN_PATHS else logging.INFO
        if scope["type"] != "http" or not log.isEnabledFor(level):
            await self.app(scope, receive, send)
            return
        status = 500  # of an exception that nobody answers here

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        finally:
            state = scope["state"]
            usage = state.get("usage")
            log.log(
                level,
                "%s %s %s: %d, %d prompt tokens, %d output tokens, %.3f s",
                state["request_id"],
                scope["method"],
                ascii(scope["path"][:200])[1:-1],  # no line breaks
                status,
                usage.prompt_tokens if usage else 0,
                usage.completion_tokens if usage else 0,
                time.monotonic() - state["arrival"],
            )
