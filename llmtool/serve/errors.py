"""Every failure as OpenAI's envelope: ``{"error": {"message", "type", "param", "code"}}``, one human sentence.

pydantic's error lists are reworded into a sentence that names the field; tracebacks stay in the server's log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from llmtool.errors import LLMToolError, QueueFull, RequestError
from llmtool.serve.protocol.common import ErrorResponse

log = logging.getLogger("llmtool.serve")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    502: "generation_error",
    503: "service_unavailable",
}
Path = tuple[str | int, ...]
_INTERNAL = "The server failed to answer this request; its log says why."


class ServerDraining(LLMToolError):
    """The server was told to stop: it finishes what runs and takes nothing new."""

    http_status = 503
    kind = "service_unavailable"


class ModelNotFound(RequestError):
    http_status = 404
    kind = "not_found_error"


def envelope(
    status: int,
    message: str,
    kind: str | None = None,
    param: str | None = None,
    code: str | int | None = None,
) -> dict[str, Any]:
    kind = kind or _TYPES.get(status, "internal_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "param": param,
            "code": code if code is not None else status,
        }
    }


def error_body(error: BaseException) -> tuple[int, dict[str, Any], dict[str, str]]:
    """(HTTP status, envelope, extra headers) of any exception; unknown ones say nothing of their inside."""
    if isinstance(error, LLMToolError) and error.http_status != 500:
        headers = {}
        if isinstance(error, QueueFull):
            headers["Retry-After"] = str(max(1, round(error.retry_after)))
        elif isinstance(error, ServerDraining):
            headers["Retry-After"] = "5"
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        return error.http_status, envelope(error.http_status, str(error), error.kind, param, code), headers
    return 500, envelope(500, _INTERNAL), {}


def error_response(error: BaseException) -> JSONResponse:
    status, body, headers = error_body(error)
    return JSONResponse(body, status, headers)


def sentence(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """One sentence for pydantic's `errors` about `body`, and the name of the field at fault.

    Only the first wrong field is named. A union reports once per branch; the branch that got furthest into the
    input is what the caller meant.
    """
    first: dict[tuple[object, ...], tuple[Path, Mapping[str, Any]]] = {}  # each branch's first error
    for error in errors:
        path, branch = _path(error, body)
        first.setdefault((path[:1], branch), (path, error))
    field = next(iter(first.values()))[0][:1]
    candidates = [(path, error) for path, error in first.values() if path[:1] == field]
    # Of the right type but of a wrong size: that branch was meant, whatever the others say of single items.
    candidates = [c for c in candidates if c[1]["type"] in ("too_long", "too_short")] or candidates
    path = max((path for path, _ in candidates), key=lambda p: [(isinstance(k, int), k) for k in p])
    there = [error for at, error in candidates if at == path]
    # Of the right type but wrong: that branch was meant, and the others only say that they are of other types.
    there = [error for error in there if not error["type"].endswith("_type")] or there
    reasons = list(dict.fromkeys(map(_reason, there)))
    common = "it should be "
    if len(reasons) > 1 and all(reason.startswith(common) for reason in reasons):
        reasons = [common + reasons[0].removeprefix(common), *(r.removeprefix(common) for r in reasons[1:])]
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
    if not name:
        return "The body should be a JSON object.", None
    return f"{name}: {' or '.join(reasons)}.", name


def _path(error: Mapping[str, Any], body: Any) -> tuple[Path, tuple[str, ...]]:
    """The part of the error's location that leads into the input, and the rest: names of union branches."""
    path: list[str | int] = []
    branch: list[str] = []
    loc: Sequence[Any] = error["loc"]
    keys = list(loc[1:]) if loc and loc[0] in ("body", "query", "header", "path") else list(loc)
    for position, key in enumerate(keys):
        if isinstance(body, dict) and key in body:
            path.append(key)
            body = body[key]
        elif error["type"] == "missing" and position == len(keys) - 1:
            path.append(key)
        elif isinstance(body, list) and isinstance(key, int) and key < len(body):
            path.append(key)
            body = body[key]
        else:
            branch.append(str(key))
    return tuple(path), tuple(branch)


def _reason(error: Mapping[str, Any]) -> str:
    kind, message = error["type"], str(error["msg"])
    if kind == "missing":
        return "this field is required"
    if kind in ("model_attributes_type", "model_type", "dict_type"):
        return "it should be a JSON object"
    for noise in ("Value error, ", "Input ", "String ", "List ", "Dictionary "):
        message = message.removeprefix(noise)
    message = message.replace(" after validation", "").rstrip(".")
    return f"it {message}" if message.startswith("should") else message[:1].lower() + message[1:]


async def _on_known(request: Request, error: Exception) -> JSONResponse:
    return error_response(error)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    if isinstance(error.body, bytes) and error.body:
        message = "The body must be JSON, with the header Content-Type: application/json."
        return JSONResponse(envelope(415, message), 415)
    message, param = sentence(error.errors(), error.body)
    return JSONResponse(envelope(400, message, param=param), 400)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is nothing at {request.url.path}."
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}."
    headers = dict(error.headers) if error.headers else None
    return JSONResponse(envelope(error.status_code, message), error.status_code, headers)


async def _on_unknown(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises the error again afterwards, so that uvicorn logs the traceback.
    response = error_response(error)
    request_id = getattr(request.state, "request_id", None)
    if request_id:
        response.headers["X-Request-Id"] = request_id
    return response


def add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(LLMToolError, _on_known)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_unknown)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: these statuses answer with the envelope."""
    meaning = {
        400: "The request is wrong; the message says how.",
        401: "No or a wrong API key.",
        404: "No such model.",
        413: "The body is larger than the server takes.",
        415: "The body is not JSON.",
        429: "Too many requests wait; Retry-After says when to come back.",
        502: "The engine could not finish this answer.",
        503: "The engine is dead, or the server drains.",
    }
    return {s: {"model": ErrorResponse, "description": meaning[s]} for s in statuses}


def error_event(error: BaseException) -> bytes:
    """A server-sent event for an error after the stream began."""
    return b"data: " + json.dumps(error_body(error)[1]).encode() + b"\n\n"
