from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig
from llmtool.bench.prepare import build_offsets, build_requests, build_warmups
from llmtool.errors import UsageError
from llmtool.workload.requests import BenchRequest
from tests.workload.fake import ByteTokenizer


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (DatasetConfig, {"dataset_name": "imagenet"}),
        (DatasetConfig, {"dataset_name": "sharegpt"}),
        (DatasetConfig, {"num_prompts": 0}),
        (DatasetConfig, {"output_len": 0}),
        (LoadConfig, {"request_rate": 0.0}),
        (LoadConfig, {"request_rate": math.nan}),
        (LoadConfig, {"burstiness": -1.0}),
        (LoadConfig, {"max_concurrency": 0}),
        (LoadConfig, {"ramp_up_start_rps": 1.0}),
        (LoadConfig, {"ramp_up_start_rps": 1.0, "ramp_up_end_rps": 2.0, "request_rate": 3.0}),
        (LoadConfig, {"duration": 0.0}),
        (LoadConfig, {"num_warmups": -1}),
        (LoadConfig, {"request_rates": (1.0, math.inf)}),
        (LoadConfig, {"request_rates": (1.0,), "search_knee": True}),
        (LoadConfig, {"knee_min_rate": 5.0, "knee_max_rate": 5.0}),
        (LoadConfig, {"slo_attainment": 1.5}),
        (BenchConfig, {"endpoint": "audio"}),
        (BenchConfig, {"seed": -1}),
        (BenchConfig, {"temperature": -0.5}),
        (BenchConfig, {"timeout": 0.0}),
        (BenchConfig, {"metric_percentiles": (101.0,)}),
        (BenchConfig, {"load": LoadConfig(search_knee=True)}),
        (BenchConfig, {"load": LoadConfig(search_knee=True), "goodput": ("nonsense",)}),
    ],
)
def test_senseless_settings_are_usage_errors(make: Any, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        make(**given)


def test_body_fields_send_only_what_was_asked_for() -> None:
    assert BenchConfig().body_fields() == {"temperature": 0.0}
    config = BenchConfig(temperature=None, top_k=5, ignore_eos=True, extra_body={"min_p": 0.1, "top_k": 7})
    assert config.body_fields() == {"top_k": 7, "ignore_eos": True, "min_p": 0.1}


def test_the_flat_form_is_json_without_infinities() -> None:
    flat = BenchConfig(load=LoadConfig(burstiness=math.inf)).as_dict()
    assert (flat["request_rate"], flat["burstiness"], flat["num_prompts"]) == ("inf", "inf", 100)
    json.dumps(flat, allow_nan=False)
    assert not {"load", "dataset"} & flat.keys()


def test_warmups_are_other_requests_than_the_runs() -> None:
    config = BenchConfig(dataset=DatasetConfig(num_prompts=20), load=LoadConfig(num_warmups=5))
    warmups = build_warmups(config, ByteTokenizer())
    assert len(warmups) == 5
    assert not {r.token_ids for r in warmups} & {r.token_ids for r in build_requests(config, ByteTokenizer())}
    assert build_warmups(BenchConfig(load=LoadConfig(num_warmups=0)), None) == []


def test_offsets_follow_the_load() -> None:
    timed = [BenchRequest(text="x", arrival=float(i)) for i in range(5)]
    untimed = [BenchRequest(text="x") for _ in range(5)]
    assert build_offsets(LoadConfig(), untimed, 0).tolist() == [0.0] * 5
    assert build_offsets(LoadConfig(trace_speedup=2.0), timed, 0).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0]
    steady = LoadConfig(request_rate=4.0, burstiness=math.inf)
    assert build_offsets(steady, timed, 0).tolist() == [
        0.0,
        0.25,
        0.5,
        0.75,
        1.0,
    ]  # a rate replaces the trace's
    assert build_offsets(steady, untimed, 0, rate=1.0).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    ramp = build_offsets(LoadConfig(ramp_up_start_rps=1.0, ramp_up_end_rps=3.0), untimed, 0)
    assert ramp[-1] == pytest.approx(2.0)
    poisson = LoadConfig(request_rate=4.0)
    assert build_offsets(poisson, untimed, 1).tolist() == build_offsets(poisson, timed, 1).tolist()
    assert build_offsets(poisson, untimed, 1).tolist() != build_offsets(poisson, untimed, 2).tolist()


def test_text_is_tokenized_only_where_its_length_decides_something(tmp_path: Path) -> None:
    class Broken(ByteTokenizer):
        def encode(self, text: str) -> Sequence[int]:
            raise UsageError("no /tokenize here")

    path = tmp_path / "c.jsonl"
    path.write_text('{"prompt": "hello"}\n')
    data = DatasetConfig(dataset_name="custom", dataset_path=str(path), num_prompts=2)
    assert [r.text for r in build_requests(BenchConfig(dataset=data), Broken())] == ["hello", "hello"]
    with pytest.raises(UsageError, match="no /tokenize"):
        build_requests(BenchConfig(dataset=replace(data, max_model_len=200)), Broken())


def test_too_small_a_model_length_leaves_nothing() -> None:
    config = BenchConfig(dataset=DatasetConfig(max_model_len=10))
    with pytest.raises(UsageError, match="fits 10 tokens"):
        build_requests(config, ByteTokenizer())
