"""Speculative decoding's verdict on the device: which drafts the target would have drawn, and what it draws next.

A row's random number depends on its request's seed and its position only (`sample`), so the target draws one
certain token after each row, and a draft is right when it is that token: what comes out are the tokens of decoding
one by one, whatever was drafted. Of a tree of drafts (SpecInfer, arXiv 2305.09781, section 4.3) a node is right
when its ancestors are and it is what the target draws after its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmtool_kernels.gpu.sample import sample

MAX_ROWS = 64  # of a sequence: as many as a word has bits


@dataclass(frozen=True, slots=True)
class Verdict:
    """Per sequence, on the device. accepted: int32 [S], drafts that are right. bonus: int64 [S], the token after
    the last of them. kept: int64 [S], bit j set: row j of the sequence stays, the first and the right drafts.
    """

    accepted: Tensor
    bonus: Tensor
    kept: Tensor


@triton.jit
def verify_kernel(
    accepted, bonus, kept, tokens, inputs, query_start, tree, TREE: tl.constexpr, ROWS: tl.constexpr
):
    """Grid (S,). tokens, inputs, tree: int64 [N]; the sequence's rows are query_start[s], ..., at most ROWS."""
    s = tl.program_id(0)
    start = tl.load(query_start + s)
    count = tl.load(query_start + s + 1) - start
    row = tl.arange(0, ROWS)
    there = row < count
    one = tl.full([ROWS], 1, tl.int64)
    own = one << row.to(tl.int64)
    if TREE:
        bits = tl.load(tree + start + row, mask=there, other=0)
        set_bits = (bits[:, None] >> row.to(tl.int64)[None, :]) & 1  # [row, ancestor]
        others = tl.where(row[None, :] != row[:, None], set_bits, 0)
        parent = tl.max(tl.where(others != 0, row[None, :], -1), 1)  # drafts come after their parents
        depth = tl.sum(set_bits.to(tl.int32), 1)
    else:
        bits = own | (own - 1)
        parent = row - 1
        depth = row + 1
    drafted = there & (parent >= 0)
    draft = tl.load(inputs + start + row, mask=there, other=0)
    drawn = tl.load(tokens + start + tl.maximum(parent, 0), mask=there, other=0)
    right = there & ((drafted & (draft == drawn)) | (row == 0))
    word = tl.sum(tl.where(right, own, 0), 0)  # the bits of rows that fit their parents
    stays = there & ((bits & ~word) == 0)
    deepest = tl.max(tl.where(stays, depth, 0), 0)
    # Of equal drafts the first: all of them would be right.
    last = tl.min(tl.where(stays & (depth == deepest), row, ROWS), 0)
    if count > 0:
        tl.store(accepted + s, deepest - 1)
        tl.store(bonus + s, tl.load(tokens + start + last))
        tl.store(kept + s, tl.sum(tl.where(row == last, bits, 0), 0))


def verify(
    tokens: Tensor,
    inputs: Tensor,
    query_start: Tensor,
    query_lens: Sequence[int],
    tree: Tensor | None = None,
) -> Verdict:
    """The verdict on the drafts of S sequences; never waits for the device.

    tokens: int64 [N], what the target draws after each row. inputs: int64 [N], the rows themselves: of each
    sequence its last certain token, then its drafts, at most MAX_ROWS in all. query_start: int32 [S + 1];
    query_lens: the same rows on the host, one or more of each sequence. tree: int64 [N], AttentionBatch's; None:
    each row follows the one before it. The reference is `verify_reference`.
    """
    assert all(0 < n <= MAX_ROWS for n in query_lens), f"1 to {MAX_ROWS} rows, not {list(query_lens)}"
    shape, device = (len(query_lens),), tokens.device
    out = Verdict(
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
    )
    if query_lens:
        verify_kernel[shape](
            *arguments(out, tokens, inputs, query_start, tree),
            **constants(query_lens, tree is not None),
            num_warps=NUM_WARPS,
        )
    return out


NUM_WARPS = 4


def arguments(
    out: Verdict, tokens: Tensor, inputs: Tensor, query_start: Tensor, tree: Tensor | None
) -> tuple[object, ...]:
    assert tokens.is_contiguous() and inputs.is_contiguous()
    return (
        out.accepted, out.bonus, out.kept, tokens, inputs, query_start, inputs if tree is None else tree
    )  # fmt: skip


def constants(query_lens: Sequence[int], tree: bool) -> dict[str, object]:
    # A chain and a tree are each compiled for three widths at most.
    return {"TREE": tree, "ROWS": next(n for n in (8, 16, MAX_ROWS) if max(query_lens) <= n)}


def draw(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    temperatures: Tensor,
    filters: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """What the target draws after each row, int64 [N], as `sample` does; greedily, the lowest id among the
    largest logits, where a temperature is 0. Never waits for the device."""
    greedy = temperatures == 0
    drawn = sample(logits, seeds, positions, temperatures.masked_fill(greedy, 1.0), filters)
    # torch's argmax promises no order among equals.
    lowest = (logits == logits.amax(1, keepdim=True)).to(torch.int8).argmax(1)
    return torch.where(greedy, lowest, drawn)


def verify_reference(
    tokens: Tensor,
    inputs: Tensor,
    query_start: Tensor,
    query_lens: Sequence[int],
    tree: Tensor | None = None,
) -> Verdict:
    """The same by walking from each sequence's first row to the child that was drawn, while there is one."""
    accepted, bonus, kept = [], [], []
    for start, n in zip(query_start.tolist(), query_lens, strict=False):
        bits = [(2 << j) - 1 for j in range(n)] if tree is None else tree[start : start + n].tolist()
        bits = [word % 2**64 for word in bits]
        # Of equal drafts with the same parent any may be the right one: all paths are walked.
        ends, paths = [], [0]
        while paths:
            at = paths.pop()
            drawn = tokens[start + at].item()
            ends.append(at)
            paths += [
                j
                for j in range(at + 1, n)
                if bits[j] ^ 1 << j == bits[at] and inputs[start + j].item() == drawn
            ]
        last = min(ends, key=lambda j: (-bits[j].bit_count(), j))
        accepted.append(bits[last].bit_count() - 1)
        bonus.append(tokens[start + last].item())
        kept.append(bits[last] if bits[last] < 2**63 else bits[last] - 2**64)
    return Verdict(
        torch.tensor(accepted, dtype=torch.int32), torch.tensor(bonus), torch.tensor(kept, dtype=torch.int64)
    )
