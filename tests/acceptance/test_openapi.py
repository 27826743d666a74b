"""Schemathesis against the live server and its model: whatever is sent, never a 5xx, always a documented answer."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies

from tests.acceptance.servers import BIN, ONE_THREAD, RunningServer, serving

SECONDS = 45
MESSAGES = [{"role": "user", "content": "Hi"}]
# Short answers, so that what is valid ends soon; small memory, so that preemption and refusals happen, too.
FLAGS = ["--max-model-len", "64", "--max-num-seqs", "16", "--kv-cache-memory", "16MiB", *ONE_THREAD]


@pytest.fixture(scope="module")
def small(logs: Path) -> Iterator[RunningServer]:
    with serving(logs / "openapi.log", *FLAGS) as running:
        yield running
        running.wait_until_idle()


def test_schemathesis_finds_no_fault(small: RunningServer) -> None:
    """Several processes at once, each of one thread: Python 3.11's ast.parse, which hypothesis uses, fails at
    random in threads ("AST constructor recursion depth mismatch").
    """
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    options = f"--max-time {SECONDS} --phases coverage,fuzzing --workers 1 --request-timeout 30"
    options += f" --checks {checks} --continue-on-failure --no-color --generation-database none"
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    [BIN / "st", "run", f"{small.url}/openapi.json", *options.split(), "--seed", str(seed)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for seed in range(1, 4)
        ]
        for process in started:
            stack.callback(process.kill)
        with ThreadPoolExecutor(len(started)) as pool:  # at once, so that none waits for a full pipe
            said = list(pool.map(lambda process: process.communicate(timeout=SECONDS + 120)[0], started))
    total = 0
    for process, output in zip(started, said, strict=True):
        assert process.returncode == 0, output
        count = re.search(r"(\d+) generated, \1 passed", output)
        assert count is not None, output
        total += int(count[1])
    assert total > 200, said
    small.wait_until_idle()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_fields_that_reach_the_engine(small: RunningServer, path: str) -> None:
    """A whole generated body is mostly refused for one reason or another: here a good one gets up to two of its
    fields, and much of that is served.
    """
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    good = {"prompt": "One two"} if path == "/v1/completions" else {"messages": MESSAGES}
    fields = sorted(set(_fields(schema.raw_schema, path)) - {"model", *good})
    assert len(fields) >= 40
    statuses: Counter[int] = Counter()

    @given(
        case=schema[path]["POST"].as_strategy(),
        chosen=strategies.sets(strategies.sampled_from(fields), min_size=1, max_size=2),
    )
    @settings(
        max_examples=150,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case, chosen: set[str]) -> None:
        assert isinstance(case.body, dict)
        generated = {name: case.body[name] for name in chosen if name in case.body}
        response = httpx.post(small.url + path, json={**good, "max_tokens": 4, **generated}, timeout=60)
        assert response.status_code < 500, f"{generated}: {response.text}"
        statuses[response.status_code] += 1

    check()
    assert statuses[404] == 0 and statuses[200] >= 50, statuses


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-50},
        {"temperature": 100, "top_k": 2**31 - 1},
        {"top_p": 5e-324},
        {"min_p": 1, "temperature": 1e-45},
        {"repetition_penalty": 0.01, "frequency_penalty": 2, "presence_penalty": -2, "temperature": 1e-30},
        {"repetition_penalty": 100},
        {"logit_bias": {"5": 100, "6": -100}, "temperature": 1e-38},
        {"seed": -(2**63), "n": 128},
        {"logprobs": 100, "prompt_logprobs": 100, "echo": True},
        {"use_beam_search": True, "best_of": 16, "n": 16, "temperature": 0},
        {"use_beam_search": True, "best_of": 4, "n": 2, "temperature": 0, "length_penalty": 10},
        {"use_beam_search": True, "best_of": 4, "n": 2, "temperature": 0, "length_penalty": -10},
    ],
)
def test_extreme_values_are_served(small: RunningServer, extreme: dict[str, Any]) -> None:
    body = {"prompt": "One two", "max_tokens": 12, **extreme}
    response = httpx.post(f"{small.api}/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert len(choices) == extreme.get("n", 1)
    assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)


def test_a_tiny_temperature_is_greedy(small: RunningServer) -> None:
    def ask(temperature: float, n: int = 1) -> httpx.Response:
        body = {"prompt": "One two", "max_tokens": 6, "temperature": temperature, "n": n}
        return httpx.post(f"{small.api}/completions", json=body, timeout=60)

    tiny = (1e-7, 1e-30, 1e-44, 1e-50, 5e-324)
    assert {ask(t).json()["choices"][0]["text"] for t in (0, *tiny)} == {ask(0).json()["choices"][0]["text"]}
    for temperature in (0, *tiny):  # several greedy answers would be the same: refused, as vLLM does
        refused = ask(temperature, n=2)
        assert refused.status_code == 400 and "greedy" in refused.json()["error"]["message"]


def _fields(document: dict[str, Any], path: str) -> list[str]:
    """Names of the fields of a path's body."""
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return list(document["components"]["schemas"][body["$ref"].rpartition("/")[2]]["properties"])
