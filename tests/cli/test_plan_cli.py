"""`llmtool plan` from outside: what a user types, gets and is told."""

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmtool.bench.result import read_result
from llmtool.cli.app import app
from llmtool.modelspec.catalogue import published
from tests.bench.made import made_records, made_result, made_run
from tests.sim.test_plan_memory import known

SMALL = ["plan", "smollm2-360m", "--device", "l4", "--num-prompts", "20", "--processes", "1"]


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def document(*arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(CliRunner().invoke(app, [*arguments, "--json", "-q"]).stdout)
    return data


def test_a_plan_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "cache"))
    files = {name: str(tmp_path / name) for name in ("plan.toml", "r.html", "p.json")}
    flags = [
        "-o",
        files["plan.toml"],
        "--html",
        files["r.html"],
        "--perfetto",
        files["p.json"],
        "--price",
        "0.7",
    ]
    asks = ["--what-if", "rate=2", "--what-if", "device=l40s", "--slo", "ttft:p99:5000", "--capacity"]
    data = document(*SMALL, "--num-devices", "2", "--objective", "cost", *flags, *asks)
    counts = data["counts"]
    assert counts["enumerated"] == sum(v for k, v in counts.items() if k != "enumerated")
    best = data["plans"][0]
    assert best["rank"] == 1 and best["usd_per_million_tokens"] == pytest.approx(best["loss"])
    assert (
        best["lower_bound"] <= best["loss"] and best["meets_slos"] and any(p["pareto"] for p in data["plans"])
    )
    assert data["tier"] == "borrowed efficiencies" and data["error_band"] == 0.3
    assert data["price"] == {"usd_per_hour": 0.7, "note": "given"}
    assert [a["question"] for a in data["what_if"]] == ["rate=2", "device=l40s"]
    assert data["capacity"]["held"] > 4 and data["heuristic"]["speedup"] >= 1
    assert data["launch"]["vllm"][0].split()[-1] and "HuggingFaceTB/SmolLM2-360M" in data["launch"]["vllm"][0]
    words = shlex.split(data["launch"]["bench"])
    assert words[words.index("--dataset-path") + 1] == str(tmp_path / "plan.trace.csv")
    assert len((tmp_path / "plan.trace.csv").read_text().splitlines()) == 21
    assert (
        "<svg" in Path(files["r.html"]).read_text()
        and json.loads(Path(files["p.json"]).read_text())["traceEvents"]
    )


def test_another_device_has_its_own_constants_and_price() -> None:
    """A price that is not known is never another device's."""
    flags = ["--num-devices", "1", "--num-prompts", "20", "--processes", "1", "--price", "2"]
    data = document("plan", "smollm2-360m", "--device", "h100", *flags, "--what-if", "device=b200",
                    "--what-if", "device=l4", "--what-if", "rate=1")  # fmt: skip
    b200, l4, same = data["what_if"]
    best = data["plans"][0]
    assert l4["usd_per_million_tokens"] is None and b200["usd_per_million_tokens"] is not None
    assert same["usd_per_million_tokens"] == pytest.approx(best["usd_per_million_tokens"])
    limits = ["--max-num-seqs", str(best["max_num_seqs"]), "--max-num-batched-tokens"]
    there = document(
        "plan", "smollm2-360m", "--device", "b200", *flags, *limits, str(best["max_num_batched_tokens"])
    )
    assert b200["mean_tpot_ms"] == pytest.approx(there["plans"][0]["mean_tpot_ms"])


def test_speculation_and_a_pruned_model(tmp_path: Path) -> None:
    """Drafts as a dimension of the search, and both as questions about its winner."""
    config = dict(published("smollm2-360m") or {})
    half = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1280}
    config["per_layer_config"] = {str(i): half for i in range(config["num_hidden_layers"])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    smaller = f"model={tmp_path}"
    few = ["--num-devices", "1", "--request-rate", "1"]
    asks = ["--what-if", "speculation=3", "--what-if", "speculation=off", "--what-if", smaller]
    data = document(*SMALL, *few, "--spec", "off,3,auto", "--acceptance", "0.8", *asks,
                    "--objective", "latency")  # fmt: skip
    kinds = {p["speculation"] for p in data["plans"]} | {p["speculation"] for p in data["not_simulated"]}
    assert kinds == {"off", "3", "auto"} and data["plans"][0]["speculation"] != "off"
    three, off, pruned = data["what_if"]
    assert three["mean_tpot_ms"] < 0.7 * off["mean_tpot_ms"]
    best = document(*SMALL, *few, "--objective", "latency", "--what-if", smaller)
    assert best["what_if"][0]["mean_tpot_ms"] < best["plans"][0]["mean_tpot_ms"] and pruned["meets_slos"]


def test_one_device_serves_its_plan(tmp_path: Path) -> None:
    file = str(tmp_path / "plan.toml")
    shown = call(*SMALL, "--num-devices", "1", "-o", file, "-q")
    assert f"llmtool serve --plan {file}" in re.sub(r"\s+", " ", shown)
    settings = json.loads(call("serve", "--plan", file, "--max-num-seqs", "7", "--print-config", "--json"))
    assert settings["model"] == "smollm2-360m" and settings["max_num_seqs"] == 7  # flags win
    assert (
        settings["max_num_batched_tokens"]
        == document(*SMALL, "--num-devices", "1")["plans"][0]["max_num_batched_tokens"]
    )


def test_replicas_are_served_as_planned(tmp_path: Path) -> None:
    """A plan of one device, then the same of two engines, and of one engine over two devices."""
    file = tmp_path / "plan.toml"
    call(*SMALL, "--num-devices", "1", "-o", str(file), "-q")
    one = file.read_text()
    file.write_text(one.replace("data_parallel = 1", "data_parallel = 2", 1))
    settings = json.loads(call("serve", "--plan", str(file), "--print-config", "--json"))
    assert settings["data_parallel_size"] == 2
    file.write_text(one.replace("tensor_parallel = 1", "tensor_parallel = 2", 1))
    settings = json.loads(call("serve", "--plan", str(file), "--print-config", "--json"))
    assert settings["tensor_parallel_size"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["plan"], 2, "A model is missing"),
        (["plan", "smollm2-360m"], 2, "A device is missing"),
        (["plan", "no-such-model", "--device", "h100"], 1, "neither in the catalogue"),
        (["plan", "smollm2-360m", "--device", "abacus"], 2, "known are h100"),
        ([*SMALL, "--slo", "ttft:p99:500", "--slo", "e2el:p99:100"], 2, "contradict"),
        ([*SMALL, "--objective", "cost"], 2, "price of l4 is not known"),
        ([*SMALL, "--objective", "fun"], 2, "objective 'fun' is unknown"),
        ([*SMALL, "--dtype", "fp3"], 2, "--dtype cannot be 'fp3'"),
        ([*SMALL, "--workload", "poetry"], 2, "workload 'poetry' is unknown"),
        ([*SMALL, "--request-rate", "2", "--max-concurrency", "3"], 2, "exclude each other"),
        ([*SMALL, "--trace", "/nowhere.csv"], 2, "Cannot read the trace"),
        ([*SMALL, "--router", "magic"], 2, "router 'magic' is unknown"),
        ([*SMALL, "--processes", "0"], 2, "--processes must be at least 1"),
        ([*SMALL, "--num-devices", "2", "--slo", "tpot:p50:0.0001"], 4, "No plan meets"),
        ([*SMALL, "--num-devices", "1", "--what-if", "weather=rain"], 2, "no question"),
        ([*SMALL, "--spec", "3"], 2, "how often drafts are right"),
        ([*SMALL, "--spec", "sometimes", "--acceptance", "0.7"], 2, "no speculation 'sometimes'"),
        ([*SMALL, "--spec", "3", "--acceptance", "1.7"], 2, "between 0 and 1"),
        ([*SMALL, "--acceptance", "0.7"], 2, "go with speculation"),
        ([*SMALL, "--num-devices", "1", "--what-if", "speculation=3"], 2, "how often drafts are right"),
        (
            ["plan", "llama-3.1-405b", "--device", "l4", "--num-devices", "2"],
            4,
            "smallest cluster that holds it is",
        ),
        (["plan", "--calibrate", "x.json"], 2, "Give --plan"),
        (["plan", "--import-tables", ".", "--device", "h100"], 2, "-o FILE.npz"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], code: int, says: str) -> None:
    shown = re.sub(r"\s+", " ", call(*arguments, code=code))
    assert says in shown and "Traceback" not in shown


def test_missed_objectives_are_in_the_one_document() -> None:
    shown = CliRunner().invoke(
        app, [*SMALL, "--num-devices", "1", "--slo", "tpot:p50:0.0001", "--json", "-q"]
    )
    data = json.loads(shown.stdout)
    assert shown.exit_code == data["error"]["exit_code"] == 4 and data["plans"]


def test_an_empty_trace(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("num_prefill_tokens,num_decode_tokens\n")
    assert "no usable request" in call(*SMALL, "--trace", str(tmp_path / "t.csv"), code=2)


def test_the_catalogue() -> None:
    data = document("plan", "--list")
    assert "llama-3.1-70b" in data["models"] and "h100" in data["devices"] and "vllm" in data["engines"]
    assert known("llama-3.1-70b").num_layers == 80


def test_a_bench_result_calibrates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own file, ours and SGLang's lines: the constants move towards what was measured, and are used from
    then."""
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "cache"))
    plan = str(tmp_path / "plan.toml")
    before = document(*SMALL, "--num-devices", "1", "-o", plan)
    slow = {
        "duration": 20.0,
        "completed": 10,
        "input_lens": [100] * 10,
        "output_lens": [50] * 10,
        "ttfts": [0.2] * 10,
        "itls": [[0.04] * 49] * 10,
        "errors": [""] * 10,
        "start_times": [2.0 * i for i in range(10)],
        "request_rate": 0.5,
    }
    (tmp_path / "vllm.json").write_text(json.dumps(slow))
    (tmp_path / "sglang.jsonl").write_text(
        json.dumps({k: v for k, v in slow.items() if k != "start_times"}) + "\n"
    )
    for name in ("vllm.json", "sglang.jsonl"):
        found = document("plan", "--calibrate", str(tmp_path / name), "--plan", plan)
        tpot = next(f for f in found["figures"] if f["name"] == "tpot")
        assert abs(tpot["after"] / tpot["measured"] - 1) < 0.1 < abs(tpot["before"] / tpot["measured"] - 1)
    after = document(*SMALL, "--num-devices", "1")
    assert (
        after["tier"] == "calibrated"
        and after["plans"][0]["mean_tpot_ms"] > 2 * before["plans"][0]["mean_tpot_ms"]
    )
    ours = tmp_path / "ours.json"
    made_result(made_run(made_records(0, n=12), 10.0)).write(ours)
    assert len(read_result(ours).runs) == 1
    assert "constants" in document("plan", "--calibrate", str(ours), "--plan", plan)


def test_disaggregated_plans_stand_beside_the_others(tmp_path: Path) -> None:
    file = str(tmp_path / "plan.toml")
    data = document(*SMALL, "--num-devices", "2", "--disaggregate", "--objective", "latency", "-o", file)
    split, best = data["disaggregated"][0], data["plans"][0]
    assert split["devices"] == 2 and split["mean_tpot_ms"] > 0
    wins = split["mean_e2el_ms"] < best["mean_e2el_ms"]
    text = Path(file).read_text()
    assert ('disaggregate = "1:1"' in text) == wins
    predicted = tomllib.loads(text)["prediction"]["mean_e2el_ms"]
    assert predicted == pytest.approx((split if wins else best)["mean_e2el_ms"], rel=1e-4)
    assert "request rate" in call(
        *SMALL, "--disaggregate", "--max-concurrency", "4", "--num-devices", "2", code=2
    )
