"""A mock OpenAI server with known latencies and known faults, to test a bench client (ours or any other).

In a loop: `async with MockServer(MockOptions(ttft=0.05)) as server: ... server.url`. As a process, so that it has a
core of its own: `python -m llmtool.bench.mock --port 8001 --ttft 0.05 --itl 0.02`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import deque
from dataclasses import dataclass, fields, replace
from typing import Any

from aiohttp import web

FAULTS = (
    "none",
    "status",
    "garbage",
    "drop",
    "error_event",
    "no_usage",
    "no_done",
    "hang",
    "not_sse",
    "empty",
)


@dataclass(frozen=True, slots=True)
class MockOptions:
    """ttft, itl: seconds until the first chunk and between chunks. tokens_per_chunk: as speculation would send.

    fault: what goes wrong, for every `fault_every`-th request (status: HTTP 503; garbage: an event that is not
    JSON; drop: the connection closes after two chunks; hang: nothing more comes). max_running: requests that
    generate at once, the others queue as in a real server (0: all). stop_after: tokens after which it stops on its
    own, whatever was asked for (0: never). cached_share: of the prompt, reported as cached; with remembers, of
    prompts seen before only.
    """

    model: str = "mock"
    ttft: float = 0.01
    itl: float = 0.005
    tokens_per_chunk: int = 1
    fault: str = "none"
    fault_every: int = 1
    max_running: int = 0
    stop_after: int = 0
    cached_share: float = 0.0
    remembers: bool = False
    api_key: str = ""

    def __post_init__(self) -> None:
        assert self.fault in FAULTS


class MockServer:
    """`requests` holds the bodies of the last thousand requests; `aborted` counts clients that went away."""

    def __init__(self, options: MockOptions | None = None) -> None:
        self.options = options or MockOptions()
        self.requests: deque[dict[str, Any]] = deque(maxlen=1000)
        self.count = self.aborted = self.generated = 0
        self._slots = asyncio.Semaphore(self.options.max_running or sys.maxsize)
        self._runner: web.AppRunner | None = None
        self._seen: set[str] = set()
        self.url = ""

    async def __aenter__(self) -> MockServer:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=4096)
        await site.start()
        bound = self._runner.addresses[0][1]
        self.url = f"http://{host}:{bound}"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": self.options.model, "object": "model"}]})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(
            text=f'vllm:generation_tokens_total{{model_name="mock"}} {float(self.generated)}\n'
        )

    async def _tokenize(self, request: web.Request) -> web.Response:
        tokens = list((await request.json())["prompt"].encode())
        return web.json_response({"tokens": tokens, "count": len(tokens), "max_model_len": 1 << 20})

    async def _detokenize(self, request: web.Request) -> web.Response:
        ids = (await request.json())["tokens"]
        return web.json_response({"prompt": bytes(i % 256 for i in ids).decode("latin-1")})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = body["prompt"]
        return await self._answer(
            request, body, len(prompt if isinstance(prompt, list) else prompt.split()), False
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        words = sum(len(str(m.get("content", "")).split()) for m in body["messages"])
        return await self._answer(request, body, words, True)

    async def _answer(
        self, request: web.Request, body: dict[str, Any], prompt_tokens: int, chat: bool
    ) -> web.StreamResponse:
        options = self.options
        self.count += 1
        self.requests.append(body)
        if options.api_key and request.headers.get("Authorization") != f"Bearer {options.api_key}":
            return _error(401, "wrong API key")
        fault = options.fault if self.count % options.fault_every == 0 else "none"
        if fault == "status":
            return _error(503, "the mock was told to fail")
        if fault == "not_sse":
            return web.json_response({"choices": [{"text": "all at once"}]})
        prompt = str(body.get("messages" if chat else "prompt"))
        known = prompt in self._seen or not options.remembers
        self._seen.add(prompt)
        cached = int(prompt_tokens * options.cached_share) if known else 0
        answer = _Answer(request, options, body, prompt_tokens, cached, chat, fault)
        try:
            async with self._slots:
                await answer.stream()
        except (ConnectionError, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self.generated += answer.sent
        return answer.response


class _Answer:
    """One streamed answer, chunk by chunk at the moments the options ask for."""

    def __init__(
        self,
        request: web.Request,
        options: MockOptions,
        body: dict[str, Any],
        prompt_tokens: int,
        cached_tokens: int,
        chat: bool,
        fault: str,
    ) -> None:
        self._request, self._options, self._body = request, options, body
        self._prompt_tokens, self._cached_tokens = prompt_tokens, cached_tokens
        self._chat, self._fault = chat, fault
        wanted = int(body.get("max_tokens") or 16)
        self._tokens = min(wanted, options.stop_after or wanted)
        self._reason = "stop" if self._tokens < wanted else "length"
        self.sent = 0
        self.response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})

    async def stream(self) -> None:
        options = self._options
        # From here, not from the arrival of the bytes: waiting for a slot must show up as TTFT.
        due = time.perf_counter() + options.ttft
        await self.response.prepare(self._request)
        if self._chat:
            await self._send({"delta": {"role": "assistant", "content": ""}})
        chunk = _event(self._object({"delta": {"content": "tok "}} if self._chat else {"text": "tok "}))
        chunks = 0
        while self.sent < self._tokens and self._fault != "empty":
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            due += options.itl
            if chunks == 2 and await self._break():
                return
            await self.response.write(chunk)
            chunks += 1
            self.sent += min(options.tokens_per_chunk, self._tokens - self.sent)
        await self._end()

    async def _break(self) -> bool:
        """Whatever goes wrong after two chunks; True when the stream is over."""
        if self._fault == "garbage":
            await self.response.write(b'data: {"choices": [{"text": oops\n\n')
        elif self._fault == "error_event":
            await self.response.write(_event({"error": {"message": "the engine died", "code": 500}}))
            await self.response.write(b"data: [DONE]\n\n")
        elif self._fault == "drop":
            if self._request.transport is not None:
                self._request.transport.abort()
        elif self._fault == "hang":
            await asyncio.sleep(3600)
        else:
            return False
        return True

    async def _end(self) -> None:
        if self._fault not in ("no_done", "empty"):
            last: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
            await self._send(last | {"finish_reason": self._reason})
            if self._fault != "no_usage" and (self._body.get("stream_options") or {}).get("include_usage"):
                await self.response.write(_event(self._object(None) | {"usage": self._usage()}))
            await self.response.write(b"data: [DONE]\n\n")
        await self.response.write_eof()

    def _usage(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self.sent,
            "total_tokens": self._prompt_tokens + self.sent,
        }
        if self._options.cached_share:
            usage["prompt_tokens_details"] = {"cached_tokens": self._cached_tokens}
        return usage

    async def _send(self, choice: dict[str, Any]) -> None:
        await self.response.write(_event(self._object(choice)))

    def _object(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        choices = (
            [{"index": 0, "logprobs": None, "finish_reason": None} | choice] if choice is not None else []
        )
        return {
            "id": "mock-1",
            "object": kind,
            "created": 0,
            "model": self._options.model,
            "choices": choices,
        }


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _error(status: int, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "mock_error", "param": None, "code": status}}
    return web.json_response(body, status=status)


async def _serve(options: MockOptions, port: int) -> None:
    server = MockServer(options)
    await server.start(port=port)
    sys.stdout.write(server.url + "\n")
    sys.stdout.flush()
    await asyncio.Event().wait()  # until it is interrupted or terminated


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m llmtool.bench.mock", description=MockServer.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one; the URL goes to stdout")
    defaults = MockOptions()
    for option in fields(MockOptions):
        value = getattr(defaults, option.name)
        choices = FAULTS if option.name == "fault" else None
        parser.add_argument(
            f"--{option.name.replace('_', '-')}", type=type(value), default=value, choices=choices
        )
    given = vars(parser.parse_args(argv))
    port = given.pop("port")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(replace(defaults, **given), port))


if __name__ == "__main__":
    main()
