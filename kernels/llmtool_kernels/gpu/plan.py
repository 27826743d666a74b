"""How a step's attention is dealt out to persistent programs: lengths on the host in, one int32 array out.

A tile is BLOCK_M rows of one sequence and one KV head, a row being a (query, query head of the group) pair. All
tiles' KV blocks are laid end to end and cut into equal parts, one per program (Stream-K, arXiv 2301.03598, for
attention: Lean Attention, arXiv 2405.10480), so a long sequence beside short ones, or a chunk beside decodes, keep
every multiprocessor equally busy. A tile that a cut goes through leaves partial results, which whoever finishes
last adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# int32 columns of a segment, the run of KV blocks of one tile that one program reads.
FIELDS = (
    "sequence",
    "kv_head",
    "query_start",  # the sequence's first row of q
    "context",  # its tokens before that one
    "num_rows",  # query_len * group
    "first_row",  # of the tile, among them
    "begin",  # tokens read: begin, ..., end - 1
    "end",
    "slot",  # of its partial result; -1 when the tile is this segment alone
    "first_slot",  # of the tile's partial results
    "num_slots",
    "counter",  # of the tile: how many of its partial results are there
)
WIDTH = len(FIELDS)
# Whole tiles are dealt out, and nothing is added up, where that keeps the longest program within this of the mean.
WHOLE = 1.06
MIN_BLOCKS = 2  # a program's share: fewer read sooner, but there is more to add up
SNAP = 12  # a cut moves to the edge of a tile that is within 1 / SNAP of a program's work


@dataclass(frozen=True, slots=True)
class Segments:
    """starts: int32 [P + 1], program p runs segments starts[p]:starts[p + 1] of rows [S, WIDTH], int32."""

    starts: NDArray[np.int32]
    rows: NDArray[np.int32]
    num_slots: int
    num_counters: int


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Arrays [T]; the KV that a tile's rows see lies in tokens begin, ..., end - 1."""

    sequence: Ints
    kv_head: Ints
    first_row: Ints
    begin: Ints
    end: Ints


def plan_segments(
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    chosen: Sequence[int],
    num_kv_heads: int,
    group: int,
    window: int | None,
    block_m: int,
    block_n: int,
    programs: int,
    tree: bool = False,
) -> Segments:
    """The segments of the `chosen` sequences (numbers into the step's lengths) for so many programs.

    tree: a query's position is not its place among the new tokens, but may be any from the first of them on.
    """
    queries, lengths = np.asarray(query_lens, np.int64), np.asarray(kv_lens, np.int64)
    starts_of_queries = np.cumsum(queries) - queries
    context = lengths - queries
    tiles = _tiles(
        np.asarray(chosen, np.int64), queries * group, context, num_kv_heads, group, window, block_m, tree
    )
    blocks = -(-(tiles.end - tiles.begin) // block_n)  # [T]
    edges = np.concatenate(([0], np.cumsum(blocks)))  # [T + 1]
    cuts = _cuts(edges, programs)  # [P + 1]
    bounds = np.union1d(edges, cuts)
    at = bounds[:-1]  # [S], where a segment starts among all blocks
    tile = np.searchsorted(edges, at, side="right") - 1
    begin = tiles.begin[tile] + (at - edges[tile]) * block_n
    end = np.minimum(tiles.begin[tile] + (bounds[1:] - edges[tile]) * block_n, tiles.end[tile])

    pieces = np.bincount(tile, minlength=len(blocks))  # [T]
    split = pieces > 1
    slots = np.cumsum(np.where(split, pieces, 0))  # [T], just past each tile's
    counter = np.cumsum(split) - 1
    first_slot = (slots - pieces)[tile]
    first_segment = np.cumsum(pieces) - pieces
    slot = np.where(split[tile], first_slot + np.arange(len(at)) - first_segment[tile], -1)

    sequence = tiles.sequence[tile]
    rows = np.empty((len(at), WIDTH), np.int32)
    columns = (
        sequence,
        tiles.kv_head[tile],
        starts_of_queries[sequence],
        context[sequence],
        queries[sequence] * group,
        tiles.first_row[tile],
        begin,
        end,
        slot,
        first_slot,
        pieces[tile],
        counter[tile],
    )
    for i, column in enumerate(columns):
        rows[:, i] = column
    starts = np.searchsorted(at, cuts).astype(np.int32)
    return Segments(starts, rows, int(slots[-1]) if len(slots) else 0, int(split.sum()))


def max_segments(num_tiles: int, programs: int) -> int:
    """The most segments that `num_tiles` tiles can fall into; a plan's memory for them never grows past it."""
    return num_tiles + programs - 1


def max_slots(programs: int) -> int:
    """The most partial results: a program leaves one at each end of its work."""
    return 2 * programs


def num_tiles(
    query_lens: Sequence[int], chosen: Sequence[int], num_kv_heads: int, group: int, block_m: int
) -> int:
    return num_kv_heads * sum(-(-query_lens[s] * group // block_m) for s in chosen)


def _tiles(
    chosen: Ints,
    rows: Ints,
    context: Ints,
    num_kv_heads: int,
    group: int,
    window: int | None,
    block_m: int,
    tree: bool,
) -> _Tiles:
    """In the order sequence, KV head, rows: tiles that read the same KV run side by side, while it is in L2."""
    per_head = -(-rows[chosen] // block_m)  # [C]
    count = per_head * num_kv_heads
    sequence = np.repeat(chosen, count)
    within = np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count)
    kv_head, block = np.divmod(within, np.repeat(per_head, count))
    first_row = block * block_m
    last_row = np.minimum(first_row + block_m, rows[sequence]) - 1
    first_query, last_query = (context[sequence] + row // group for row in (first_row, last_row))  # positions
    if tree:
        first_query = context[sequence]
    begin = np.zeros_like(sequence) if window is None else np.maximum(0, first_query + 1 - window)
    return _Tiles(sequence, kv_head, first_row, begin, last_query + 1)


def _cuts(edges: Ints, programs: int) -> Ints:
    """[P + 1] ascending places among the blocks of tiles with these edges [T + 1]; program p gets p to p + 1."""
    total = int(edges[-1])
    busy = min(programs, -(-total // MIN_BLOCKS))
    ideal = total * np.minimum(np.arange(programs + 1), busy) // busy
    above = np.minimum(np.searchsorted(edges, ideal), len(edges) - 1)
    below = np.maximum(above - 1, 0)
    nearest = np.where(edges[above] - ideal < ideal - edges[below], edges[above], edges[below])
    if np.diff(nearest).max() <= WHOLE * total / busy:
        return nearest
    return np.where(np.abs(nearest - ideal) <= total // busy // SNAP, nearest, ideal)
