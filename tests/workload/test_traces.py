from __future__ import annotations

import csv
import json
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest

from llmtool.errors import UsageError
from llmtool.workload.requests import TokenSource
from llmtool.workload.traces import MOONCAKE_BLOCK, TraceRow, read_trace, trace_requests
from tests.workload.fake import ByteTokenizer, data_file

SOURCE = TokenSource(ByteTokenizer())
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Request tokens,Response tokens\n"
MOONCAKE = '{"timestamp": 0, "input_length": 5, "output_length": 1'


def test_azure_on_the_real_file() -> None:
    path = data_file("traces", "AzureLLMInferenceTrace_conv.csv")
    rows = read_trace("azure", path)
    with path.open(encoding="utf-8") as f:
        raw = list(csv.DictReader(f))
    assert len(rows) == len(raw) == 19_366
    assert sum(r.input_len for r in rows) == sum(int(r["ContextTokens"]) for r in raw)
    assert sum(r.output_len for r in rows) == sum(int(r["GeneratedTokens"]) for r in raw)
    # The standard library, cut to the six digits it keeps, as the oracle of the time stamps.
    moments = [datetime.fromisoformat(r["TIMESTAMP"][:26]) for r in raw]
    for i in (0, 1, 777, -1):
        assert rows[i].arrival == pytest.approx((moments[i] - moments[0]).total_seconds(), abs=2e-6)
    assert read_trace("azure", path, limit=10) == rows[:10]


def test_azure_prompts_have_the_recorded_lengths() -> None:
    rows = read_trace("azure", data_file("traces", "AzureLLMInferenceTrace_conv.csv"), limit=30)
    requests = trace_requests(rows, SOURCE, seed=3)
    assert [(r.prompt_len, len(r.token_ids or ()), r.max_tokens, r.arrival) for r in requests] == [
        (row.input_len, row.input_len, row.output_len, row.arrival) for row in rows
    ]
    assert requests == trace_requests(rows, SOURCE, seed=3)
    assert requests != trace_requests(rows, SOURCE, seed=4)


def test_time_stamps_with_an_offset_or_without_a_fraction(tmp_path: Path) -> None:
    """The 2024 traces write an offset; the seventh digit of a second is kept."""
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:01.5000003+00:00,5,6\n"
        "2024-05-10 00:00:01+00:00,7,8\n"
        "2024-05-10 02:00:02+02:00,9,10\n"
    )
    rows = read_trace("azure", path)
    assert [r.input_len for r in rows] == [7, 5, 9]  # sorted by time
    assert [r.arrival for r in rows] == pytest.approx([0.0, 0.5000003, 1.0], abs=5e-7)


def test_burstgpt_leaves_failed_calls_out(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45,ChatGPT,1087,0,1087,API log\n"
        "118,GPT-4,417,276,693,Conversation log\n"
    )
    assert read_trace("burstgpt", path) == [TraceRow(0.0, 472, 18), TraceRow(113.0, 417, 276)]


def test_lengths_are_untimed_unless_they_have_arrivals(tmp_path: Path) -> None:
    rows = read_trace("lengths", data_file("traces", "vidur_arxiv_summarization_lengths.csv"))
    assert len(rows) == 28_257
    assert rows[0] == TraceRow(None, 3772, 54)
    path = tmp_path / "v.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n2.0,10,20\n3.5,11,21\n")
    assert read_trace("lengths", path) == [TraceRow(0.0, 10, 20), TraceRow(1.5, 11, 21)]


def test_mooncake_on_the_real_file() -> None:
    rows = read_trace("mooncake", data_file("traces", "mooncake_synthetic_trace.jsonl"))
    assert len(rows) == 3_993
    assert rows[-1].arrival == pytest.approx(1022.025)
    assert sum(r.input_len for r in rows) / len(rows) == pytest.approx(15_325, abs=1)


@pytest.mark.parametrize("block_size", [16, MOONCAKE_BLOCK])
def test_mooncake_prompts_share_exactly_the_prefixes_of_their_hash_ids(block_size: int) -> None:
    rows = read_trace("mooncake", data_file("traces", "mooncake_synthetic_trace.jsonl"))
    uses = Counter(row.hash_ids[0] for row in rows)
    rows = [row for row in rows if len(row.hash_ids) < 40 and uses[row.hash_ids[0]] > 2][:60]
    requests = trace_requests(rows, SOURCE, seed=0, block_size=block_size)
    for row, request in zip(rows, requests, strict=True):
        assert len(request.token_ids or ()) == max(1, round(row.input_len * block_size / MOONCAKE_BLOCK))
        if block_size == MOONCAKE_BLOCK:
            assert len(request.token_ids or ()) == row.input_len
    shared_somewhere = 0
    for i, (a, x) in enumerate(zip(rows, requests, strict=True)):
        for b, y in zip(rows[:i], requests[:i], strict=True):
            blocks = 0
            while blocks < min(len(a.hash_ids), len(b.hash_ids)) and a.hash_ids[blocks] == b.hash_ids[blocks]:
                blocks += 1
            tokens = 0
            left, right = x.token_ids or (), y.token_ids or ()
            while tokens < min(len(left), len(right)) and left[tokens] == right[tokens]:
                tokens += 1
            # All full shared blocks and hardly a token more: the next blocks differ by chance of 1/254 a token.
            shared = min(blocks * block_size, len(left), len(right))
            assert shared <= tokens <= shared + 3
            shared_somewhere += blocks > 0
    assert shared_somewhere > 10


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("azure", "", "line 1: expected a header row"),
        ("azure", "TIMESTAMP,ContextTokens\nx,1\n", "line 1: expected the columns"),
        ("azure", AZURE + "yesterday,1,1\n", "line 2: expected 'TIMESTAMP'"),
        ("azure", AZURE + "2023-11-16 18:15:46,0,1\n", "line 2: expected 'ContextTokens'"),
        ("azure", AZURE + "2023-11-16 18:15:46,5\n", "line 2: expected 3 columns"),
        ("azure", AZURE, "no usable request"),
        ("burstgpt", BURSTGPT + "1,2.5,3\n", "line 2: expected 'Request tokens' to be a whole"),
        ("mooncake", MOONCAKE.replace("output", "other") + "}", "line 1: expected 'output_length'"),
        ("mooncake", MOONCAKE + ', "hash_ids": [1, 2]}', "line 1: expected 1 hash_ids"),
        ("mooncake", MOONCAKE + ', "hash_ids": "1"}', "line 1: expected 'hash_ids'"),
        ("mooncake", MOONCAKE.replace("0", "-1") + "}", "line 1: expected 'timestamp'"),
    ],
)
def test_bad_traces_say_where_and_what(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_trace(name, path)
    assert message in str(error.value)


def test_unknown_format_and_tiny_blocks() -> None:
    with pytest.raises(UsageError, match="azure, burstgpt"):
        read_trace("other", "x")
    with pytest.raises(UsageError, match="block size"):
        trace_requests([], SOURCE, 0, block_size=1)


def test_mooncake_rows_need_no_hash_ids(tmp_path: Path) -> None:

    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"timestamp": 1500, "input_length": 700, "output_length": 3}) + "\n")
    assert read_trace("mooncake", path) == [TraceRow(0.0, 700, 3)]
