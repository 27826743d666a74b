"""Every failure reaches the `openai` client as the exception its users catch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.acceptance.servers import ONE_THREAD, RunningServer, openai_client, serving

ASK: Any = [{"role": "user", "content": "Hi"}]
KEY = "sk-secret"


@pytest.fixture(scope="module")
def strict(logs: Path) -> Iterator[RunningServer]:
    """One request at a time, one more may wait, and all need a key."""
    flags = ["--api-key", KEY, "--max-num-seqs", "1", "--max-waiting", "1", "--max-model-len", "512"]
    with serving(logs / "strict.log", *flags, "--max-body", "100kB", *ONE_THREAD) as running:
        yield running


def test_an_unknown_model(client: openai.OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-nothing", messages=ASK)
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    assert server.model in caught.value.message


def test_an_unknown_path(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError):
        openai_client(server).moderations.create(model=server.model, input="x")


def test_a_decoder_has_no_embeddings(client: openai.OpenAI, server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=server.model, input="x")
    assert "generates text" in caught.value.message


def test_what_can_never_fit(client: openai.OpenAI, server: RunningServer) -> None:
    def refusal(**request: Any) -> str:
        with pytest.raises(openai.BadRequestError) as caught:
            if "prompt" in request:
                client.completions.create(model=server.model, **request)
            else:
                client.chat.completions.create(model=server.model, **request)
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.type == "invalid_request_error"
        assert "8192" in caught.value.message
        return caught.value.message

    assert "9000" in refusal(prompt=[5] * 9000)
    assert "90" in refusal(messages=[{"role": "user", "content": "word " * 9000}])  # 9000 and the template's
    assert "8189" in refusal(prompt=[5, 6, 7], max_tokens=8190)
    assert refusal(prompt=[5, 6, 7], max_tokens=8190, stream=True)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"n": 100_000}, "n"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "nonsense"}},
                }
            },
            "response_format",
        ),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ],
)
def test_bad_fields_are_named(
    client: openai.OpenAI, server: RunningServer, wrong: dict[str, Any], param: str
) -> None:
    request: Any = {"model": server.model, "messages": ASK, "max_tokens": 4} | wrong
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**request)
    assert caught.value.param == param, caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert "Traceback" not in caught.value.message and "pydantic" not in caught.value.message


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": 5}', 400),
        (b"", 400),
    ],
)
def test_bodies_that_are_no_request(server: RunningServer, body: bytes, status: int) -> None:
    answer = httpx.post(
        f"{server.api}/completions", content=body, headers={"Content-Type": "application/json"}, timeout=30
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["message"] and "Traceback" not in answer.text and error["type"] == "invalid_request_error"


@pytest.mark.parametrize("key", ["none", "sk-secre", "sk-secret2", "sk-s\u00e9cret"])
def test_a_wrong_key(strict: RunningServer, key: str) -> None:
    if not key.isascii():
        answer = httpx.get(f"{strict.api}/models", headers=[(b"Authorization", f"Bearer {key}".encode())])
        assert answer.status_code == 401
        return
    with pytest.raises(openai.AuthenticationError) as caught:
        openai_client(strict, key).models.list()
    assert caught.value.code == "invalid_api_key"


def test_probes_need_no_key(strict: RunningServer) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert httpx.get(strict.url + path).status_code == 200
    assert httpx.get(f"{strict.api}/models").status_code == 401


def test_a_body_beyond_the_limit(strict: RunningServer) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        openai_client(strict, KEY).completions.create(model=strict.model, prompt="x" * 200_000)
    assert caught.value.status_code == 413 and "100000 bytes" in caught.value.message


def test_a_full_queue_says_when_to_come_back(strict: RunningServer) -> None:
    client = openai_client(strict, KEY)
    full = threading.Barrier(6)

    def ask(number: int) -> openai.types.Completion | openai.RateLimitError:
        full.wait()
        try:
            return client.completions.create(
                model=strict.model, prompt=f"{number}", max_tokens=60, extra_body={"ignore_eos": True}
            )
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    served = [answer for answer in answers if not isinstance(answer, openai.RateLimitError)]
    assert 1 <= len(served) <= 3 and refused  # one runs, one waits; a third may find the queue free again
    for error in refused:
        assert error.type == "rate_limit_error"
        assert int(error.response.headers["retry-after"]) >= 1
    strict.wait_until_idle()


def test_the_clients_own_retries_get_through(strict: RunningServer) -> None:
    client = openai_client(strict, KEY, max_retries=30)

    def ask(number: int) -> int:
        answer = client.completions.create(
            model=strict.model, prompt=f"{number}", max_tokens=10, extra_body={"ignore_eos": True}
        )
        return answer.usage.completion_tokens if answer.usage else 0

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(6))) == [10] * 6
