"""guidellm and aiperf measure the server, and `llmtool bench` measures the same."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.servers import BIN, LLMTOOL, RunningServer, environment

PROMPT, OUTPUT = 128, 16  # tokens
ROUNDS, ROUND_SECONDS = 3, 20
GUIDELLM_SECONDS = ROUNDS * (ROUND_SECONDS + 10)
AIPERF = Path(sys.prefix) / "aiperf" / "bin" / "aiperf"
AIPERF_REQUESTS = 12


@dataclass(frozen=True)
class Round:
    """Means in seconds of one bench run, and when it ran."""

    start: float
    end: float
    ttft: float
    itl: float
    completed: int


def bench(server: RunningServer, file: Path, seed: int) -> Round:
    """`llmtool bench` for a while, one request at a time."""
    flags = f"--max-concurrency 1 --num-prompts 500 --duration {ROUND_SECONDS} --ignore-eos --seed {seed}"
    flags += f" --random-input-len {PROMPT} --random-output-len {OUTPUT} --num-warmups 1 -q"
    command = [LLMTOOL, "bench", "--url", server.url, *flags.split(), "--output", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment())
    assert done.returncode == 0, done.stderr
    end, result = file.stat().st_mtime, json.loads(file.read_text())
    assert result["failed"] == 0 and set(result["input_lens"]) == {PROMPT}
    assert set(result["output_lens"]) == {OUTPUT}
    return Round(
        end - result["duration"],
        end,
        result["mean_ttft_ms"] / 1000,
        result["mean_itl_ms"] / 1000,
        result["completed"],
    )


def test_bench_measures_what_guidellm_measures(
    server: RunningServer, model_dir: Path, tmp_path: Path
) -> None:
    """Both ask one request at a time and at the same time, so that whatever happens on the machine happens to both;
    their means over the same seconds are compared.
    """
    report = tmp_path / "guidellm.json"
    started = server.finished("length")
    with subprocess.Popen(guidellm_command(server, model_dir, report), stdout=subprocess.DEVNULL) as guidellm:
        try:
            while server.finished("length") < started + 2:
                assert guidellm.poll() is None, "guidellm ended early"
                time.sleep(0.2)
            rounds = [bench(server, tmp_path / f"bench-{seed}.json", seed) for seed in range(ROUNDS)]
            assert guidellm.poll() is None, "guidellm ended before the last round"
            assert guidellm.wait(GUIDELLM_SECONDS + 60) == 0
        finally:
            guidellm.kill()
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]["successful"]
    assert {(r["prompt_tokens"], r["output_tokens"]) for r in requests} == {(PROMPT, OUTPUT)}
    ratios: dict[str, list[float]] = {"ttft": [], "itl": []}
    for one in rounds:
        inside = [
            r for r in requests if r["request_start_time"] >= one.start and r["request_end_time"] <= one.end
        ]
        assert len(inside) >= 5 and one.completed >= 5, f"{len(inside)} and {one.completed} requests"
        ratios["ttft"].append(one.ttft * 1000 / statistics.fmean(r["time_to_first_token_ms"] for r in inside))
        ratios["itl"].append(one.itl * 1000 / statistics.fmean(r["inter_token_latency_ms"] for r in inside))
    print({name: [round(value, 3) for value in values] for name, values in ratios.items()})
    for name, values in ratios.items():
        assert 0.9 <= statistics.median(values) <= 1.1, f"{name}: bench / guidellm = {values}"


def guidellm_command(server: RunningServer, model_dir: Path, report: Path) -> list[str]:
    options = {
        "backend": f"kind=openai_http,target={server.url},request_format=/v1/completions",
        "profile": "kind=concurrent,streams=1",
        "constraint": f"kind=max_duration,seconds={GUIDELLM_SECONDS}",
        "tokenizer": f"kind=hf_auto,model={model_dir}",
        "data": f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "output": f"kind=json,path={report}",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [str(BIN / "guidellm"), "run", *flags, "--disable-console"]


@pytest.fixture(scope="module")
def aiperf_report(
    server: RunningServer, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """aiperf's summary. It wants older libraries than ours and so lives in an environment of its own."""
    assert AIPERF.is_file(), f"aiperf is not installed at {AIPERF}: run `make acceptance`."
    directory = tmp_path_factory.mktemp("aiperf")
    options = f"--endpoint-type completions --streaming --concurrency 2 --request-count {AIPERF_REQUESTS}"
    options += f" --isl {PROMPT} --isl-stddev 0 --osl {OUTPUT} --osl-stddev 0 --ui none"
    options += " --extra-inputs ignore_eos:true --use-server-token-count"
    command = [AIPERF, "profile", "-m", server.model, "--url", server.url, "--tokenizer", model_dir]
    done = subprocess.run(
        [*command, *options.split(), "--artifact-dir", directory],
        env={
            k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"
        },  # it takes that for "no tokenizer"
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((directory / "profile_export_aiperf.json").read_text())


def test_aiperf_measures_the_server(aiperf_report: dict[str, Any]) -> None:
    report = aiperf_report
    assert report["error_summary"] == [] and not report["was_cancelled"]
    assert report["request_count"]["avg"] == AIPERF_REQUESTS
    assert report["input_sequence_length"]["avg"] == PROMPT
    assert report["output_sequence_length"]["avg"] == OUTPUT
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        assert report[name]["avg"] > 0, name
    expected = report["time_to_first_token"]["avg"] + (OUTPUT - 1) * report["inter_token_latency"]["avg"]
    assert report["request_latency"]["avg"] == pytest.approx(expected, rel=0.02)
