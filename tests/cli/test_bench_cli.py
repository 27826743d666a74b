"""`llmtool bench` from outside, against a mock server in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtool.cli.app import main

SMALL = ("--num-prompts", "12", "--random-input-len", "8", "--random-output-len", "4", "--num-warmups", "0")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    mock = [sys.executable, "-m", "llmtool.bench.mock", "--ttft", "0.002", "--itl", "0.001"]
    with subprocess.Popen(mock, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def bench(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLMTOOL_")}
    return subprocess.run(
        [sys.executable, "-m", "llmtool", "bench", *args],
        capture_output=True,
        text=True,
        env=clean | {"NO_COLOR": "1", "COLUMNS": "200"} | (env or {}),
    )


def test_a_knee_that_was_found_is_shown(url: str, tmp_path: Path) -> None:
    file = tmp_path / "knee.json"
    limits = ("--knee-min-rate", "20", "--knee-max-rate", "40", "--knee-max-runs", "2")
    done = bench(
        "--url", url, *SMALL, "--search-knee", *limits, "--goodput", "e2el:60000", "-o", str(file)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["knee"]["request_rate"] == 40
    assert "Highest rate that held: 40 requests/s" in done.stdout


def printed(*args: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    done = bench(*args, "--print-config", "--json", env=env)
    assert done.returncode == 0, done.stderr

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    settings = json.loads(done.stdout, parse_constant=refuse)
    assert isinstance(settings, dict)
    return settings


def test_settings_of_the_bench_and_of_serve_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "both.toml"
    file.write_text(
        'port = 9000\nnum_prompts = 5\nrequest_rate = 2.5\nburstiness = "inf"\nmax_num_seqs = 3\n'
        'goodput = ["ttft:500", "tpot:99"]\nmetric_percentiles = [50, 99]\n[extra_body]\nmin_p = 0.1\n'
    )
    env = {"LLMTOOL_NUM_PROMPTS": "6", "LLMTOOL_PORT": "9001", "LLMTOOL_MAX_CONCURRENCY": "4"}
    got = printed("--config", str(file), "--random-input-len", "9", env=env)
    expected = {
        "num_prompts": 6,
        "max_concurrency": 4,
        "request_rate": 2.5,
        "burstiness": "inf",
        "max_num_seqs": 3,
        "goodput": ["ttft:500", "tpot:99"],
        "metric_percentiles": [50, 99],
        "extra_body": {"min_p": 0.1},
        "random_input_len": 9,
    }
    assert {k: got[k] for k in expected} == expected
    assert not any(isinstance(v, dict) for k, v in got.items() if k != "extra_body")
    again = tmp_path / "again.json"
    again.write_text(json.dumps(got))
    assert printed("--config", str(again)) == got
    assert printed(env={"LLMTOOL_URL": "http://h:1"})["url"] == "http://h:1"
    assert printed("--url", "http://h:1", env={"LLMTOOL_API_KEY": "secret"})["api_key"] == "***"


@pytest.mark.parametrize(
    "args,said",
    [
        (["--url", "http://h:1", "--dtype", "float32", "--swap-space", "1GiB"], "--dtype, --swap-space"),
        (["--timeout", "5"], "--timeout"),
        (["--metric-percentiles", "fifty"], "percentiles"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(args: list[str], said: str) -> None:
    done = bench(*args, "--print-config")
    assert done.returncode == 2 and said in done.stderr


def test_a_bad_path_costs_no_run(tmp_path: Path) -> None:
    for flag in ("-o", "--html"):
        done = bench("--url", "http://127.0.0.1:9", flag, str(tmp_path / "no" / "x"))
        assert done.returncode == 2 and "does not exist" in done.stderr


@pytest.mark.parametrize("goal", ["ttft:p99:0.001", "ttft:0.001"])
def test_a_missed_objective_is_exit_code_3_after_the_report(url: str, tmp_path: Path, goal: str) -> None:
    file = tmp_path / "r.json"
    done = bench("--url", url, *SMALL, "--goodput", goal, "-o", str(file))
    assert done.returncode == 3
    assert "Missed" in done.stderr and "Output throughput" in done.stdout
    assert json.loads(file.read_text())["completed"] == 12
    assert bench("--url", url, *SMALL, "--goodput", "ttft:60000").returncode == 0
    shown = bench("--show", str(file), "--json")
    assert shown.returncode == 3 and json.loads(shown.stdout)["completed"] == 12  # one document


def test_no_knee_is_exit_code_3(url: str) -> None:
    limits = ("--knee-min-rate", "20", "--knee-max-rate", "21", "--knee-max-runs", "2")
    done = bench("--url", url, *SMALL, "--search-knee", *limits, "--goodput", "ttft:0.001")
    assert done.returncode == 3 and "No rate held the objectives." in done.stdout


def test_a_comparison_can_be_written(url: str, tmp_path: Path) -> None:
    a, out = str(tmp_path / "a.json"), tmp_path / "c.json"
    assert bench("--url", url, *SMALL, "-o", a, "-q").returncode == 0
    assert bench("--compare", a, a, "-o", str(out)).returncode == 0
    verdicts = {m["metric"]: m["verdict"] for m in json.loads(out.read_text())["runs"][0]["metrics"]}
    assert verdicts["mean_ttft_ms"] == "same"


def test_no_figure_of_a_sweep_is_cut_on_a_narrow_screen(url: str) -> None:
    goals = ("--goodput", "e2el:60000")
    done = bench("--url", url, *SMALL, "--request-rate", "20,40", *goals, env={"COLUMNS": "60"})
    assert done.returncode == 0
    rows = [line for line in done.stdout.splitlines() if line.count("│") == 10]
    assert len(rows) == 2 and "…" not in done.stdout
    assert all(cell.strip() for row in rows for cell in row.split("│")[1:-1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--perplexity", "--num-prompts", "3"], "--num-prompts has no meaning with --perplexity"),
        (["--perplexity", "--url", "http://127.0.0.1:1"], "--url has no meaning with --perplexity"),
        (["--baseline", "dtype=float32"], "--baseline goes with --perplexity"),
        (["--perplexity", "--baseline", "dtype"], "NAME=VALUE"),
        (["--perplexity", "--perplexity-stride", "4096"], "perplexity_stride must be between 1 and 1023"),
        (["a", "b", "--perplexity"], "Unexpected argument 'b'"),
        (["--perplexity", "--dataset-path", "/no/such/file"], "Cannot read the text /no/such/file"),
        (["--endpoint", "embeddings", "--top-k", "4"], "Embeddings are not sampled"),
        (["x", "--simulate", "--device", "h100", "--disaggregate", "1:1"], "--simulate is of one engine"),
        (["--data-parallel-size", "0"], "data_parallel_size must be at least 1"),
        (
            ["--url", "http://h:1", "--data-parallel-size", "2"],
            "--data-parallel-size cannot change the server",
        ),
    ],
)
def test_flags_that_contradict_are_usage_errors(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inside(monkeypatch, *args) == 2
    assert message in capsys.readouterr().err


def test_settings_of_perplexity_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["some-model", "--perplexity", "--perplexity-window", "64", "--dtype", "float32"]
    assert inside(monkeypatch, *args, "--print-config", "--json") == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings["model"] == "some-model" and settings["dtype"] == "float32"
    assert settings["perplexity_window"] == 64


def inside(monkeypatch: pytest.MonkeyPatch, *args: str) -> Any:
    """`llmtool bench ARGS` in this process, for what ends before anything runs: its exit code."""
    for name in [name for name in os.environ if name.startswith("LLMTOOL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["llmtool", "bench", *args])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code
