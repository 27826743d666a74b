"""The log's level, and its line per request."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest

from llmtool.errors import UsageError
from llmtool.serve.logs import configure_logging
from tests.serve.conftest import Connect, says
from tests.serve.fake import tiny_tokenizer


@pytest.fixture
def level() -> Iterator[logging.Logger]:
    ours = logging.getLogger("llmtool")
    before = ours.level
    yield ours
    ours.setLevel(before)


def test_the_level_is_the_flag_then_the_environment_then_info(
    level: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMTOOL_LOG_LEVEL", raising=False)
    configure_logging(None)
    assert level.level == logging.INFO
    monkeypatch.setenv("LLMTOOL_LOG_LEVEL", "Debug")
    configure_logging(None)
    assert level.level == logging.DEBUG
    configure_logging("error")
    assert level.level == logging.ERROR
    with pytest.raises(UsageError, match="loud"):
        configure_logging("loud")


@pytest.mark.anyio
@pytest.mark.parametrize("stream", [False, True])
async def test_every_request_is_a_line(
    connect: Connect, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO, "llmtool")
    asked, said = "Hello world", "one two three"
    async with connect(says(said)) as client:
        for body in ({"prompt": asked, "max_tokens": 50, "stream": stream}, {"prompt": ""}):
            await client.post("/v1/completions", body, headers={"X-Request-Id": f"r{len(body)}"})
        await client.http.get("/health")
    good, bad = [r.getMessage() for r in caplog.records if r.name == "llmtool.serve.requests"]
    prompt, output = len(tiny_tokenizer().encode(asked)), len(tiny_tokenizer().encode(said)) + 1
    start = f"r3 POST /v1/completions: 200, {prompt} prompt tokens, {output} output tokens, "
    assert re.fullmatch(re.escape(start) + r"\d+\.\d{3} s", good)
    assert bad.startswith("r1 POST /v1/completions: 400, 0 prompt tokens, 0 output tokens, ")
