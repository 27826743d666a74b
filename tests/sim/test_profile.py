"""A layer profile becomes tables: its own points come back, and mixed steps cost what was measured for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtool.errors import UsageError
from llmtool.hardware import Cluster
from llmtool.sim.ops import Ops
from llmtool.sim.parallel import ParallelPlan
from llmtool.sim.profile import import_profile
from llmtool.sim.stepcost import Batch, PlanCost
from tests.plan.made import dense, deployment, device

TOKENS = (1, 8, 64, 512)


def profile(folder: Path, beside: float = 2.0) -> None:
    """Kernels of made-up times; decoding attention takes `beside` times as long next to a prompt chunk."""
    (folder / "tp1").mkdir(parents=True)
    layers = {"qkv_proj": 40, "o_proj": 20, "gate_up_proj": 90, "down_proj": 50, "layernorm": 3, "act_fn": 7,
              "rotary_emb": 5}  # fmt: skip
    lines = [f"{name},{m},{us * (1 + m / 512)}" for name, us in layers.items() for m in TOKENS]
    (folder / "tp1" / "dense.csv").write_text("layer,tokens,time_us\n" + "\n".join(lines) + "\n")
    heads = [f"{name},{n},{us}" for name, us in (("lm_head", 100), ("sampler", 30)) for n in TOKENS]
    (folder / "tp1" / "per_sequence.csv").write_text("layer,sequences,time_us\n" + "\n".join(heads) + "\n")
    sizes = [(n, kv) for n in (1, 8, 64) for kv in (64, 512)]
    rows = [(0, 0, n, kv, decode(n, kv)) for n, kv in sizes]
    rows += [(chunk, 0, 0, 0, prompt(chunk)) for chunk in (16, 256)]
    rows += [(c, 0, n, kv, prompt(c) + beside * decode(n, kv)) for c in (16, 256) for n, kv in sizes]
    text = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
    (folder / "tp1" / "attention.csv").write_text(
        text + "\n".join(",".join(map(str, r)) for r in rows) + "\n"
    )


def decode(n: int, kv: int) -> float:
    return 5 + n * kv * 0.002


def prompt(chunk: int) -> float:
    return 4 + chunk * 0.05


@pytest.mark.parametrize("beside", [1.0, 2.0])
def test_decoding_beside_a_prompt_costs_what_was_measured(tmp_path: Path, beside: float) -> None:
    profile(tmp_path, beside)
    ir, spec = dense(), device()
    tables = import_profile(tmp_path, ir, 1, spec)
    cost = PlanCost(deployment(ParallelPlan()), Cluster(spec, 1), Ops(spec, tables))
    attention = [
        cost.seconds(Batch(n, n * 512, [(256, 0)])) - cost.linear(0, n + 256).seconds - cost.host(n + 1)
        for n in (8, 64)
    ]
    wanted = [ir.num_layers * (prompt(256) + beside * decode(n, 512)) * 1e-6 for n in (8, 64)]
    assert attention == pytest.approx(wanted, rel=0.06)
    batch = Batch(64, 64 * 512, [(256, 0)])
    assert cost.breakdown(batch).seconds == pytest.approx(cost.seconds(batch), rel=0.02)


def test_a_profile_s_own_points_come_back(tmp_path: Path) -> None:
    profile(tmp_path)
    ir, spec = dense(), device()
    ops = Ops(spec, import_profile(tmp_path, ir, 1, spec))
    for m in TOKENS:
        assert ops.gemm(m, 1024, 1024, "bf16").seconds == pytest.approx(20e-6 * (1 + m / 512), rel=0.03)
        assert ops.stream(6.0 * m * 4096, "act").seconds == pytest.approx(7e-6 * (1 + m / 512), rel=0.03)
        assert ops.stream(8.0 * m * ir.vocab, "sampler").seconds == pytest.approx(30e-6, rel=0.03)
        assert ops.stream(6.0 * m * 1024).seconds == pytest.approx(3e-6 * (1 + m / 512), rel=0.03)


def test_what_is_no_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Cannot read the profile .*dense\.csv"):
        import_profile(tmp_path, dense(), 1, device())
