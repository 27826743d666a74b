from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtool.errors import UsageError
from llmtool.workload.datasets import (
    COPY_ASK,
    copy_requests,
    custom_requests,
    prefix_requests,
    random_requests,
    sharegpt_requests,
)
from llmtool.workload.requests import BenchRequest, TokenSource
from tests.workload.fake import ByteTokenizer, data_file

SOURCE = TokenSource(ByteTokenizer())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n", encoding="utf-8"
    )
    return path


def test_random_lengths_are_exact_and_avoid_special_tokens() -> None:
    requests = random_requests(50, SOURCE, rng(), input_len=64, output_len=32)
    assert {len(r.token_ids or ()) for r in requests} == {64}
    assert {r.prompt_len for r in requests} == {64}
    assert {r.max_tokens for r in requests} == {32}
    used = {t for r in requests for t in r.token_ids or ()}
    assert used <= set(range(1, 255))  # 0 and 255 are special
    assert len(used) > 200


def test_random_range_ratio_spans_the_interval_and_prefix_is_shared() -> None:
    requests = random_requests(800, SOURCE, rng(), input_len=10, output_len=20, range_ratio=0.5, prefix_len=7)
    assert {(r.prompt_len or 0) - 7 for r in requests} == set(range(5, 16))
    assert {r.max_tokens for r in requests} == set(range(10, 31))
    assert len({(r.token_ids or ())[:7] for r in requests}) == 1


def test_same_seed_same_requests() -> None:
    def made(seed: int) -> list[BenchRequest]:
        return random_requests(5, SOURCE, rng(seed), input_len=16, range_ratio=0.3)

    assert made(1) == made(1) != made(2)


@pytest.mark.parametrize(
    "bad", [{"range_ratio": 1.0}, {"range_ratio": -0.1}, {"input_len": 0}, {"prefix_len": -1}]
)
def test_random_refuses_bad_lengths(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        random_requests(2, SOURCE, rng(), **bad)


def test_prefixes_are_used_equally_often_and_suffixes_differ() -> None:
    requests = prefix_requests(40, SOURCE, rng(), prefix_len=30, suffix_len=20, num_prefixes=4)
    counts = Counter((r.token_ids or ())[:30] for r in requests)
    assert sorted(counts.values()) == [10, 10, 10, 10]
    assert len({r.token_ids for r in requests}) > 36
    assert all(r.prompt_len == 50 for r in requests)


def test_copy_prompts_hold_real_english_to_repeat() -> None:
    (request,) = copy_requests(1, SOURCE, rng(), passage_len=120)
    assert request.messages is not None
    text = str(request.messages[0]["content"])
    assert text.startswith(COPY_ASK)
    assert len(text) - len(COPY_ASK) == 120
    import pydoc_data.topics

    words = text[len(COPY_ASK) :].split()[1:-1]
    english = " ".join(pydoc_data.topics.topics.values())
    assert words
    assert all(word in english for word in words)


def test_a_passage_longer_than_the_text_wraps() -> None:
    n = len(SOURCE.english) * 2 + 5
    ids = SOURCE.passage(n, rng())
    assert len(ids) == n
    assert ids[: len(SOURCE.english)] == ids[len(SOURCE.english) : 2 * len(SOURCE.english)]


def test_as_chat_and_as_text() -> None:
    request = BenchRequest(token_ids=(72, 105), prompt_len=2, max_tokens=3)
    assert request.as_text(ByteTokenizer()).text == "Hi"
    chat = request.as_chat(ByteTokenizer())
    assert chat.messages == ({"role": "user", "content": "Hi"},)
    assert chat.prompt_len is None
    with pytest.raises(UsageError, match="tokenizer"):
        request.as_chat(None)


def test_sharegpt_on_the_real_sample() -> None:
    path = data_file("prompts", "fastchat_dummy_sharegpt_format.json")
    requests = sharegpt_requests(path, 100, rng(), ByteTokenizer())
    document = json.loads(path.read_text(encoding="utf-8"))
    answers = {
        (c["conversations"][0]["value"], len(c["conversations"][1]["value"].encode())) for c in document
    }
    assert len(requests) == 100
    assert {(r.text, r.max_tokens) for r in requests} <= answers
    assert all(r.prompt_len == len((r.text or "").encode()) for r in requests)
    untokenized = sharegpt_requests(path, 700, rng(), None, output_len=9)
    assert len(untokenized) == 700  # more than the file holds: repeated
    assert {r.max_tokens for r in untokenized} == {9}
    with pytest.raises(UsageError, match="output-len"):
        sharegpt_requests(path, 5, rng(), None)


def test_sharegpt_filters_and_bad_files(tmp_path: Path) -> None:
    def conversation(question: str, answer: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}

    path = tmp_path / "s.json"
    kept = conversation("a question", "an answer")
    long = conversation("q" * 1025, "an answer")
    path.write_text(
        json.dumps([kept, long, conversation("hm", "an answer"), conversation("a question", "no")])
    )
    assert {r.text for r in sharegpt_requests(path, 5, rng(), ByteTokenizer())} == {"a question"}
    path.write_text(json.dumps([long]))
    with pytest.raises(UsageError, match="no usable conversation"):
        sharegpt_requests(path, 5, rng(), ByteTokenizer())
    path.write_text('[{"conversations": [\n{"from": "human"}\n]}]')
    with pytest.raises(UsageError, match="conversation 0"):
        sharegpt_requests(path, 5, rng(), ByteTokenizer())
    path.write_text("[\n{,\n]")
    with pytest.raises(UsageError, match="line 2"):
        sharegpt_requests(path, 5, rng(), ByteTokenizer())


def test_custom_forms(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "c.jsonl",
        {"prompt": "hello", "output_len": 5, "extra": {"top_k": 3}},
        "",
        {"prompt": [1, 2, 3], "max_tokens": 6},
        {"messages": [{"role": "user", "content": "hi"}]},
    )
    text, ids, chat = custom_requests(path, 3, rng(), ByteTokenizer(), shuffle=False)
    assert (text.text, text.max_tokens, text.prompt_len, text.extra) == ("hello", 5, 5, {"top_k": 3})
    assert (ids.token_ids, ids.max_tokens) == ((1, 2, 3), 6)
    assert chat.messages == ({"role": "user", "content": "hi"},)
    assert chat.max_tokens == 128
    assert {r.max_tokens for r in custom_requests(path, 3, rng(), output_len=7)} == {7}
    many = custom_requests(path, 10, rng())
    assert Counter(r.max_tokens for r in many).keys() == {5, 6, 128}
    assert len(many) == 10


def test_custom_with_timestamps_keeps_order_and_is_not_repeated(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "c.jsonl", {"prompt": "b", "timestamp": 2.5}, {"prompt": "a", "timestamp": 1}
    )
    assert [(r.text, r.arrival) for r in custom_requests(path, 10, rng())] == [("a", 1), ("b", 2.5)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: expected one JSON object"),
        ("[]", "line 2: expected one JSON object, not list"),
        ({"text": "x"}, "line 2: expected 'prompt'"),
        ({"prompt": ""}, "line 2: expected 'prompt'"),
        ({"prompt": [1, -2]}, "line 2: expected 'prompt'"),
        ({"prompt": [True]}, "line 2: expected 'prompt'"),
        ({"prompt": "x", "max_tokens": 0}, "line 2: expected 'max_tokens' to be a number of at least 1"),
        ({"prompt": "x", "max_tokens": 1.5}, "line 2: expected 'max_tokens' to be a whole number"),
        ({"prompt": "x", "max_tokens": True}, "line 2: expected 'max_tokens' to be a number"),
        ({"prompt": "x", "extra": 3}, "line 2: expected 'extra'"),
        ({"prompt": "x", "timestamp": -1}, "line 2: expected 'timestamp'"),
    ],
)
def test_bad_custom_rows_name_the_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write_lines(tmp_path / "c.jsonl", {"prompt": "fine"}, row)
    with pytest.raises(UsageError) as error:
        custom_requests(path, 2, rng())
    assert message in str(error.value)


def test_missing_empty_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot open"):
        custom_requests(tmp_path / "none.jsonl", 1, rng())
    with pytest.raises(UsageError, match="Cannot open"):
        custom_requests(tmp_path, 1, rng())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match="no request"):
        custom_requests(tmp_path / "empty.jsonl", 1, rng())
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="not readable text"):
        custom_requests(tmp_path / "binary.jsonl", 1, rng())
    (tmp_path / "fake.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(UsageError, match="not readable text"):
        custom_requests(tmp_path / "fake.jsonl.gz", 1, rng())


def test_custom_reads_a_real_gzipped_file() -> None:
    """HumanEval has 'prompt' in every row, gzipped."""
    requests = custom_requests(data_file("prompts", "HumanEval.jsonl.gz"), 164, rng())
    assert len({r.text for r in requests}) == 164
    assert all("def " in (r.text or "") for r in requests)
