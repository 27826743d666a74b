"""Bytes of a device under a plan: known answers, and conservation over devices."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.hardware import find_device
from llmtool.modelspec.catalogue import published
from llmtool.sim.deployment import Deployment
from llmtool.sim.engines import find_engine
from llmtool.sim.ir import ModelIR, read_ir
from llmtool.sim.memory import device_memory, kv_layers, stage_weights, state_bytes
from llmtool.sim.parallel import ParallelPlan, why_invalid
from tests.plan.made import dense, mixture


def known(name: str) -> ModelIR:
    config = published(name)
    assert config is not None
    return read_ir(config, name)


def test_llama_70b_over_two_devices() -> None:
    ir = known("llama-3-70b")
    whole = stage_weights(ir, ParallelPlan(tp=2), 0, 80, "bf16")
    assert whole / 1e9 == pytest.approx(70.6, abs=0.05)
    blocks = whole - 2 * ir.embedding_parameters * 2 / 2
    assert blocks / 2**30 == pytest.approx(63.8, abs=0.05)  # what APEX prints: without embedding and head


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
@settings(max_examples=20, deadline=None)
def test_weights_over_all_devices_are_the_model(tp: int, pp: int, adp: int) -> None:
    """Norms and routers are repeated; everything else is cut, but for what attention-DP repeats."""
    for ir in (dense(), mixture()):
        plan = ParallelPlan(tp=tp, pp=pp, attention_dp=adp)
        assert not why_invalid(plan, ir)
        first, total = 0, 0.0
        for count in plan.stages(ir.num_layers):
            total += plan.stage * stage_weights(ir, plan, first, count, "bf16")
            first += count
        mixers = sum(ir.mixer_parameters(m) for b in ir.blocks for m in b.mixers)
        repeated = mixers * (adp - 1) * 2 + (plan.stage - 1) * 2 * (
            sum(b.extra + (ir.hidden * 8 if ir.is_moe else 0) for b in ir.blocks) + ir.hidden
        )
        assert total == pytest.approx(2 * ir.num_parameters + repeated)


def test_kv_heads_are_repeated_where_there_are_fewer_than_devices() -> None:
    ir = known("llama-3.1-70b")
    per_token = [
        sum(s.bytes_per_token for s in kv_layers(ir, ParallelPlan(tp=tp), 0, 80, "bf16")) for tp in (1, 8, 16)
    ]
    assert per_token == [80 * 4096, 80 * 512, 80 * 512]
    latent = known("deepseek-v3")
    for tp in (1, 8):
        assert (
            sum(s.bytes_per_token for s in kv_layers(latent, ParallelPlan(tp=tp), 0, 61, "bf16")) == 61 * 1152
        )


def test_recurrent_states_take_memory_per_sequence() -> None:
    ir = known("qwen3-next-80b-a3b")
    # 36 gated delta nets: 32 heads x 128 x 128 in 4 bytes, and a convolution over 3 tokens before it in 2.
    states = 36 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 16 * 128 + 32 * 128))
    assert state_bytes(ir, ParallelPlan(), 0, 48) == states == 36 * 2_146_304
    assert state_bytes(ir, ParallelPlan(tp=2), 0, 48) == states / 2


def test_vllm_s_own_count_of_pages() -> None:
    """vLLM 0.19 on an RTX 4090 (25,250,627,584 bytes), Llama-3.1-8B, 2,048 tokens a step, 256 sequences, printed
    2,588 blocks of 16 tokens."""
    engine = find_engine("vllm")
    d = Deployment(known("llama-3.1-8b"), ParallelPlan(), engine, budget=2048, max_seqs=256, max_len=4096)
    assert device_memory(d, find_device("rtx-4090")).pages == pytest.approx(2588, rel=0.05)


def test_more_sequences_and_longer_steps_leave_fewer_pages() -> None:
    device = find_device("h100")

    def pages(**changes: int) -> int:
        return device_memory(
            Deployment(known("llama-3.1-8b"), ParallelPlan(), find_engine("vllm"), **changes), device
        ).pages

    assert pages(budget=8192) < pages(budget=2048)
    assert pages(max_seqs=1024) < pages(max_seqs=64)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (ParallelPlan(tp=3), "heads do not divide"),
        (ParallelPlan(ep=2, tp=2), "no experts"),
        (ParallelPlan(pp=9), "too few for 9 stages"),
        (ParallelPlan(pp=2, layers=(3, 3)), "sum to 8"),
        (ParallelPlan(tp=0), "at least 1"),
    ],
)
def test_invalid_plans_say_why(plan: ParallelPlan, says: str) -> None:
    assert says in why_invalid(plan, dense())
