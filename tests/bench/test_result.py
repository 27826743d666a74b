from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmtool.bench.counters import growth, read_counters
from llmtool.bench.environment import hardware, versions
from llmtool.bench.result import cautions, read_result
from llmtool.errors import LLMToolError, UsageError
from llmtool.workload.metrics import RequestRecord
from tests.bench.made import made_records, made_result, made_run


def test_written_and_read_again_is_the_same(tmp_path: Path) -> None:
    result = made_result(
        made_run(made_records(1, n=20), 2.0), made_run(made_records(2, n=20), 4.0), knee={"request_rate": 2.0}
    )
    result.write(tmp_path / "r.json")
    assert read_result(tmp_path / "r.json").as_dict() == result.as_dict()
    single = made_result(made_run(made_records(1, n=20)))
    single.write(tmp_path / "s.json")
    assert read_result(tmp_path / "s.json").as_dict() == single.as_dict()


def test_records_survive_the_file(tmp_path: Path) -> None:
    records = made_records(3, n=15)
    records[4].success, records[4].error = False, "HTTP 500"
    run = made_run(records)
    first = min(r.start for r in records)
    for before, after in zip(records, run.records(), strict=True):
        assert after.start == pytest.approx(before.start - first)
        assert (after.ttft, after.itls, after.e2e) == (before.ttft, before.itls, before.e2e)
        assert (after.success, after.error) == (before.success, before.error)


def test_a_vllm_result_file_is_read(tmp_path: Path) -> None:
    """Without start times and end-to-end times: vLLM's own keys are enough."""
    data: dict[str, Any] = {
        "date": "20250101-000000",
        "backend": "vllm",
        "model_id": "meta-llama/Llama-3-8B",
        "request_rate": "inf",
        "duration": 2.0,
        "completed": 2,
        "failed": 0,
        "total_input_tokens": 30,
        "total_output_tokens": 5,
        "request_throughput": 1.0,
        "request_goodput": None,
        "output_throughput": 2.5,
        "total_token_throughput": 17.5,
        "input_lens": [10, 20],
        "output_lens": [3, 2],
        "ttfts": [0.1, 0.2],
        "itls": [[0.1, 0.2], [0.5]],
        "generated_texts": ["a", "b"],
        "errors": ["", ""],
        "mean_ttft_ms": 150.0,
    }
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps(data))
    run = read_result(path).runs[0]
    first, second = run.records()
    assert (first.e2e, second.e2e) == pytest.approx((0.4, 0.7))
    assert (first.success, first.tpot) == (True, pytest.approx(0.15))
    assert run.generated_texts == ("a", "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[1]", "no bench result but a JSON list"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1, "kind": "party"}', "kind is 'party'"),
        ('{"schema_version": 1, "kind": "sweep", "runs": []}', "no bench result"),
        ('{"schema_version": 1, "kind": "sweep", "runs": [3]}', "duration"),
        ('{"duration": 1}', "completed"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError) as error:
        read_result(path)
    assert message in str(error.value)


def test_missing_and_unwritable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Cannot read"):
        read_result(tmp_path / "none.json")
    with pytest.raises(LLMToolError, match="Cannot write"):
        made_result(made_run(made_records(1, n=6))).write(tmp_path / "none" / "r.json")


def test_lists_of_different_lengths_are_no_result(tmp_path: Path) -> None:
    document = made_result(made_run(made_records(1, n=6))).as_dict()
    document["ttfts"].pop()
    (tmp_path / "r.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="different lengths"):
        read_result(tmp_path / "r.json")


def test_cautions() -> None:
    def record(**fields: Any) -> RequestRecord:
        base: dict[str, Any] = {"success": True, "counted": True, "output_tokens": 8, "max_tokens": 8}
        return RequestRecord(**base | fields)

    assert cautions([record()] * 20) == []
    assert cautions([record()] * 40 + [record(output_tokens=3)]) == []  # one in forty may stop on its own
    assert "mean" not in str(cautions([record(output_tokens=3)]))
    assert "3 tokens on average where 8" in cautions([record(output_tokens=3)] * 2)[0]
    assert (
        "1 of 2 requests failed, the first with: no"
        in cautions([record(), record(success=False, error="no")])[0]
    )


PAGE = """# HELP vllm:spec_decode_num_drafts Number of drafts
# TYPE vllm:spec_decode_num_drafts counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 5.0
vllm:spec_decode_num_draft_tokens_total{model_name="m"} 60.0
vllm:spec_decode_num_accepted_tokens_total{model_name="m"} 1.5e1
vllm:spec_decode_num_accepted_tokens_created{model_name="m"} 1.7e9
vllm:prefix_cache_queries_total{model_name="m"} 1000.0
vllm:prefix_cache_hits_total{model_name="a b}c"} 250.0
vllm:num_requests_running{model_name="m"} 3.0
python_gc_objects_collected_total{generation="0"} 99.0
"""


def test_counters_of_a_prometheus_page() -> None:
    assert read_counters(PAGE) == {
        "spec_decode_num_drafts": 15.0,
        "spec_decode_num_draft_tokens": 60.0,
        "spec_decode_num_accepted_tokens": 15.0,
        "prefix_cache_queries": 1000.0,
        "prefix_cache_hits": 250.0,
    }
    assert read_counters("") == {}


def test_growth_of_counters() -> None:
    after = read_counters(PAGE)
    out = growth(
        {"spec_decode_num_drafts": 5.0, "prefix_cache_queries": 500.0, "prefix_cache_hits": 200.0}, after
    )
    assert out["spec_decode_num_drafts"] == 10
    assert out["spec_decode_acceptance_rate"] == pytest.approx(25.0)
    assert out["spec_decode_acceptance_length"] == pytest.approx(2.5)
    assert out["prefix_cache_hit_rate"] == pytest.approx(0.1)
    assert growth(after, {"prefix_cache_queries": 1.0}) == {}  # restarted meanwhile
    assert growth({}, {}) == {}


def test_environment_names_the_machine() -> None:
    facts = hardware(gpu="H200")
    assert facts["gpu"] == "H200"
    assert facts["cpu"]
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert (facts["memory_bytes"] or 0) > 2**28
    assert versions().keys() >= {"python", "numpy", "aiohttp"}
