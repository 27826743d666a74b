"""The operations a decoder is made of, one function each, in plain torch; on CUDA its kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from llmtool_kernels import dispatch
from torch import Tensor

from llmtool.models.weights import Matrix
from llmtool.modelspec import GateSpec

Rotation = tuple[Tensor, Tensor]  # cos, sin: each float32 [N, 1, rotated dims / 2]


def embed(ids: Tensor, table: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows ids [N] of table [vocab, hidden]."""
    return F.embedding(ids, table) if isinstance(table, Tensor) else table.rows(ids).to(dtype)


def embed_part(ids: Tensor, table: Matrix, dtype: torch.dtype, rows: range) -> Tensor:
    """The same where the table has only these rows of the vocabulary: others are zero."""
    here = (ids >= rows.start) & (ids < rows.stop)
    found = embed(torch.where(here, ids - rows.start, 0), table, dtype)
    return found.masked_fill(~here[:, None], 0)


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [N, in] by weight [out, in] -> [N, out]. A bound weight has its bias with it."""
    return F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in x's type; the mean of squares in float32.

    A weight in float32 beside narrower x (Gemma's 1 + w) is applied before the result is narrowed.
    """
    if dispatch.on_gpu(x):
        from llmtool_kernels.gpu import norm

        return norm.rms_norm(x, weight, eps)
    if weight.dtype == x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def add_rms_norm(
    hidden: Tensor,
    x: Tensor,
    x_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The residual stream after a block that returned x, and what the next block reads; all [N, hidden].

    hidden + scale * (x normed by x_weight), and that normed by weight; a weight of None stands for no norm.
    """
    if dispatch.on_gpu(hidden):
        from llmtool_kernels.gpu import norm

        return norm.add_rms_norm(hidden, x, x_weight, weight, eps, scale)
    if x_weight is not None:
        x = rms_norm(x, x_weight, eps)
    hidden = hidden + (x if scale == 1.0 else x * scale)
    return hidden, hidden if weight is None else rms_norm(hidden, weight, eps)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """The leading dimensions of heads x [N, H, D] turned in float32; i and i + half of them are a pair."""
    cos, sin = rotation
    dim = 2 * cos.shape[-1]
    a, b = x[..., :dim].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return turned if dim == x.shape[-1] else torch.cat((turned, x[..., dim:]), dim=-1)


def gated(gate_up: Tensor, spec: GateSpec) -> Tensor:
    """gate_up [N, 2 * inner], gates then ups -> [N, inner]."""
    if dispatch.on_gpu(gate_up):
        from llmtool_kernels.gpu import gate as kernel

        return kernel.gated(gate_up, spec.kind, spec.alpha, spec.limit)
    gate, up = gate_up.chunk(2, dim=-1)
    if spec.kind == "clamped":
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
        return gate * torch.sigmoid(spec.alpha * gate) * (up + 1)
    if spec.kind == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if spec.kind == "gelu_tanh" else "none") * up
