"""A layer's MLP: dense, or a mixture of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from llmtool_kernels.cpu.linear import PackedLinear
from torch import Tensor

from llmtool.models.ops import gated, linear
from llmtool.models.weights import DenseWeights, ExpertWeights
from llmtool.modelspec import GateSpec, MoESpec, RouterSpec


def dense(x: Tensor, w: DenseWeights, gate: GateSpec) -> Tensor:
    """x [N, hidden] -> [N, hidden]."""
    inner = linear(x, w.gate_up, w.gate_up_bias)
    if not isinstance(w.gate_up, PackedLinear):  # which has joined them
        inner = gated(inner, gate)
    return linear(inner, w.down, w.down_bias)


def mixture(x: Tensor, w: ExpertWeights, spec: MoESpec) -> Tensor:
    """x [N, hidden] -> [N, hidden]: a token's chosen experts, weighed, in the order of their numbers."""
    weights, chosen = route(x, w, spec.router)
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # places in `chosen` by expert
    visits = torch.bincount(chosen.flatten(), minlength=spec.router.num_experts).tolist()
    out = torch.zeros_like(x)
    start = 0
    for expert, count in enumerate(visits):
        if not count:
            continue
        places = order[start : start + count]
        start += count
        rows = places // top_k
        y = dense(x[rows], _expert(w, expert), spec.gate) * weights.flatten()[places, None]
        out.index_add_(0, rows, y.to(x.dtype))
    if w.shared is None:
        return out
    shared = dense(x, w.shared, spec.gate)
    if w.shared_gate is not None:
        shared = torch.sigmoid(linear(x, w.shared_gate)) * shared
    return out + shared


def route(x: Tensor, w: ExpertWeights, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Weights float32 and numbers int64 of the experts of each token, both [N, top_k]."""
    logits = F.linear(x.float(), w.router, w.router_bias)  # [N, E]
    scores = logits.softmax(-1) if spec.scoring == "softmax" else logits.sigmoid()
    ranked = scores if w.correction is None else scores + w.correction
    if spec.groups > 1:
        by_group = ranked.unflatten(-1, (spec.groups, -1))  # [N, groups, E / groups]
        best = by_group.topk(1 if spec.group_by == "max" else 2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(-1, best.topk(spec.top_groups, dim=-1).indices, True)
        ranked = by_group.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    chosen = ranked.topk(spec.top_k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    if spec.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * spec.scale, chosen


def _expert(w: ExpertWeights, i: int) -> DenseWeights:
    return DenseWeights(
        w.gate_up[i],
        w.down[i],
        None if w.gate_up_bias is None else w.gate_up_bias[i],
        None if w.down_bias is None else w.down_bias[i],
    )
