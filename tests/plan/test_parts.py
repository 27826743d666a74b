"""Objectives, reports, files, what-if, capacity, calibration: the planner's other parts."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from llmtool.errors import InfeasibleError, UsageError
from llmtool.hardware import Cluster
from llmtool.plan.calibration import calibrate, engine_for, store
from llmtool.plan.capacity import capacity, holds
from llmtool.plan.disaggregate import better_split
from llmtool.plan.fit import Observation
from llmtool.plan.launch import bench_line, sglang_lines, vllm_lines
from llmtool.plan.objective import Objective, figures
from llmtool.plan.perfetto import trace_events
from llmtool.plan.planfile import read_plan, serve_settings, write_plan
from llmtool.plan.report import distinct, pareto, ties, why_it_loses
from llmtool.plan.runnable import why_not_runnable
from llmtool.plan.search import Outcome
from llmtool.plan.space import SpaceOptions, build_space
from llmtool.plan.tier import tier_of
from llmtool.plan.whatif import Scenario, ask
from llmtool.plan.workloads import NAMED, guess_format, make_workload, write_trace
from llmtool.sim.deployment import Drafting
from llmtool.sim.engines import EngineProfile, find_engine
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.simulate import simulate
from llmtool.sim.workload import Workload
from llmtool.workload.slo import SLO, parse_slos
from tests.plan.made import ENGINE, dense, deployment, device, load, mixture, run

# -- objectives --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slos", "says"),
    [
        (["ttft:p90:500", "ttft:p99:200"], "stricter"),
        (["ttft:p99:500", "e2el:p99:200"], "contradict"),
        (["itl:p99:20"], "simulated plan has no"),
    ],
)
def test_contradictory_slos(slos: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Objective("goodput", parse_slos(slos))


def test_objectives_agree_with_the_run() -> None:
    result = run(deployment(ParallelPlan(tp=2)), load(40))
    tokens = sum(f.output_tokens for f in result.finished)
    assert 1 / Objective("throughput").loss(result) == pytest.approx(tokens / result.duration / 2)
    assert Objective("latency").loss(result) == pytest.approx(result.statistic("e2el", None))
    assert Objective("energy").loss(result) == pytest.approx(result.joules() / tokens * 1e6)
    met = Objective("goodput", (SLO("tpot", 1e9),))
    assert 1 / met.loss(result) == pytest.approx(40 / result.duration)
    assert Objective("goodput", (SLO("ttft", 1e-6),)).loss(result) == float("inf")
    shares = figures(result, met)["time_share"]
    assert sum(shares.values()) == pytest.approx(1.0)


# -- reports -----------------------------------------------------------------------------------------------------


def outcome(
    plan: ParallelPlan, loss: float, rate: float, tpot: float, ttft: float, **changes: object
) -> Outcome:
    values = {
        "output_tokens_per_s_per_device": rate,
        "mean_tpot_ms": tpot,
        "mean_ttft_ms": ttft,
        "time_share": {"compute": 0.1, "memory": 0.5, "network": 0.3, "host": 0.1},
        "preemptions": 0,
    }
    return Outcome(deployment(plan, **changes), "simulated", loss, figures=values)


def test_the_pareto_set_is_what_nothing_beats() -> None:
    import random

    rng = random.Random(0)
    points = [outcome(ParallelPlan(), 1.0, rng.random(), rng.random(), rng.random()) for _ in range(60)]

    def beats(a: Outcome, b: Outcome) -> bool:
        x, y = a.figures, b.figures
        pairs = [
            (-x["output_tokens_per_s_per_device"], -y["output_tokens_per_s_per_device"]),
            (x["mean_tpot_ms"], y["mean_tpot_ms"]),
            (x["mean_ttft_ms"], y["mean_ttft_ms"]),
        ]
        return all(p <= q for p, q in pairs) and any(p < q for p, q in pairs)

    wanted = {id(p) for p in points if not any(beats(q, p) for q in points)}
    assert {id(p) for p in pareto(points)} == wanted


def test_ties_and_doubles() -> None:
    best = outcome(ParallelPlan(tp=2), 1.0, 1, 1, 1, budget=256)
    same = outcome(ParallelPlan(tp=2), 1.0, 1, 1, 1, budget=128)
    near, far = outcome(ParallelPlan(dp=2), 1.1, 1, 1, 1), outcome(ParallelPlan(pp=2), 1.5, 1, 1, 1)
    assert ties([best, near, far], 0.15) == [near]
    assert [(a.deployment.budget, len(b)) for a, b in distinct([best, same, near])] == [(128, 1), (128, 0)]
    text = why_it_loses(far, best, Objective("latency"))
    assert "1.50x" in text and "bound by" in text


def test_a_perfetto_trace_holds_every_step() -> None:
    result = run(deployment(ParallelPlan(dp=2)), load(20), record=True)
    events = trace_events(result)
    slices = [e for e in events if e["ph"] == "X"]
    assert sum(e["args"]["steps"] for e in slices) == sum(t.steps for t in result.totals)
    assert sum(e["args"]["prompt_tokens"] for e in slices) == sum(t.prompt_tokens for t in result.totals)
    assert sum(1 for e in events if e["ph"] == "b") == 3 * 20
    json.dumps(events)


# -- files -------------------------------------------------------------------------------------------------------


def test_a_plan_file_comes_back(tmp_path: Path) -> None:
    plan = ParallelPlan(tp=2, pp=2, layers=(5, 3))
    write_plan(tmp_path / "p.toml", "toy", "h100", deployment(plan), {"mean_tpot_ms": 1.23}, 0.15)
    back = read_plan(tmp_path / "p.toml")
    assert back.plan == plan and back.model == "toy" and back.device == "h100" and back.engine == "test"
    assert back.settings["max_num_batched_tokens"] == 128 and back.prediction["mean_tpot_ms"] == 1.23
    write_plan(tmp_path / "dp.toml", "toy", "cpu", deployment(ParallelPlan(dp=3)), {}, 0.15)
    assert serve_settings(tmp_path / "dp.toml")["data_parallel_size"] == 3
    write_plan(tmp_path / "split.toml", "toy", "cpu", deployment(ParallelPlan(dp=3)), {}, 0.15, "1:2")
    settings = serve_settings(tmp_path / "split.toml")
    assert settings["disaggregate"] == "1:2" and "data_parallel_size" not in settings
    assert read_plan(tmp_path / "split.toml").disaggregate == "1:2" and back.disaggregate == ""
    parallel = serve_settings(tmp_path / "p.toml")
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "pipeline_layers")
    assert [parallel[k] for k in sizes] == [2, 2, (5, 3)] and "enable_expert_parallel" not in parallel
    for other, why in (
        (ParallelPlan(tp=2, attention_dp=2), "2 groups of its own"),
        (ParallelPlan(tp=4, ep=2), "experts come in 2 groups"),
    ):
        write_plan(tmp_path / "other.toml", "toy", "h100", deployment(other, mixture()), {}, 0.15)
        with pytest.raises(UsageError, match=why):
            serve_settings(tmp_path / "other.toml")
    write_plan(
        tmp_path / "experts.toml", "toy", "h100", deployment(ParallelPlan(tp=4, ep=4), mixture()), {}, 0.15
    )
    assert serve_settings(tmp_path / "experts.toml")["enable_expert_parallel"] is True
    write_plan(tmp_path / "one.toml", "toy", "cpu", deployment(ParallelPlan()), {}, 0.15)
    assert serve_settings(tmp_path / "one.toml")["max_num_seqs"] == 16
    drafting = Drafting("auto", 0.7, 0.5)
    write_plan(tmp_path / "d.toml", "toy", "cpu", deployment(ParallelPlan(), drafting=drafting), {}, 0.15)
    assert read_plan(tmp_path / "d.toml").drafting == drafting and back.drafting is None
    assert serve_settings(tmp_path / "d.toml")["spec"] == "auto"
    (tmp_path / "bad.toml").write_text("[plan]\nversion = 9\n")
    with pytest.raises(UsageError, match="no plan of version 1"):
        read_plan(tmp_path / "bad.toml")


def test_a_split_is_chosen_where_it_wins_and_can_be_run() -> None:
    row = {"devices_per_engine": [1, 1], "meets_slos": True, "loss": 2.0}
    assert better_split([row], True, 3.0) is row and better_split([row], False, 1.0) is row
    assert better_split([row], True, 2.0) is None and better_split([], False, 9.0) is None
    assert better_split([row | {"devices_per_engine": [2, 1]}], True, 3.0) is None
    assert better_split([row | {"meets_slos": False}], True, 3.0) is None


def test_launch_lines_carry_the_plan() -> None:
    d = deployment(ParallelPlan(tp=2, attention_dp=2, ep=4, dp=2), mixture(), kv_dtype="fp8", dtype="fp8")
    lines = vllm_lines("org/model", d)
    assert len(lines) == 2 and lines[1].startswith("CUDA_VISIBLE_DEVICES=4,5,6,7 vllm serve org/model")
    words = shlex.split(lines[0])
    for flag, value in (
        ("--tensor-parallel-size", "2"),
        ("--data-parallel-size", "2"),
        ("--max-num-seqs", "16"),
        ("--max-num-batched-tokens", "128"),
        ("--kv-cache-dtype", "fp8"),
        ("--quantization", "fp8"),
    ):
        assert words[words.index(flag) + 1] == value
    assert "--enable-expert-parallel" in words
    sglang = shlex.split(sglang_lines("org/model", d)[0])
    assert sglang[sglang.index("--tp-size") + 1] == "4" and "--enable-dp-attention" in sglang
    uneven = vllm_lines("m", deployment(ParallelPlan(pp=2, layers=(5, 3))))[0]
    assert uneven.startswith("VLLM_PP_LAYER_PARTITION=5,3 vllm serve m --pipeline-parallel-size 2")


def test_plans_without_flags_get_no_line() -> None:
    halves = ParallelPlan(tp=2, attention_dp=2, ep=2)
    assert vllm_lines("m", deployment(halves, mixture())) == [
        "# vllm spreads experts over all 4 devices of a stage, or cuts each of them over all."
    ]
    assert sglang_lines("m", deployment(halves, mixture()))[0].startswith("python -m sglang.launch_server")
    shared = deployment(ParallelPlan(tp=2, attention_dp=2))
    assert vllm_lines("m", shared)[0].startswith("# ") and sglang_lines("m", shared)[0].startswith("# ")
    engine = replace(ENGINE, name="vllm")
    cluster = Cluster(device(), 4)
    spaces = [
        build_space(mixture(), cluster, SpaceOptions(engine, 256, any_plan=any_plan))
        for any_plan in (False, True)
    ]
    few, all_ = ({d.plan for d in space.feasible} for space in spaces)
    assert few == {p for p in all_ if not why_not_runnable("vllm", p, mixture())} and few < all_
    assert spaces[0].enumerated == spaces[1].enumerated


def test_plans_with_drafts() -> None:
    """A fixed number has flags everywhere; a controller only here."""
    fixed = deployment(ParallelPlan(), drafting=Drafting("3", 0.7))
    words = shlex.split(vllm_lines("m", fixed)[0])
    assert json.loads(words[words.index("--speculative-config") + 1])["num_speculative_tokens"] == 3
    assert "--speculative-num-draft-tokens 3" in sglang_lines("m", fixed)[0]
    auto = deployment(ParallelPlan(), drafting=Drafting("auto", 0.7))
    assert vllm_lines("m", auto)[0].startswith("# ") and sglang_lines("m", auto)[0].startswith("# ")
    with pytest.raises(UsageError, match="coverage of drafts must be between 0 and 1"):
        Drafting("auto", 0.7, -0.1)


def test_launch_lines_over_nodes() -> None:
    eight = vllm_lines("m", deployment(ParallelPlan(tp=2, dp=8)), per_node=4)
    assert eight[3].startswith("CUDA_VISIBLE_DEVICES=2,3 vllm") and eight[3].endswith("--port 8001  # node 1")
    wide = deployment(ParallelPlan(tp=4, attention_dp=2, ep=8), mixture())
    first, second = vllm_lines("m", wide, per_node=4)
    assert "--data-parallel-size-local 1" in first and second.endswith(
        "--data-parallel-start-rank 1  # node 1"
    )
    ranks = sglang_lines("m", wide, per_node=4)
    assert ["--node-rank 0" in ranks[0], "--node-rank 1" in ranks[1], len(ranks)] == [True, True, 2]
    deep = vllm_lines("m", deployment(ParallelPlan(tp=4, pp=2)), per_node=4)
    assert len(deep) == 1 and "--distributed-executor-backend ray" in deep[0]


def test_the_bench_line_is_one_that_bench_takes() -> None:
    from typer.testing import CliRunner

    from llmtool.cli.app import app

    words = shlex.split(bench_line(load(10), parse_slos(["ttft:500"]), None))
    assert words[:2] == ["llmtool", "bench"]
    shown = CliRunner().invoke(app, [*words[1:], "--print-config", "--json"])
    assert shown.exit_code == 0, shown.output


def test_the_simulated_requests_as_a_trace(tmp_path: Path) -> None:
    workload = load(10)
    write_trace(workload, tmp_path / "t.csv")
    assert guess_format(tmp_path / "t.csv") == "lengths"
    back = make_workload(None, 100, trace=tmp_path / "t.csv")
    assert [(r.input_len, r.output_len) for r in back.rows] == [
        (r.input_len, r.output_len) for r in workload.rows
    ]
    assert [r.arrival for r in back.rows] == pytest.approx([r.arrival for r in workload.rows], abs=1e-5)
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(UsageError, match="is empty"):
        guess_format(tmp_path / "e.csv")


@pytest.mark.parametrize("name", NAMED)
def test_named_workloads_have_their_published_means(name: str) -> None:
    workload = make_workload(name, 4000, request_rate=4.0)
    assert workload.mean_input == pytest.approx(NAMED[name].mean_input, rel=0.15)
    assert workload.mean_output == pytest.approx(NAMED[name].mean_output, rel=0.15)
    assert workload.rate == pytest.approx(4.0)
    assert make_workload(name, 50, concurrency=7).concurrency == 7


# -- what if, capacity -------------------------------------------------------------------------------------------


def test_what_if() -> None:
    base = Scenario("", deployment(ParallelPlan(tp=2)), Cluster(device(), 2), load(20))

    def answer(question: str) -> Scenario:
        return ask(question, base, lambda name: device(name=name, bandwidth=400e9), lambda name: mixture())

    assert answer("rate=2").workload.rate == pytest.approx(2 * (base.workload.rate or 0))
    assert answer("device=big").cluster.device.bandwidth == 400e9
    assert answer("dtype=fp8").deployment.dtype == "fp8"
    assert answer("max-num-seqs=500").deployment.budget == 500
    assert answer("model=other").deployment.ir.is_moe
    with pytest.raises(UsageError, match="how often drafts are right"):
        answer("speculation=3")
    for spec in ("3", "auto"):
        drafts = replace(base, law=(0.9, 1.0))
        asked = ask(f"speculation={spec}", drafts, lambda name: device(), lambda name: mixture())
        assert asked.deployment.drafting == Drafting(spec, 0.9)
        few = load(20, 2.0)  # a load at which a verified token costs little
        plain, with_drafts = (run(d, few) for d in (base.deployment, asked.deployment))
        assert with_drafts.statistic("tpot", None) < 0.7 * plain.statistic("tpot", None)
    assert answer("speculation=off").deployment.drafting is None
    deep = replace(base, deployment=deployment(ParallelPlan(pp=2)), law=(0.9, 1.0))
    with pytest.raises(InfeasibleError, match="in a pipeline"):
        ask("speculation=3", deep, lambda name: device(), lambda name: mixture())
    for bad in ("rate=-1", "dtype=fp3", "colour=blue", "rate", "device"):
        with pytest.raises(UsageError):
            answer(bad)
    cut = replace(base, deployment=deployment(ParallelPlan(tp=16), dense()))
    with pytest.raises(InfeasibleError, match="cannot run under TP16"):
        ask("model=other", cut, lambda name: device(), lambda name: mixture())


def test_capacity_is_where_the_objectives_just_hold() -> None:
    d, slos = deployment(ParallelPlan()), parse_slos(["tpot:p90:5", "ttft:p90:300"])
    workload = load(80, 1.0)
    found = capacity(lambda w: run(d, w), workload, slos)
    assert found is not None
    base = workload.rate or 1.0
    assert holds(run(d, workload.faster(found.rate / base)), slos)
    assert not holds(run(d, workload.faster(found.next_rate / base)), slos)
    assert found.next_rate / found.rate <= 1.02
    assert capacity(lambda w: run(d, w), workload, parse_slos(["tpot:p90:0.001"])) is None
    with pytest.raises(UsageError, match="needs objectives"):
        capacity(lambda w: run(d, w), workload, ())


# -- calibration -------------------------------------------------------------------------------------------------


def test_constants_are_found_again(tmp_path: Path) -> None:
    """Runs made with other constants: the fitted profile predicts them, and another load."""
    true = replace(ENGINE, host_step=1.6e-4, memory=1.2, compute=1.3, request=2e-3)
    spec = device()

    def runner(workload: Workload) -> Observation:
        def go(profile: EngineProfile):  # type: ignore[no-untyped-def]
            d = replace(deployment(ParallelPlan()), engine=profile)
            return simulate(d, Cluster(spec, 1), Ops(spec, None), workload)

        made = go(true)
        measured = {name: made.statistic(name, None) for name in ("ttft", "tpot")}
        return Observation(go, measured | {"throughput": made.output_throughput})

    found = calibrate(ENGINE, [runner(load(40, 5.0)), runner(load(40, 60.0, 1))], freedom=3.0)
    left = {
        name: max(abs(x / m - 1) for n, m, _, x in found.errors if n == name) for name, *_ in found.errors
    }
    assert left["tpot"] < 0.02 and left["throughput"] < 0.02 and left["ttft"] < 0.15 and found.residual < 0.15
    other = runner(load(60, 25.0, 2))
    result = other.simulate(found.profile)
    assert result.statistic("tpot", None) == pytest.approx(other.measured["tpot"], rel=0.05)
    file = tmp_path / "calibration.toml"
    profile = replace(find_engine("vllm"), host_step=0.123, memory=1.5)
    store("h100", profile, "mine.json", file)
    store("l4", replace(profile, host_step=0.5), "other.json", file)
    back, calibrated = engine_for("h100", "vllm", file)
    assert calibrated and back.host_step == pytest.approx(0.123) and back.memory == 1.5
    assert engine_for("h100", "sglang", file) == (find_engine("sglang"), False)
    file.write_text("[")
    with pytest.raises(UsageError, match="cannot be read"):
        engine_for("h100", "vllm", file)


def test_tiers_widen_the_band_as_knowledge_shrinks() -> None:
    from llmtool.hardware import find_device
    from llmtool.sim.ops import load_pack

    own, borrowed = find_device("h100"), find_device("h100-pcie")
    bands = [
        tier_of(own, load_pack(own), False, True).band,
        tier_of(own, load_pack(own), False, False).band,
        tier_of(borrowed, load_pack(borrowed), False, False).band,
        tier_of(find_device("cpu"), None, False, False).band,
    ]
    assert bands == sorted(bands) and len(set(bands)) == 4
