"""Any request the OpenAPI document allows, and many it does not: never a 5xx, always the documented shape."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from llmtool.config import ServerConfig
from llmtool.runtime.parts import PoolingInfo
from llmtool.serve.app import create_app
from llmtool.serve.server import bind, serve
from tests.serve.conftest import says
from tests.serve.fake import FakeEngine, Info, tiny_tokenizer

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)


ENCODER_PATHS = ("/v1/embeddings", "/v1/classify", "/v1/score", "/v1/rerank")
POOLING = PoolingInfo("embed", 4, matryoshka=True)


@contextmanager
def serving(make: Callable[[], FakeEngine]) -> Iterator[str]:
    """A live server in a thread of its own: its URL."""
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    handles: dict[str, object] = {}

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        handles["stop"] = lambda: loop.call_soon_threadsafe(stop.set)
        await serve(
            make(),
            tiny_tokenizer(),
            ServerConfig(),
            listener,
            on_listening=lambda host, port: ready.set(),
            handle_signals=False,
            stop=stop,
        )

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    handles["stop"]()  # type: ignore[operator]
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """A server of a decoder, one of an encoder."""
    with (
        serving(lambda: FakeEngine(says("The quick brown fox", "jumps"))) as decoder,
        serving(lambda: FakeEngine(says(""), info=Info(pooling=POOLING))) as encoder,
    ):
        yield decoder, encoder


def _document() -> dict[str, object]:
    async def build() -> dict[str, object]:
        return create_app(FakeEngine(says("x")), tiny_tokenizer(), ServerConfig()).openapi()

    return asyncio.run(build())


schema = schemathesis.openapi.from_dict(_document())


@schema.parametrize()
@settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_request_breaks_the_server(case: schemathesis.Case, urls: tuple[str, str]) -> None:
    case.call_and_validate(base_url=urls[case.path in ENCODER_PATHS], checks=CHECKS, timeout=20)


def test_the_document_describes_bodies_and_errors() -> None:
    document = _document()
    paths = document["paths"]
    assert isinstance(paths, dict)
    for path in ("/v1/completions", "/v1/chat/completions", *ENCODER_PATHS):
        post = paths[path]["post"]
        assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("Request")
        assert {"200", "400", "401", "404", "413", "429", "503"} <= set(post["responses"])
        for status, response in post["responses"].items():
            if status != "200":
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse"), (
                    status
                )
