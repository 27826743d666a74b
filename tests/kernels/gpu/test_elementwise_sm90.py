"""The kernels around attention as Hopper would run them: nothing spills, and rows move 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch
from llmtool_kernels.attention import AttentionBatch, KVLayout
from llmtool_kernels.gpu import sample, verify
from llmtool_kernels.gpu.gate import BLOCK as GATE_BLOCK
from llmtool_kernels.gpu.gate import KINDS, gate_kernel
from llmtool_kernels.gpu.norm import norm_kernel, num_warps
from llmtool_kernels.gpu.pages import BLOCK as COPY_BLOCK
from llmtool_kernels.gpu.pages import copy_kernel
from llmtool_kernels.gpu.qkv import launch, qkv_kernel

from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.sm90 import Compiled, compiled

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles; the interpreter does not")


def check(built: Compiled) -> None:
    assert built.spills == 0, f"{built.registers} registers and {built.spills} bytes spilled"
    assert "ld.global.v4.b32" in built.ptx and "st.global.v4.b32" in built.ptx


@pytest.mark.parametrize("size", [2048, 8192])
def test_norm(size: int) -> None:
    x = torch.empty(4, size, dtype=torch.bfloat16)
    weight = torch.empty(size, dtype=torch.bfloat16)
    constants = {"SIZE": size, "BLOCK": size, "ADD": True, "NORM_X": True, "NORM": True, "SCALED": True}
    check(
        compiled(norm_kernel, (x, x, x, x, weight, weight, size, size, 1e-5, 0.5), constants, num_warps(size))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gate(kind: str) -> None:
    x = torch.empty(4, 28672, dtype=torch.bfloat16)
    constants = {"INNER": 14336, "KIND": kind, "BLOCK": GATE_BLOCK}
    check(compiled(gate_kernel, (x, x, 28672, 1.0, 7.0), constants))


@pytest.mark.parametrize(
    ("norm", "q_heads", "stored"),
    [(None, 32, None), ("head", 32, None), ("all", 40, None), ("head", 32, torch.float8_e4m3fn)],
)
def test_qkv(norm: str | None, q_heads: int, stored: torch.dtype | None) -> None:
    qkv = torch.empty(4, (q_heads + 16) * 128, dtype=torch.bfloat16)
    q, k, v = (t.unflatten(-1, (-1, 128)) for t in qkv.split((q_heads * 128, 1024, 1024), dim=-1))
    batch = AttentionBatch.build([4], [4], [[0]], 16)
    angle = torch.empty(4, 1, 64)
    weights = (None, None) if norm is None else (q[0].flatten(), k[0].flatten())
    arena = torch.empty(2**18, dtype=torch.uint8)
    layout = KVLayout(0, 16, 8, 128, 128, stored)
    args, constants, _ = launch(q, k, v, arena, layout, batch, norm, *weights, 1e-5, (angle, angle))
    built = compiled(qkv_kernel, args, constants)
    if stored is None:
        check(built)
    else:  # eight elements of a thread are eight bytes
        assert built.spills == 0
        assert "ld.global.v4.b32" in built.ptx and "st.global.v2.b32" in built.ptx


@pytest.mark.parametrize("filtered", [False, True])
def test_sample(filtered: bool) -> None:
    """No spills; the logits of Llama 3's vocabulary are read 16 bytes at a time."""
    logits = torch.empty(4, 128256)
    ints, floats = torch.empty(4, dtype=torch.int64), torch.empty(4)
    filters = (ints, torch.empty(4, dtype=torch.float64), floats) if filtered else None
    args = sample.arguments(ints, logits, ints, ints, floats, filters)
    built = compiled(sample.sample_kernel, args, sample.constants(logits, filters), sample.NUM_WARPS)
    assert built.spills == 0, f"{built.registers} registers and {built.spills} bytes spilled"
    assert "ld.global.v4.b32" in built.ptx


def test_page_copy() -> None:
    arena = torch.empty(2**15, dtype=torch.int64)
    built = compiled(copy_kernel, (arena, arena, arena, arena, 4096), {"BLOCK": COPY_BLOCK})
    assert built.spills == 0
    assert "ld.global.v2.b64" in built.ptx and "st.global.v2.b64" in built.ptx


@pytest.mark.parametrize("tree", [False, True])
def test_verify(tree: bool) -> None:
    ids, starts = torch.empty(512, dtype=torch.int64), torch.empty(9, dtype=torch.int32)
    out = verify.Verdict(starts, ids, ids)
    args = verify.arguments(out, ids, ids, starts, ids if tree else None)
    built = compiled(verify.verify_kernel, args, verify.constants([64] * 8, tree), verify.NUM_WARPS)
    assert built.spills == 0, f"{built.registers} registers and {built.spills} bytes spilled"
