"""Sampling: from the logits of a step's rows to one token each.

Order of operations, vLLM's: grammar mask, logit bias, min_tokens, penalties, temperature, min-p, top-k,
top-p, then inverse CDF over token ids with one random number per (seed, position). All filters reduce to one
number per row, the smallest logit that stays, so nothing is sorted but a window of the largest logits; ties at
a cutoff stay, which makes the outcome independent of any sort's order. Greedy takes the lowest id among equals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llmtool_kernels import dispatch
from numpy.typing import NDArray

from llmtool.core.request import SamplingParams
from llmtool.runtime.penalties import PenaltyTable
from llmtool.runtime.random import uniforms

WINDOW = 256  # largest logits looked at before a whole row is sorted
CPU_ROWS = 8  # rows sampled at once on a CPU: of a 50k vocabulary, so many stay in its caches

Ints = NDArray[np.int64]

# What a row needs besides an argmax; bits of SamplingRows.features.
RANDOM, PENALTY, BIAS, MIN_TOKENS, FILTER = 1, 2, 4, 8, 16


@dataclass(frozen=True, slots=True)
class GrammarMask:
    """Allowed tokens of some of a step's rows. index: [G], ascending; words: [G, >= V / 32], bit set = allowed."""

    index: Ints
    words: NDArray[np.int32]

    def part(self, rows: Ints) -> GrammarMask | None:
        """The mask of `rows` (ascending) alone, counted from their first; None if it touches none of them."""
        inside = np.isin(self.index, rows)
        if not inside.any():
            return None
        return GrammarMask(np.searchsorted(rows, self.index[inside]), self.words[inside])


class SamplingRows:
    """Sampling parameters of all live sequences as arrays, one row each, so that a step only indexes them."""

    def __init__(
        self, capacity: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = tuple(eos_token_ids)
        self.device = device
        self.features = np.zeros(capacity, np.uint8)
        self.seed = np.zeros(capacity, np.uint64)
        self.temperature = np.ones(capacity, np.float32)
        self.top_k = np.zeros(capacity, np.int64)  # 0: off
        self.top_p = np.ones(capacity, np.float64)
        self.log_min_p = np.full(capacity, -np.inf, np.float32)  # -inf: off
        self.repetition = np.ones(capacity, np.float32)
        self.presence = np.zeros(capacity, np.float32)
        self.frequency = np.zeros(capacity, np.float32)
        self.min_tokens = np.zeros(capacity, np.int64)
        self.penalty_slot = np.full(capacity, -1, np.int64)
        self.penalties = PenaltyTable(vocab_size, device)
        self.bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # row -> ids, values
        self.banned: dict[int, torch.Tensor] = {}  # row -> ids that min_tokens forbids for now

    def add(
        self, row: int, params: SamplingParams, seed: int, prompt: Sequence[int], output: Sequence[int]
    ) -> None:
        """Set `row` for a sequence that has `output` already. Token ids past the vocabulary are ignored."""
        features = 0
        self.seed[row] = seed % 2**64
        # A beam search ranks raw log-probabilities; nothing is drawn for it.
        if not params.greedy and params.beam is None:
            features |= RANDOM
            self.temperature[row] = params.temperature
            self.top_k[row] = params.top_k if 0 < params.top_k < self.vocab_size else 0
            self.top_p[row] = params.top_p
            self.log_min_p[row] = np.log(params.min_p) if params.min_p > 0 else -np.inf
            if self.top_k[row] or params.top_p < 1 or params.min_p > 0:
                features |= FILTER
        if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
            features |= PENALTY
            self.repetition[row] = params.repetition_penalty
            self.presence[row] = params.presence_penalty
            self.frequency[row] = params.frequency_penalty
            self.penalty_slot[row] = self.penalties.acquire(prompt, output)
        if params.logit_bias:
            features |= BIAS
            known = {t: b for t, b in params.logit_bias.items() if t < self.vocab_size}
            self.bias[row] = (
                self._tensor(list(known)),
                torch.tensor(list(known.values()), dtype=torch.float32, device=self.device),
            )
        if params.min_tokens:
            features |= MIN_TOKENS
            self.min_tokens[row] = params.min_tokens
            stops = {*self.eos_token_ids, *params.stop_token_ids}
            self.banned[row] = self._tensor(sorted(t for t in stops if 0 <= t < self.vocab_size))
        self.features[row] = features

    def append(self, row: int, output: Sequence[int]) -> None:
        """The sequence in `row` went on by `output`."""
        if self.features[row] & PENALTY:
            self.penalties.append(int(self.penalty_slot[row]), output)

    def remove(self, row: int) -> None:
        if self.features[row] & PENALTY:
            self.penalties.release(int(self.penalty_slot[row]))
        self.bias.pop(row, None)
        self.banned.pop(row, None)
        self.features[row] = 0

    def grow(self, capacity: int) -> None:
        """Room for `capacity` rows; `add` sets all that a feature reads, so new rows need no defaults."""
        for name, old in vars(self).items():
            if isinstance(old, np.ndarray):
                setattr(self, name, np.concatenate([old, np.zeros(capacity - len(old), old.dtype)]))

    def _tensor(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


def sample(
    logits: torch.Tensor,
    rows: SamplingRows,
    index: Ints,
    positions: Ints,
    num_outputs: Ints,
    mask: GrammarMask | None = None,
    ahead: Sequence[Sequence[int]] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row; `logits` is left as it is, for raw log-probabilities.

    logits: [S, V] float32. index: [S] rows of `rows`. positions: [S] absolute positions of the tokens being
    sampled. num_outputs: [S] output tokens each sequence has already. ahead: per row, the last of those that `rows`
    does not know: drafts before this position; () when there are none. Returns tokens [S] int64 and peaks [S]: the
    largest logit that was left, not finite where the row cannot be sampled (NaN, or everything forbidden).
    """
    touched = rows.features[index] != 0
    if mask is not None:
        touched[mask.index] = True
    peaks, tokens = largest(logits)
    at = np.flatnonzero(touched)  # [T]
    step = CPU_ROWS if logits.device.type == "cpu" else max(1, len(at))
    for begin in range(0, len(at), step):
        part = at[begin : begin + step]
        where = torch.from_numpy(part).to(logits.device)
        peaks[where], tokens[where] = _sample_touched(
            logits[where],
            rows,
            index[part],
            positions[part],
            num_outputs[part],
            None if mask is None else mask.part(part),
            [ahead[i] for i in part.tolist()] if ahead else (),
        )
    return tokens, peaks


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest logit [S] of each row [S, V] and the lowest index of it; NaN where there is one. On a CPU by numpy:
    vectorised, and on this thread alone, where torch would wake others up for every step."""
    if logits.device.type != "cpu":
        peaks, tokens = logits.max(dim=1)
        return peaks, tokens
    rows = logits.numpy()
    at = rows.argmax(axis=1)
    return torch.from_numpy(rows[np.arange(len(rows)), at]), torch.from_numpy(at)


def _sample_touched(
    x: torch.Tensor,
    rows: SamplingRows,
    index: Ints,
    positions: Ints,
    num_outputs: Ints,
    mask: GrammarMask | None,
    ahead: Sequence[Sequence[int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` for rows that need more than an argmax; x [T, V] is overwritten. Returns peaks, tokens [T]."""
    if mask is not None:
        apply_bitmask(x, mask)
    _adjust(x, rows, index, num_outputs, ahead)
    peaks, tokens = largest(x)
    drawn = np.flatnonzero(rows.features[index] & RANDOM)
    if len(drawn) == 0:
        return peaks, tokens
    rows_at = index[drawn]
    if dispatch.on_gpu(x):
        where = torch.from_numpy(drawn).to(x.device)
        tokens[where] = _draw_on_gpu(x[where], rows, rows_at, positions[drawn])
        return peaks, tokens
    u = uniforms(rows.seed[rows_at], positions[drawn])
    if len(drawn) == len(index):
        x = x.sub_(peaks[:, None])
        return peaks, _draw(x, rows, rows_at, u)
    where = torch.from_numpy(drawn).to(x.device)
    tokens[where] = _draw(x[where] - peaks[where, None], rows, rows_at, u)
    return peaks, tokens


def apply_bitmask(x: torch.Tensor, mask: GrammarMask) -> None:
    """Set the logits of forbidden tokens to -inf in place. x: [T, V]."""
    shifts = torch.arange(32, dtype=torch.int32, device=x.device)
    index, words = (torch.from_numpy(a).to(x.device) for a in (mask.index, mask.words))
    bits = (words[:, :, None] >> shifts) & 1  # [G, words, 32]
    forbidden = bits.flatten(1)[:, : x.shape[1]] == 0
    x[index] = x[index].masked_fill(forbidden, -torch.inf)


def _adjust(
    x: torch.Tensor, rows: SamplingRows, index: Ints, num_outputs: Ints, ahead: Sequence[Sequence[int]]
) -> None:
    """Logit bias, min_tokens and penalties in place, for the rows that have them. x: [T, V]."""
    features = rows.features[index]
    for i in np.flatnonzero(features & BIAS):
        ids, values = rows.bias[int(index[i])]
        x[i, ids] += values
    for i in np.flatnonzero(features & MIN_TOKENS):
        row = int(index[i])
        if num_outputs[i] < rows.min_tokens[row]:
            _ban(x[i], rows.banned[row])
    at = np.flatnonzero(features & PENALTY)
    if len(at):
        r = index[at]
        where, slots = (torch.from_numpy(a).to(x.device) for a in (at, rows.penalty_slot[r]))
        strengths = (rows.repetition, rows.presence, rows.frequency)
        x[where] = rows.penalties.apply(
            x[where],
            slots,
            *(torch.from_numpy(a[r]).to(x.device) for a in strengths),
            ahead=[ahead[i] for i in at.tolist()] if ahead else (),
        )


def _ban(x: torch.Tensor, ids: torch.Tensor) -> None:
    """Forbid `ids` in one row x [V], unless nothing else is left: an ended grammar wins over min_tokens."""
    before = x[ids]
    x[ids] = -torch.inf
    if bool(x.max() == -torch.inf):
        x[ids] = before


def _draw_on_gpu(x: torch.Tensor, rows: SamplingRows, index: Ints, positions: Ints) -> torch.Tensor:
    """`_draw` of logits x [D, V] in one kernel, which makes the random numbers itself."""
    from llmtool_kernels.gpu import sample as kernel

    def on_device(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(x.device, non_blocking=True)

    filters = None
    if (rows.features[index] & FILTER).any():
        top_k, top_p, log_min_p = (on_device(a[index]) for a in (rows.top_k, rows.top_p, rows.log_min_p))
        filters = (top_k, top_p, log_min_p)
    seeds, at = on_device(rows.seed[index].view(np.int64)), on_device(positions.astype(np.int64))
    return kernel.sample(x, seeds, at, on_device(rows.temperature[index]), filters)


def _draw(x: torch.Tensor, rows: SamplingRows, index: Ints, u: NDArray[np.float64]) -> torch.Tensor:
    """Tokens [D] by inverse CDF. x: [D, V] logits minus their row's largest, overwritten; u: [D], < 1."""
    # After the subtraction, so that a tiny temperature gives -inf and never inf - inf.
    x = x.div_(torch.from_numpy(rows.temperature[index]).to(x.device)[:, None])
    weights = x.exp()  # [D, V]; the largest is exactly 1
    if (rows.features[index] & FILTER).any():
        top_k, top_p, log_min_p = (
            torch.from_numpy(a[index]).to(x.device) for a in (rows.top_k, rows.top_p, rows.log_min_p)
        )
        cutoff = cutoffs(x, weights, top_k, top_p, log_min_p)
        weights.masked_fill_(x < cutoff[:, None], 0.0)
    cdf = weights.cumsum(dim=1, dtype=torch.float64)
    total = cdf[:, -1:].contiguous()
    target = torch.from_numpy(u).to(x.device)[:, None] * total
    tokens = torch.searchsorted(cdf, target, right=True)  # the first id whose cdf exceeds the target
    # u * total can round up to total; the last id with weight is the first whose cdf reaches it.
    last = torch.searchsorted(cdf, total)
    return torch.minimum(tokens, last).squeeze(1).clamp_(max=x.shape[1] - 1)


def cutoffs(
    x: torch.Tensor, weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, log_min_p: torch.Tensor
) -> torch.Tensor:
    """The smallest logit that min-p, top-k and top-p, one after the other, leave in each row.

    x: [F, V] float32 logits minus their row's largest; weights: exp(x). top_k: [F] int64, 0 is off; top_p: [F]
    float64, 1 is off; log_min_p: [F] float32, -inf is off. Returns [F] float32. Top-p's mass is of what min-p
    and top-k leave. Whole rows are sorted only where the answer lies past the WINDOW largest logits.
    """
    cutoff = log_min_p.clone()
    todo = torch.nonzero((top_k > 0) | (top_p < 1)).squeeze(1)
    for find_largest in (_window, sorted_descending):
        if len(todo) == 0:
            break
        all_of_them = len(todo) == len(cutoff)  # spares copies of x and weights
        args = (x, weights, top_k, top_p, log_min_p)
        picked = args if all_of_them else tuple(t[todo] for t in args)
        cutoff[todo], done = _from_descending(find_largest(picked[0]), *picked)
        todo = todo[~done]
    return cutoff


def _from_descending(
    ordered: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    floor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cutoffs [F] read off the M largest logits of each row, ordered [F, M]; and whether M were enough [F]."""
    m, vocab = ordered.shape[1], x.shape[1]
    done = top_k <= m
    kth = ordered.gather(1, (top_k.clamp(1, m) - 1)[:, None]).squeeze(1)  # [F]
    cutoff = torch.where(top_k > 0, torch.maximum(kth, floor), floor)
    if not bool((top_p < 1).any()):
        return cutoff, done
    # Everything that stays, ties past the window included, is the mass that top-p takes its part of.
    mass = (weights * (x >= cutoff[:, None])).sum(dim=1, dtype=torch.float64)  # [F]
    left = ordered.exp().masked_fill(ordered < cutoff[:, None], 0.0)  # [F, M]
    cdf = left.cumsum(dim=1, dtype=torch.float64)
    reached = torch.searchsorted(cdf, (top_p * mass)[:, None]).squeeze(1)  # first place with that much
    done &= (top_p >= 1) | (reached < m) | (m == vocab)
    nucleus = ordered.gather(1, reached.clamp(max=m - 1)[:, None]).squeeze(1)
    # Rounding may put `reached` past what the other filters left.
    return torch.where(top_p < 1, torch.maximum(cutoff, nucleus), cutoff), done


def _window(x: torch.Tensor) -> torch.Tensor:
    return x.topk(min(WINDOW, x.shape[1]), dim=1).values


def sorted_descending(x: torch.Tensor) -> torch.Tensor:
    """Values of each row, largest first. On a CPU by numpy, whose vectorised sort of values is 30 times faster."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.numpy(), axis=1)[:, ::-1].copy())
    return x.sort(dim=1, descending=True).values
