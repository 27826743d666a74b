"""Whole invocations against the mock server, and against an engine on a virtual model in this process."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig
from llmtool.bench.load import Progress, run_load
from llmtool.bench.mock import MockOptions, MockServer
from llmtool.bench.result import BenchResult, RunResult, read_result
from llmtool.bench.run import _cautioned, connect, run_bench, run_blocking
from llmtool.bench.sweep import too_short
from llmtool.bench.tokenizer import ServerTokenizer
from llmtool.errors import LLMToolError, UsageError
from tests.workload.fake import ByteTokenizer, data_file

SMALL = DatasetConfig(num_prompts=24, random_input_len=8, random_output_len=5)
FAST = MockOptions(ttft=0.004, itl=0.002)


def bench(
    config: BenchConfig,
    mock: MockOptions = FAST,
    progress: list[Progress] | None = None,
    tokenizer: Any = None,
) -> BenchResult:
    async def main() -> BenchResult:
        async with MockServer(mock) as server:
            ready, backend = await connect(replace(config, url=server.url))
            async with backend:
                callback = progress.append if progress is not None else None
                return await run_bench(ready, backend, tokenizer or ByteTokenizer(), callback)

    return run_blocking(main())


def test_a_run_from_configuration_to_file(tmp_path: Path) -> None:
    seen: list[Progress] = []
    config = BenchConfig(dataset=SMALL, goodput=("ttft:60000", "e2el:p99:60000"), save_text=True, label="one")
    result = bench(config, progress=seen)
    m = result.runs[0].metrics
    assert (m["completed"], m["failed"]) == (24, 0)
    assert m["total_output_tokens"] == 24 * 5
    assert m["input_lens"] == [8] * 24
    assert m["request_goodput"] == m["request_throughput"] > 0
    assert m["mean_ttft_ms"] >= 4
    # Equal for every request by construction: (E2E - TTFT) / (n - 1).
    tpots = [(e - t) / 4 * 1000 for e, t in zip(m["e2els"], m["ttfts"], strict=True)]
    assert m["mean_tpot_ms"] == pytest.approx(sum(tpots) / 24)
    assert result.runs[0].generated_texts == ("tok tok tok tok tok ",) * 24
    assert result.runs[0].server["server_counters"]["generation_tokens"] == 120
    assert [p.phase for p in seen[:2]] == ["warm-up", "bench"]
    assert seen[-1].done == 24
    path = tmp_path / "r.json"
    result.write(path)
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1
    assert document["config"]["random_input_len"] == 8
    assert document["hardware"]["cores"] >= 1
    assert document["versions"]["llmtool"]
    assert document["request_rate"] == "inf"
    assert document["completed"] == 24
    again = read_result(path)
    assert again.runs[0].metrics["ttfts"] == m["ttfts"]
    assert again.as_dict()["config"] == document["config"]
    assert not list(tmp_path.glob(".*partial"))


def test_some_requests_fail_and_the_rest_counts() -> None:
    result = bench(
        BenchConfig(dataset=SMALL), MockOptions(ttft=0.001, itl=0.001, fault="status", fault_every=4)
    )
    m = result.runs[0].metrics
    assert m["completed"] + m["failed"] == 24
    assert m["failed"] == 6  # every fourth of 25, the warm-up being the first
    assert any("6 of 24 requests failed" in w for w in result.warnings)
    assert sum("HTTP 503" in e for e in m["errors"]) == 6


def test_all_requests_failing_is_one_clear_error() -> None:
    with pytest.raises(LLMToolError, match="first request failed: HTTP 503"):
        bench(BenchConfig(dataset=SMALL), MockOptions(fault="status"))
    # Without a warm-up the run goes through, with nothing but failures in it.
    config = BenchConfig(dataset=SMALL, load=LoadConfig(num_warmups=0), goodput=("ttft:100",))
    m = bench(config, MockOptions(fault="status")).runs[0].metrics
    assert (m["completed"], m["failed"], m["request_goodput"], m["mean_ttft_ms"]) == (0, 24, 0.0, None)


def test_outputs_that_end_early_and_uncounted_tokens_are_pointed_out() -> None:
    result = bench(BenchConfig(dataset=SMALL), MockOptions(ttft=0.0, itl=0.0, stop_after=2))
    assert any("--ignore-eos" in w and "2 tokens" in w for w in result.warnings)
    result = bench(BenchConfig(dataset=SMALL), MockOptions(ttft=0.0, itl=0.0, fault="no_usage"))
    assert any("stream chunks" in w for w in result.warnings)
    assert result.runs[0].metrics["total_output_tokens"] == 120


def test_sweep_and_its_file(tmp_path: Path) -> None:
    config = BenchConfig(dataset=SMALL, load=LoadConfig(request_rates=(100.0, 400.0)))
    result = bench(config)
    assert [run.request_rate for run in result.runs] == [100.0, 400.0]
    assert result.runs[0].metrics["duration"] >= 23 / 100
    result.write(tmp_path / "s.json")
    again = read_result(tmp_path / "s.json")
    assert (again.kind, len(again.runs)) == ("sweep", 2)
    assert again.runs[1].metrics["e2els"] == result.runs[1].metrics["e2els"]


def test_knee_of_a_server_with_two_slots() -> None:
    """Two at a time, 24 ms each: about 80 requests/s; beyond, the queue grows and TTFT with it."""
    mock = MockOptions(ttft=0.02, itl=0.001, max_running=2)
    load = LoadConfig(search_knee=True, knee_min_rate=2.0, knee_max_runs=5, knee_tolerance=0.5)
    data = replace(SMALL, num_prompts=40)
    result = bench(BenchConfig(dataset=data, load=load, goodput=("ttft:120",)), mock)
    assert result.kind == "knee"
    assert result.knee is not None
    assert math.isinf(result.runs[0].request_rate)
    assert result.runs[0].metrics["max_concurrent_requests"] == 40
    assert result.knee["capacity"] <= 2 / 0.02
    assert len(result.runs) <= 5
    assert not any("too few to tell" in w for w in result.warnings)


def test_how_long_a_run_must_be() -> None:
    run = {"completed": 20, "failed": 0, "median_e2el_ms": 500.0}
    assert too_short(run, 10.0) is None  # 2 s of arrivals, four times what a request takes
    assert "--num-prompts 60 or more" in (too_short(run, 20.0) or "")
    assert too_short(run, math.inf) is None
    runs = [_cautioned(RunResult(rate, run, warnings=("first",)), 20.0) for rate in (10.0, 20.0, 40.0)]
    assert [len(r.warnings) for r in runs] == [1, 2, 1]  # only the knee is claimed


def test_no_run_of_a_sweep_repeats_the_prompts_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[float, list[Any]]] = []

    async def recorded(backend: Any, requests: Any, offsets: Any, *rest: Any) -> Any:
        sent.append((float(offsets[-1]), [r.token_ids for r in requests]))
        return await run_load(backend, requests, offsets, *rest)

    monkeypatch.setattr("llmtool.bench.run.run_load", recorded)

    def prompts(load: LoadConfig) -> list[list[Any]]:
        sent.clear()
        bench(BenchConfig(dataset=SMALL, load=replace(load, num_warmups=0), goodput=("ttft:1",)))
        return [ids for _, ids in sent]

    swept = prompts(LoadConfig(request_rates=(300.0, 600.0, 300.0)))
    assert len({tuple(ids) for run in swept for ids in run}) == 3 * SMALL.num_prompts
    again = prompts(LoadConfig(request_rates=(600.0, 900.0)))
    assert again[0] == swept[1] and again[1] not in swept  # the same rate has the same prompts: comparable
    searched = prompts(
        LoadConfig(search_knee=True, knee_min_rate=100.0, knee_max_rate=900.0, knee_max_runs=4)
    )
    assert len({tuple(ids) for run in searched for ids in run}) == len(searched) * SMALL.num_prompts > 50


def test_a_file_too_short_for_fresh_prompts_is_a_warning(tmp_path: Path) -> None:
    rows = [{"prompt": f"Tell me of the number {i}, please.", "output_len": 3} for i in range(24)]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    data = DatasetConfig(dataset_name="custom", dataset_path=str(file), num_prompts=24)
    config = BenchConfig(dataset=data, load=LoadConfig(request_rates=(300.0, 600.0), num_warmups=0))

    def warned(share: float, remembers: bool) -> bool:
        result = bench(config, replace(FAST, cached_share=share, remembers=remembers))
        return any("too few prompts" in w for w in result.warnings)

    assert warned(0.9, True)
    assert not warned(0.9, False)  # as much in the first run: what the prompts themselves share
    assert not warned(0.0, True)


def test_timed_trace_is_replayed(tmp_path: Path) -> None:
    data = DatasetConfig(
        dataset_name="azure",
        dataset_path=str(data_file("traces", "AzureLLMInferenceTrace_conv.csv")),
        num_prompts=20,
        max_model_len=1000,
    )
    config = BenchConfig(dataset=data, load=LoadConfig(trace_speedup=50.0))
    result = bench(config, MockOptions(ttft=0.0, itl=0.0))
    m = result.runs[0].metrics
    assert 5 < m["completed"] < 20  # the long ones are left out
    assert all(i + o <= 1000 for i, o in zip(m["input_lens"], m["output_lens"], strict=True))
    assert m["duration"] >= 7 / 50  # the seconds of the trace, fifty times as fast


def test_copy_dataset_goes_to_the_chat_endpoint_and_random_prompts_can() -> None:
    async def main(config: BenchConfig) -> list[dict[str, Any]]:
        async with MockServer(FAST) as server:
            ready, backend = await connect(replace(config, url=server.url))
            async with backend:
                await run_bench(ready, backend, ByteTokenizer())
            return list(server.requests)

    copies = DatasetConfig(dataset_name="copy", num_prompts=2)
    assert all("messages" in body for body in asyncio.run(main(BenchConfig(dataset=copies))))
    tiny = replace(SMALL, num_prompts=2)
    assert all("messages" in body for body in asyncio.run(main(BenchConfig(dataset=tiny, endpoint="chat"))))
    assert all("prompt" in body for body in asyncio.run(main(BenchConfig(dataset=tiny))))
    with pytest.raises(UsageError, match="no chat messages"):
        asyncio.run(main(BenchConfig(dataset=copies, endpoint="completions")))


def test_the_servers_tokenizer_makes_prompts() -> None:
    async def main() -> None:
        async with MockServer(FAST) as server:
            ready, backend = await connect(BenchConfig(url=server.url, dataset=SMALL))
            tokenizer = ServerTokenizer(server.url, ready.model)
            async with backend:
                result = await run_bench(ready, backend, tokenizer)
            assert result.runs[0].metrics["input_lens"] == [8] * 24
            assert tokenizer.vocab_size <= 256
            text = await asyncio.to_thread(tokenizer.decode, [72, 105])
            assert text == "Hi"
            with pytest.raises(UsageError, match="cannot be used as a tokenizer"):
                await asyncio.to_thread(ServerTokenizer(server.url + "/nowhere").encode, "x")

    asyncio.run(main())


def test_prompts_need_a_tokenizer() -> None:
    async def main() -> None:
        async with MockServer(FAST) as server:
            ready, backend = await connect(BenchConfig(url=server.url, dataset=SMALL))
            async with backend:
                await run_bench(ready, backend, None)

    with pytest.raises(UsageError, match="tokenizer is needed"):
        asyncio.run(main())


def test_the_mock_runs_as_a_process() -> None:
    command = [sys.executable, "-m", "llmtool.bench.mock", "--ttft", "0.001", "--itl", "0", "--model", "m7"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        async def main() -> BenchResult:
            ready, backend = await connect(BenchConfig(url=url, dataset=SMALL))
            async with backend:
                return await run_bench(ready, backend, ByteTokenizer())

        result = asyncio.run(main())
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
    assert result.model == "m7"
    assert result.runs[0].metrics["completed"] == 24


def test_two_hundred_streams_at_once() -> None:
    data = DatasetConfig(num_prompts=200, random_input_len=4, random_output_len=6)
    result = bench(BenchConfig(dataset=data, load=LoadConfig(num_warmups=0)), MockOptions(ttft=0.2, itl=0.02))
    m = result.runs[0].metrics
    assert (m["completed"], m["max_concurrent_requests"]) == (200, 200)
    assert m["total_output_tokens"] == 1200


def test_prompts_that_the_server_has_seen_before_are_a_warning() -> None:
    def warned(dataset: DatasetConfig, share: float) -> bool:
        result = bench(BenchConfig(dataset=dataset), replace(FAST, cached_share=share))
        return any("prefix cache" in w for w in result.warnings)

    assert warned(SMALL, 0.5)
    assert not warned(SMALL, 0.0)
    assert not warned(replace(SMALL, random_prefix_len=8), 0.5)  # there sharing is the purpose
    assert not warned(
        replace(SMALL, dataset_name="copy", copy_passage_len=20), 0.5
    )  # they share what is asked


def test_ramps_and_traces_are_recorded_as_such(tmp_path: Path) -> None:
    ramp = bench(BenchConfig(dataset=SMALL, load=LoadConfig(ramp_up_start_rps=50, ramp_up_end_rps=150)))
    trace = tmp_path / "t.jsonl"
    rows = [{"timestamp": 10 * i, "input_length": 8, "output_length": 2, "hash_ids": [i]} for i in range(5)]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    data = DatasetConfig(dataset_name="mooncake", dataset_path=str(trace), trace_block_size=8, num_prompts=9)
    traced = bench(BenchConfig(dataset=data))
    for result, said, sent in ((ramp, "ramp 50 to 150", 24), (traced, "trace", 5)):
        document = result.as_dict()
        assert (document["request_rate"], document["num_prompts"]) == (said, sent)
        result.write(tmp_path / "r.json")
        again = read_result(tmp_path / "r.json")
        assert again.runs[0].arrivals == said and math.isinf(again.runs[0].request_rate)
    assert any("5 requests, not the 9" in w for w in traced.warnings)
    assert not any("asked for" in w for w in ramp.warnings)
