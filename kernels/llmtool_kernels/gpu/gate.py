"""What a gated MLP does between its two products: act(gate) * up, in one pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmtool_kernels.gpu.platform import load32

KINDS = (
    "silu",
    "gelu",
    "gelu_tanh",
    "clamped",
)  # as llmtool.modelspec.parts.GateSpec, which kernels do not know
BLOCK = 1024


@triton.jit
def gate_kernel(
    out, gate_up, row_stride, alpha, limit, INNER: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (N, ceil(INNER / BLOCK)). out [N, INNER], gate_up [N, 2 * INNER] of rows row_stride apart."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < INNER
    gate = load32(gate_up + row * row_stride + d, inside)
    up = load32(gate_up + row * row_stride + INNER + d, inside)
    if KIND == "clamped":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        act = gate * tl.sigmoid(alpha * gate)
    elif KIND == "silu":
        act = gate * tl.sigmoid(gate)
    elif KIND == "gelu":
        act = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(z)) is sigmoid(2 z).
        act = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * INNER + d, (act * up).to(out.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, kind: str, alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    """gate_up [N, 2 * inner], gates then ups -> [N, inner]; computed in float32. Reference: `gated_reference`."""
    assert kind in KINDS
    n, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, inner, dtype=gate_up.dtype, device=gate_up.device)
    assert gate_up.stride(1) == 1
    if n:
        gate_kernel[(n, triton.cdiv(inner, BLOCK))](
            out, gate_up, gate_up.stride(0), alpha, limit, INNER=inner, KIND=kind, BLOCK=BLOCK
        )
    return out


def gated_reference(gate_up: Tensor, kind: str, alpha: float = 1.0, limit: float = 0.0) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    if kind == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        out = gate * torch.sigmoid(alpha * gate) * (up + 1)
    elif kind == "silu":
        out = F.silu(gate) * up
    else:
        out = F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up
    return out.to(gate_up.dtype)
