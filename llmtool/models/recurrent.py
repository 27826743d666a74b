"""Layers with a state: LFM2's gated short convolution, and Mamba-2's state space (arXiv 2405.21060).

A state lies in a page of its group, and a step reads it where the tokens before it left it and writes it where the
block table says. Sequences with one token are computed together, the others one after the other, in blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from llmtool_kernels.attention import UNIT
from torch import Tensor

from llmtool.models.ops import linear
from llmtool.models.part import Part
from llmtool.models.weights import Mamba2Weights, MixerWeights, ShortConvWeights
from llmtool.modelspec import Mamba2Spec, MixerSpec

BLOCK = 64  # tokens that a state space computes as one product


@dataclass(frozen=True, slots=True)
class StateChunk:
    """Several tokens of one sequence: flat rows from `start`. read: the unit its state is read at, None for a
    sequence's start. writes: (row just past, unit): the state after these rows goes there."""

    start: int
    read: int | None
    writes: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class StateBatch:
    """A step's states in one group. rows, reads, writes: int64 [S], sequences with one token: its flat row and the
    units; fresh: bool [S], those with nothing before them, whose reads mean nothing."""

    rows: Tensor
    reads: Tensor
    writes: Tensor
    fresh: Tensor
    chunks: Sequence[StateChunk] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class StatePlace:
    """Where a layer's state lies in its group's pages: from `offset` bytes on."""

    offset: int
    group: int


LayerState = tuple[Tensor, StatePlace, StateBatch]  # the arena, the place, the step


def state_rows(arena: Tensor, offset: int, width: int, dtype: torch.dtype) -> Tensor:
    """[U, width] elements of dtype, row u being those at `offset` bytes into a page at unit u; rows overlap."""
    elements = arena.view(dtype)
    unit, start = UNIT // dtype.itemsize, offset // dtype.itemsize
    return elements.as_strided(((elements.numel() - start - width) // unit + 1, width), (unit, 1), start)


def mix(
    x: Tensor, w: MixerWeights, spec: MixerSpec, eps: float, state: LayerState, part: Part | None = None
) -> Tensor:
    """What the layer returns, [N, hidden], for x [N, hidden]; its states move on. part: whose heads these are,
    where they are not all; what is returned is then to be summed."""
    if isinstance(w, ShortConvWeights):
        return _short_conv(x, w, state)
    assert isinstance(spec, Mamba2Spec)
    return _mamba2(x, w, spec, eps, state, part)


def _short_conv(x: Tensor, w: ShortConvWeights, state: LayerState) -> Tensor:
    b, c, inner = linear(x, w.into, w.into_bias).chunk(3, dim=-1)
    mixed = _run(state, _Conv(w.conv, w.conv_bias, state), b * inner)
    return linear(c * mixed, w.out, w.out_bias)


def _mamba2(
    x: Tensor, w: Mamba2Weights, spec: Mamba2Spec, eps: float, state: LayerState, part: Part | None
) -> Tensor:
    z, channels, steps = linear(x, w.into, w.into_bias).split(
        (spec.inner, spec.channels, spec.num_heads), dim=-1
    )
    channels = F.silu(_run(state, _Conv(w.conv, w.conv_bias, state), channels))
    group = spec.num_groups * spec.state_dim
    value, b, c = channels.float().split((spec.inner, group, group), dim=-1)
    step = F.softplus(steps.float() + w.steps).clamp(*spec.step_limits)  # [N, H]
    scan = _Scan(w, spec, state)
    parts = (
        value.unflatten(-1, (spec.num_heads, -1)),  # [N, H, P]
        step,
        b.unflatten(-1, (spec.num_groups, -1)),  # [N, G, S]
        c.unflatten(-1, (spec.num_groups, -1)),
    )
    y = _run(state, scan, *parts) + w.skip[:, None] * parts[0]
    return linear(_gate(y.flatten(1), z, w, spec, eps, part).to(x.dtype), w.out, w.out_bias)


def _gate(y: Tensor, z: Tensor, w: Mamba2Weights, spec: Mamba2Spec, eps: float, part: Part | None) -> Tensor:
    """y [N, inner] in float32, its gate z."""
    gate = F.silu(z.float())
    if w.norm is None:
        return y * gate
    if spec.gated_norm == "after":
        y = y * gate
    grouped = y.unflatten(-1, (spec.num_groups, -1))
    if part is None:
        normed = F.rms_norm(grouped, (grouped.shape[-1],), None, eps)
    else:
        normed = grouped * torch.rsqrt(_group_means(grouped, part) + eps)[..., None]
    y = normed.flatten(-2) * w.norm.float()
    return y if spec.gated_norm == "after" else y * gate


def _group_means(y: Tensor, part: Part) -> Tensor:
    """Mean squares [N, G] over groups of which other ranks may have heads too. y: [N, G, own channels]."""
    shard = part.shard
    mixers = {layer.mixer for layer in shard.whole.layers if isinstance(layer.mixer, Mamba2Spec)}
    groups = {p.mixer_groups for p in shard.parts if p.mixer_groups}
    (whole,), (mine,) = mixers, groups  # a family's mixers are alike
    squares = y.new_zeros(len(y), whole.num_groups)
    squares[:, mine.start : mine.stop] = y.square().sum(-1)
    squares = part.peers.sum(squares)
    return squares[:, mine.start : mine.stop] / (whole.inner // whole.num_groups)


Step = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class _Conv:
    """A causal convolution, each channel by itself. Its state is the last kernel - 1 inputs."""

    weight: Tensor  # [C, K]
    bias: Tensor | None
    state: LayerState

    @property
    def rows(self) -> Tensor:
        arena, place, _ = self.state
        width = self.weight.shape[0] * (self.weight.shape[1] - 1)
        return state_rows(arena, place.offset, width, self.weight.dtype)

    def start(self, count: int) -> Tensor:
        channels, kernel = self.weight.shape
        return self.weight.new_zeros(count, (kernel - 1) * channels)

    def singles(self, before: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """before [S, (K - 1) * C], x [S, C] -> y [S, C], after."""
        window = torch.cat((before, x), dim=1).unflatten(1, (self.weight.shape[1], -1))  # [S, K, C]
        y = (window * self.weight.T).sum(1)
        return y if self.bias is None else y + self.bias, window[:, 1:].flatten(1)

    def chunk(self, before: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """before [1, (K - 1) * C], x [L, C]."""
        kernel = self.weight.shape[1]
        inputs = torch.cat((before.view(kernel - 1, -1), x))  # [K - 1 + L, C]
        y = F.conv1d(inputs.T[None], self.weight[:, None], self.bias, groups=len(self.weight))[0].T
        return y, inputs[len(x) :].reshape(1, -1)


@dataclass(frozen=True, slots=True)
class _Scan:
    """h <- exp(step * A) h + step * x (x) B, y = C h: a state [P, S] per head, in float32."""

    w: Mamba2Weights
    spec: Mamba2Spec
    state: LayerState

    @property
    def rows(self) -> Tensor:
        arena, place, _ = self.state
        conv = (self.spec.kernel - 1) * self.spec.channels * self.w.conv.element_size()
        width = self.spec.inner * self.spec.state_dim
        return state_rows(arena, place.offset + conv, width, torch.float32)

    def start(self, count: int) -> Tensor:
        return self.w.decay.new_zeros(count, self.spec.inner * self.spec.state_dim)

    def _heads(self, grouped: Tensor) -> Tensor:
        """[..., G, S] -> [..., H, S]"""
        return grouped.repeat_interleave(self.spec.num_heads // self.spec.num_groups, dim=-2)

    def _shaped(self, h: Tensor) -> Tensor:
        return h.unflatten(-1, (self.spec.num_heads, self.spec.head_dim, -1))

    def singles(self, before: Tensor, x: Tensor, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h = self._shaped(before)  # [S, H, P, N]
        keep = torch.exp(-step * self.w.decay.exp())[..., None, None]
        h = h * keep + (step[..., None] * x)[..., None] * self._heads(b)[..., None, :]
        return (h * self._heads(c)[..., None, :]).sum(-1), h.flatten(1)

    def chunk(self, before: Tensor, x: Tensor, step: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Block by block (section 6): inside a block tokens see each other as in attention, decayed; the blocks
        before come in through the state."""
        h, parts = self._shaped(before[0]), []  # [H, P, N]
        for at in range(0, len(x), BLOCK):
            block = slice(at, at + BLOCK)
            heads_b, heads_c = self._heads(b[block]), self._heads(c[block])  # [L, H, N]
            total = torch.cumsum(
                -step[block] * self.w.decay.exp(), dim=0
            )  # [L, H], log of decay since the start
            decay = (total[:, None] - total[None]).permute(2, 0, 1)  # [H, L, L]
            seen = torch.ones_like(decay[0], dtype=torch.bool).tril()
            weights = (
                torch.einsum("lhn,mhn->hlm", heads_c, heads_b) * decay.masked_fill(~seen, -torch.inf).exp()
            )
            fed = step[block][..., None] * x[block]  # [L, H, P]
            y = torch.einsum("hlm,mhp->lhp", weights, fed)
            y += total.exp()[..., None] * torch.einsum("lhn,hpn->lhp", heads_c, h)
            left = (total[-1] - total).exp()[..., None]  # [L, H, 1]
            h = h * total[-1].exp()[:, None, None] + torch.einsum("lhp,lhn->hpn", left * fed, heads_b)
            parts.append(y)
        return torch.cat(parts), h.reshape(1, -1)


def _run(state: LayerState, mixer: _Conv | _Scan, *inputs: Tensor) -> Tensor:
    """Run over the step's tokens: inputs [N, ...] -> the mixer's output [N, ...]."""
    batch, rows = state[2], mixer.rows
    y: Tensor | None = None
    pieces: list[tuple[Tensor | slice, Tensor]] = []
    if len(batch.rows):
        before = torch.where(batch.fresh[:, None], mixer.start(1), rows[batch.reads])
        out, after = mixer.singles(before, *(x[batch.rows] for x in inputs))
        rows[batch.writes] = after
        pieces.append((batch.rows, out))
    for chunk in batch.chunks:
        carried = mixer.start(1) if chunk.read is None else rows[chunk.read : chunk.read + 1].clone()
        at = chunk.start
        for end, unit in chunk.writes:
            out, carried = mixer.chunk(carried, *(x[at:end] for x in inputs))
            rows[unit] = carried[0]
            pieces.append((slice(at, end), out))
            at = end
    for where, out in pieces:
        if y is None:
            y = out.new_empty(len(inputs[0]), *out.shape[1:])
        y[where] = out
    assert y is not None
    return y
