"""A streaming client of any OpenAI-compatible server: times chunks as they arrive and records every failure.

TTFT runs from just before the request is handed to the connection (its body is serialised before that) and so
includes connecting, which a client sees too.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import aiohttp

from llmtool.bench.counters import read_counters, read_memory
from llmtool.bench.sse import StreamError, StreamParser, error_message
from llmtool.errors import LLMToolError, UsageError
from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """url: of the server, with or without a trailing /v1. fields: sampling and extra fields of every body.

    timeout: seconds for one whole request. keep_text: record the generated text. embeddings: ask for vectors.
    """

    url: str
    model: str
    api_key: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 6 * 3600.0
    keep_text: bool = False
    embeddings: bool = False


def base_url(url: str) -> str:
    """`url` without a trailing slash or /v1. UsageError if it is not HTTP."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(
            f"{url!r} is not an http:// or https:// URL.", "For example --url http://127.0.0.1:8000."
        )
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries the key: the one given, else LLMTOOL_API_KEY's, else none."""
    key = api_key or os.environ.get("LLMTOOL_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class HttpBackend:
    """Use as an async context manager, or call `close`; must be made inside a running event loop."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._url = base_url(options.url)
        self._session = aiohttp.ClientSession(
            # No limit: the load generator alone decides how many streams are open.
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None),
            timeout=aiohttp.ClientTimeout(total=options.timeout, sock_connect=min(60.0, options.timeout)),
            headers=authorization(options.api_key) | dict(options.headers),
            trace_configs=[_reuse_tracer()],
        )

    async def __aenter__(self) -> HttpBackend:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def description(self) -> str:
        return self._url

    async def close(self) -> None:
        await self._session.close()

    def body(self, request: BenchRequest) -> tuple[str, bytes]:
        """(path, JSON body) of a request: to embeddings where those are asked for, chat messages to the chat
        endpoint, the rest to completions."""
        body: dict[str, Any] = {"model": self._options.model}
        if self._options.embeddings:
            body["input"] = request.text if request.text is not None else request.token_ids
            body |= {**self._options.fields, **request.extra}
            return EMBEDDINGS, json.dumps(body, separators=(",", ":")).encode()
        if request.messages is not None:
            path, body["messages"] = CHAT, request.messages
        else:
            path, body["prompt"] = (
                COMPLETIONS,
                request.text if request.text is not None else request.token_ids,
            )
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        if request.max_tokens is not None:
            body["max_tokens"] = request.max_tokens
        body |= self._options.fields
        body |= request.extra
        return path, json.dumps(body, separators=(",", ":")).encode()

    async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
        if self._options.embeddings:
            await self._embed(request, record)
        else:
            await self._stream(request, record)

    async def _embed(self, request: BenchRequest, record: RequestRecord) -> None:
        """One vector: it comes whole, so all there is to time is the end."""
        path, body = self.body(request)
        record.start = time.perf_counter()
        try:
            headers = {"Content-Type": "application/json"}
            async with self._post(path, body, headers) as response:
                if response.status != 200:
                    record.error = await _http_error(response)
                else:
                    answer = json.loads(await response.read())
                    record.prompt_tokens = int(answer["usage"]["prompt_tokens"])
                    record.success = bool(answer["data"][0]["embedding"])
        except (TimeoutError, aiohttp.ClientError, OSError) as e:
            record.error = _sentence(e)
        except (ValueError, KeyError, IndexError, TypeError):
            record.error = "the answer is no list of embeddings"
        record.ttft = record.e2e = time.perf_counter() - record.start
        record.success = record.success and not record.error
        record.counted = record.success
        if record.success:
            record.finish_reason = "stop"
        elif not record.error:
            record.error = "the answer has no embedding"

    async def _stream(self, request: BenchRequest, record: RequestRecord) -> None:
        path, body = self.body(request)
        parser = StreamParser(self._options.keep_text)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        record.start = time.perf_counter()
        try:
            async with self._post(path, body, headers) as response:
                if response.status != 200:
                    record.error = await _http_error(response)
                elif response.content_type != "text/event-stream":
                    record.error = f"the answer is no event stream but {response.content_type}"
                else:
                    # iter_any hands on what has arrived, uncopied; lines would cost a wake-up each.
                    async for data in response.content.iter_any():
                        parser.feed(data, time.perf_counter())
                    parser.close(time.perf_counter())
        except (TimeoutError, aiohttp.ClientError, OSError, StreamError) as e:
            record.error = _sentence(e)
        fill(record, parser, request, time.perf_counter())

    @asynccontextmanager
    async def _post(
        self, path: str, body: bytes, headers: dict[str, str]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer's head. A kept connection that the server had closed meanwhile is no fault of the request: it
        goes out once more on another (RFC 9112, 9.3.1), its time counted from the first try."""
        connection: dict[str, bool] = {}
        url = self._url + path
        try:
            response = await self._session.post(url, data=body, headers=headers, trace_request_ctx=connection)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not connection.get("reused"):
                raise
            headers = {**headers, "Connection": "close"}
            response = await self._session.post(url, data=body, headers=headers)
        async with response:
            yield response

    async def counters(self) -> dict[str, float]:
        return read_counters(await self._metrics())

    async def speculation(self) -> dict[str, Any]:
        return {}  # /metrics has its figures, not its reasons

    async def memory(self) -> dict[str, int]:
        return read_memory(await self._metrics())

    async def _metrics(self) -> str:
        """The server's Prometheus page; empty where it has none."""
        try:
            timeout = aiohttp.ClientTimeout(total=5)
            async with self._session.get(self._url + "/metrics", timeout=timeout) as response:
                return await response.text() if response.status == 200 else ""
        except (TimeoutError, aiohttp.ClientError, OSError, UnicodeDecodeError):
            return ""


def fill(record: RequestRecord, parser: StreamParser, request: BenchRequest, now: float) -> None:
    """Writes what the stream brought into the record and decides whether the request succeeded."""
    record.error = record.error or parser.error
    if not record.error and not (parser.done or parser.finish_reason):
        record.error = "the stream ended without a finish reason or [DONE]"
    if not record.error and parser.end is None:
        record.error = "the stream brought neither output nor a finish reason"
    record.success = not record.error
    end = parser.end if record.success and parser.end is not None else now
    # A stream whose only tokens have no text (an end token at once) is timed by its finish reason.
    first = parser.first if parser.first is not None else end
    record.ttft = first - record.start if record.success or parser.first is not None else 0.0
    record.itls = parser.itls
    record.e2e = end - record.start
    record.finish_reason = parser.finish_reason
    record.text = parser.text
    usage = parser.usage
    record.counted = isinstance(usage.get("completion_tokens"), int)
    record.output_tokens = usage["completion_tokens"] if record.counted else parser.chunks
    prompt_tokens = usage.get("prompt_tokens")
    record.prompt_tokens = prompt_tokens if isinstance(prompt_tokens, int) else (request.prompt_len or 0)
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict) and isinstance(details.get("cached_tokens"), int):
        record.cached_tokens = details["cached_tokens"]


def _reuse_tracer() -> aiohttp.TraceConfig:
    """Notes in a request's trace context whether it went out on a connection that had served another."""

    async def reused(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
        if context.trace_request_ctx is not None:
            context.trace_request_ctx["reused"] = True

    tracer = aiohttp.TraceConfig()
    tracer.on_connection_reuseconn.append(reused)
    return tracer


async def _http_error(response: aiohttp.ClientResponse) -> str:
    raw = (await response.content.read(64 * 1024)).decode("utf-8", "replace")
    try:
        message = error_message(json.loads(raw))
    except json.JSONDecodeError:
        message = raw[:500]
    return f"HTTP {response.status}: {message}".rstrip(": ")


def _sentence(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return f"timed out ({type(error).__name__})"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


async def served_models(url: str, api_key: str | None = None, timeout: float = 10.0) -> list[str]:
    """Names under /v1/models. LLMToolError if the server cannot be reached or answers something else."""
    headers = authorization(api_key)
    address = base_url(url) + "/v1/models"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout), headers=headers) as session,
            session.get(address) as response,
        ):
            if response.status != 200:
                raise LLMToolError(
                    f"{address} answers {await _http_error(response)}.", "Check --url and --api-key."
                )
            models = json.loads(await response.text())
            return [str(model["id"]) for model in models["data"]]
    except (TimeoutError, aiohttp.ClientError, OSError) as e:
        raise LLMToolError(
            f"No server answers at {url}: {_sentence(e)}.", "Start one, or check --url."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise LLMToolError(
            f"{address} is no list of models.", "Is --url an OpenAI-compatible server?"
        ) from None
