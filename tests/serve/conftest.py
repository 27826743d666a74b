"""An application over the fake engine, and a client that talks to it in process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from llmtool.config import ServerConfig
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.app import create_app
from tests.serve.fake import FakeEngine, Script, tiny_tokenizer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def says(text: str, *more: str, end: bool = True) -> Script:
    """A script: answer i says the i-th text, then ends."""
    texts = (text, *more)

    def script(prompt: list[int], params: Any, index: int) -> list[int]:
        tokens = tiny_tokenizer().encode(texts[index % len(texts)])
        return [*tokens, 2] if end else tokens

    return script


class Client:
    """httpx against the application, with shorthands for the two generation routes."""

    def __init__(self, app: FastAPI, engine: FakeEngine, http: httpx.AsyncClient) -> None:
        self.app, self.engine, self.http = app, engine, http

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **kwargs)

    async def ok(self, path: str, **body: Any) -> Any:
        response = await self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    async def complete(self, prompt: Any = "Hello world", **body: Any) -> Any:
        return await self.ok("/v1/completions", prompt=prompt, **body)

    async def chat(self, content: Any = "Hello", **body: Any) -> Any:
        messages = body.pop("messages", [{"role": "user", "content": content}])
        return await self.ok("/v1/chat/completions", messages=messages, **body)

    async def refused(self, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        """The error of a request that must fail with `status`, its envelope checked."""
        response = await self.post(path, body)
        assert response.status_code == status, response.text
        return error_of(response)

    async def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which must end with [DONE]."""
        response = await self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse_events(response.text)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in body["error"]["message"]
    return body["error"]


def parse_events(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n\n")
    lines = text.split("\n\n")[:-1]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


Connect = Callable[..., Any]


@pytest.fixture
def connect() -> Connect:
    """`async with connect(script, engine settings...) as client`."""

    @asynccontextmanager
    async def connected(
        script: Script | None = None,
        *,
        config: ServerConfig | None = None,
        tokenizer: Tokenizer | None = None,
        headers: dict[str, str] | None = None,
        **settings: Any,
    ) -> AsyncIterator[Client]:
        engine = FakeEngine(script or says("The quick brown fox"), **settings)
        app = create_app(engine, tokenizer or tiny_tokenizer(), config or ServerConfig())
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as http:
            yield Client(app, engine, http)

    return connected
