"""A layer's MLP: dense, or a mixture of experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from llmtool_kernels.cpu.linear import PackedLinear
from torch import Tensor

from llmtool.models.ops import gated, linear
from llmtool.models.part import Part
from llmtool.models.weights import DenseWeights, ExpertWeights
from llmtool.modelspec import GateSpec, MoESpec, RouterSpec
from llmtool.parallel.mesh import split


def dense(x: Tensor, w: DenseWeights, gate: GateSpec) -> Tensor:
    """x [N, hidden] -> [N, hidden]."""
    inner = linear(x, w.gate_up, w.gate_up_bias)
    if not isinstance(w.gate_up, PackedLinear):  # which has joined them
        inner = gated(inner, gate)
    return linear(inner, w.down, w.down_bias)


def mixture(x: Tensor, w: ExpertWeights, spec: MoESpec) -> Tensor:
    """x [N, hidden] -> [N, hidden]: a token's chosen experts, weighed, in the order of their numbers."""
    out = _chosen(x, w, spec)
    shared = _shared(x, w, spec)
    return out if shared is None else out + shared


def shared_mixture(x: Tensor, w: ExpertWeights, spec: MoESpec, part: Part) -> Tensor:
    """The same, x the same on all ranks of a stage, each of which has some of the experts, or parts of them.

    Where each expert lies whole on one rank, a rank takes its share of the tokens, which go to where their experts
    are and come back; else each computes what it has of all tokens, and they are summed.
    """
    shared = _shared(x, w, spec)
    if not part.shard.exchanges:
        out = _chosen(x, w, spec)
        return part.peers.sum(out if shared is None else out + shared)
    mesh, me = part.shard.mesh, part.shard.place.tensor
    mine = split(len(x), mesh.tp)
    own = _exchanged(x[mine[me].start : mine[me].stop], w, spec, part)
    out = part.peers.gather(own, [len(rows) for rows in mine])
    return out if shared is None else out + part.peers.sum(shared)


def _chosen(x: Tensor, w: ExpertWeights, spec: MoESpec) -> Tensor:
    """What the experts that are here add of tokens x [N, hidden]."""
    weights, chosen = route(x, w, spec.router)
    top_k = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # places in `chosen` by expert
    visits = torch.bincount(chosen.flatten(), minlength=spec.router.num_experts).tolist()
    out = torch.zeros_like(x)
    start, here = 0, spec.experts
    for expert, count in enumerate(visits):
        places = order[start : start + count]
        start += count
        if not count or expert not in here:
            continue
        rows = places // top_k
        y = dense(x[rows], _expert(w, expert - here.start), spec.gate) * weights.flatten()[places, None]
        out.index_add_(0, rows, y.to(x.dtype))
    return out


def _exchanged(x: Tensor, w: ExpertWeights, spec: MoESpec, part: Part) -> Tensor:
    """x [n, hidden] -> [n, hidden], tokens of this rank alone, over experts that lie whole on one rank each."""
    peers, mesh = part.peers, part.shard.mesh
    weights, chosen = route(x, w, spec.router)
    chosen, by_number = chosen.sort(dim=1)  # summed in the order of their numbers, as elsewhere
    weights, top_k = weights.gather(1, by_number), chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # visits by expert, and so by the rank that has it
    counts = torch.bincount(chosen.flatten(), minlength=spec.router.num_experts)
    owners = split(spec.router.num_experts, mesh.ep)
    sizes = [len(owner) for owner in owners]
    # How many visits each of its experts gets from whom: [ranks, own experts].
    own = len(spec.experts)
    coming = peers.exchange(counts, sizes, [own] * mesh.ep).view(mesh.ep, own)
    send = [int(n.sum()) for n in counts.split(sizes)]
    receive = coming.sum(dim=1).tolist()
    arrived = peers.exchange(x[order // top_k], send, receive)
    expert_of = torch.arange(own, device=x.device).repeat(mesh.ep).repeat_interleave(coming.flatten())
    by_expert = expert_of.argsort(stable=True)
    done, start = torch.empty_like(arrived), 0
    for expert, count in enumerate(coming.sum(dim=0).tolist()):
        rows = by_expert[start : start + count]
        start += count
        if count:
            done[rows] = dense(arrived[rows], _expert(w, expert), spec.gate)
    back = peers.exchange(done, receive, send)
    visits = torch.empty_like(back)
    visits[order] = back
    y = (visits.unflatten(0, (-1, top_k)) * weights[..., None]).to(x.dtype)  # [n, top_k, hidden]
    out = torch.zeros_like(x)
    for k in range(top_k):
        out += y[:, k]
    return out


def _shared(x: Tensor, w: ExpertWeights, spec: MoESpec) -> Tensor | None:
    """What the expert adds that every token visits, or what is here of it."""
    if w.shared is None:
        return None
    shared = dense(x, w.shared, spec.gate)
    if w.shared_gate is not None:
        shared = torch.sigmoid(linear(x, w.shared_gate)) * shared
    return shared


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
