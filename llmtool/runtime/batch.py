"""What the executor remembers of live sequences, as arrays, and a step's model inputs cut out of them.

The scheduler sends deltas; they are applied here once, and a step's inputs are then a handful of numpy gathers
whatever the number of sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from llmtool_kernels.attention import AttentionBatch
from numpy.typing import NDArray

from llmtool.core.memory.geometry import STATES, KVCacheGroup
from llmtool.core.ports import NewRequest, ScheduledRequest
from llmtool.models.recurrent import StateBatch, StateChunk
from llmtool.runtime.verify import depths_of, words_of

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step's B sequences, N new tokens in all.

    rows, starts, lengths: [B] row, first position and number of new tokens of each sequence. input_ids,
    positions: [N] int64 on the device. batches: one per KV group. trees: drafts are not all chains.
    """

    rows: Ints
    starts: Ints
    lengths: Ints
    input_ids: torch.Tensor
    positions: torch.Tensor
    batches: tuple[AttentionBatch | StateBatch, ...]
    trees: bool = False

    @property
    def ends(self) -> Ints:
        """[B] rows of the flat batch just past each sequence's last."""
        return np.cumsum(self.lengths)


class SequenceTable:
    """Tokens and block tables of live sequences, a row each. Rows are reused, and their number grows if it must."""

    def __init__(self, groups: Sequence[KVCacheGroup], capacity: int, max_model_len: int) -> None:
        self.groups = tuple(groups)
        self.row_of: dict[str, int] = {}
        # np.zeros of this size is lazily committed: a row costs memory as far as it is filled.
        self.tokens = np.zeros((capacity, max_model_len), np.int32)
        self.num_tokens = np.zeros(capacity, np.int64)
        self.num_prompt = np.zeros(capacity, np.int64)
        self.tables = [np.zeros((capacity, group.pages(max_model_len)), np.int32) for group in groups]
        self.num_pages = np.zeros((len(groups), capacity), np.int64)
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def capacity(self) -> int:
        return len(self.num_tokens)

    def add(self, new: NewRequest) -> int:
        """Take a sequence in; returns its row."""
        assert new.id not in self.row_of, f"{new.id} is known already"
        if not self._free:
            self._grow()
        row = self.row_of[new.id] = self._free.pop()
        n = len(new.token_ids)
        self.tokens[row, :n] = new.token_ids
        self.num_tokens[row] = n
        self.num_prompt[row] = new.num_prompt_tokens
        for g, entries in enumerate(new.tables):
            self.tables[g][row, : len(entries)] = entries
            self.num_pages[g, row] = len(entries)
        return row

    def remove(self, seq: str) -> int | None:
        """Forget a sequence; returns the row it had, None if it was not known."""
        row = self.row_of.pop(seq, None)
        if row is not None:
            self._free.append(row)
        return row

    def output(self, row: int) -> list[int]:
        return self.tokens[row, self.num_prompt[row] : self.num_tokens[row]].tolist()

    def apply(self, scheduled: Sequence[ScheduledRequest]) -> Ints:
        """Apply the deltas of a step to known sequences; returns the rows [B] of the scheduled."""
        rows = [self.row_of[entry.id] for entry in scheduled]
        grown, tokens = [], []
        for row, entry in zip(rows, scheduled, strict=True):
            if len(entry.new_token_ids) == 1:  # a decoding sequence: together below
                grown.append(row)
                tokens.append(entry.new_token_ids[0])
            elif entry.new_token_ids:
                n = self.num_tokens[row]
                self.tokens[row, n : n + len(entry.new_token_ids)] = entry.new_token_ids
                self.num_tokens[row] += len(entry.new_token_ids)
            if entry.keep_pages:
                self.num_pages[:, row] = entry.keep_pages
            for g, entries in enumerate(entry.new_pages):
                if entries:
                    n = self.num_pages[g, row]
                    self.tables[g][row, n : n + len(entries)] = entries
                    self.num_pages[g, row] += len(entries)
            for g, index, page in entry.table_edits:
                self.tables[g][row, index] = page
        if grown:
            at = np.array(grown)
            self.tokens[at, self.num_tokens[at]] = tokens
            self.num_tokens[at] += 1
        for row, entry in zip(rows, scheduled, strict=True):
            if entry.draft:  # past what is known, where the next tokens go over it
                n = self.num_tokens[row]
                self.tokens[row, n : n + len(entry.draft)] = entry.draft
        return np.array(rows, np.int64)

    def inputs(self, scheduled: Sequence[ScheduledRequest], rows: Ints, device: torch.device) -> StepInputs:
        """Model inputs of a step whose deltas are applied. rows: [B], as `apply` returned them."""
        starts = np.array([entry.start for entry in scheduled], np.int64)
        lengths = np.array([entry.num_tokens for entry in scheduled], np.int64)
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=query_start[1:])
        ends = starts + lengths
        drafted = np.array([len(entry.draft) for entry in scheduled], np.int64)
        assert (ends <= self.num_tokens[rows] + drafted).all(), "a token is computed before it is known"
        flat_rows = np.repeat(rows, lengths)  # [N]
        # [N] places in the KV memory, which are positions but for drafts in trees.
        places = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], lengths)
        positions, words = self._trees(scheduled, starts, lengths, places)

        def on_device(array: NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        batches: list[AttentionBatch | StateBatch] = []
        for g, group in enumerate(self.groups):
            assert (ends <= self.num_pages[g, rows] * group.tokens_per_page).all(), "a token has no page"
            width = group.pages(int(ends.max()))
            if group.layers[0].kind in STATES:
                batches.append(self._states(g, rows, starts, lengths, device))
                continue
            page, slot = np.divmod(places, group.tokens_per_page)
            batches.append(
                AttentionBatch(
                    query_start=on_device(query_start),
                    seq_lens=on_device(ends.astype(np.int32)),
                    block_tables=on_device(self.tables[g][rows, :width]),
                    token_units=on_device(self.tables[g][flat_rows, page].astype(np.int64)),
                    token_slots=on_device(slot),
                    query_lens=lengths.tolist(),
                    kv_lens=ends.tolist(),
                    tree=None if words is None else on_device(words),
                    tree_depth=0 if words is None else int(np.bitwise_count(words.view(np.uint64)).max()),
                )
            )
        input_ids = self.tokens[flat_rows, places].astype(np.int64)
        return StepInputs(
            rows,
            starts,
            lengths,
            on_device(input_ids),
            on_device(positions),
            tuple(batches),
            words is not None,
        )

    def places(self, g: int, row: int, positions: Ints) -> tuple[Ints, Ints]:
        """Page offsets in units and slots of a sequence's tokens in a group."""
        page, slot = np.divmod(positions, self.groups[g].tokens_per_page)
        return self.tables[g][row, page].astype(np.int64), slot

    @staticmethod
    def _trees(
        scheduled: Sequence[ScheduledRequest], starts: Ints, lengths: Ints, places: Ints
    ) -> tuple[Ints, Ints | None]:
        """Positions [N], which of a tree's drafts are their depths, and what each token sees of its sequence's new
        ones (AttentionBatch.tree); None where all drafts are chains."""
        if not any(entry.parents for entry in scheduled):
            return places, None
        positions, words, at = places.copy(), np.zeros(len(places), np.int64), 0
        for entry, start, length in zip(scheduled, starts.tolist(), lengths.tolist(), strict=True):
            part = slice(at, at + length)
            if entry.parents:
                assert length == len(entry.parents) + 1, "a tree's root is one token"
                positions[part] = start + np.array(depths_of(entry.parents))
                words[part] = words_of(entry.parents)
            else:
                words[part] = words_of(range(-1, length - 2)) if length > 1 else 1
            at += length
        return positions, words

    def _states(self, g: int, rows: Ints, starts: Ints, lengths: Ints, device: torch.device) -> StateBatch:
        """Where each sequence's state is read and written. A table's entries name the same page as long as the
        state stays in it; where they change, the one before keeps what the state was at the boundary."""
        table, size = self.tables[g], self.groups[g].tokens_per_page
        at, ends = np.cumsum(lengths) - lengths, starts + lengths
        single = np.flatnonzero(lengths == 1)
        reads = table[rows, np.maximum(starts - 1, 0) // size]
        writes = table[rows, (ends - 1) // size]
        chunks = []
        for i in np.flatnonzero(lengths > 1).tolist():
            first, last = int(starts[i]) // size, int(ends[i] - 1) // size
            entries = table[rows[i], first : last + 1].tolist()
            turns = [
                (int(at[i]) + (first + k + 1) * size - int(starts[i]), entry)
                for k, entry in enumerate(entries[:-1])
                if entry != entries[k + 1]
            ]
            turns.append((int(at[i] + lengths[i]), entries[-1]))
            chunks.append(StateChunk(int(at[i]), int(reads[i]) if starts[i] else None, turns))

        def on_device(array: NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return StateBatch(
            rows=on_device(at[single]),
            reads=on_device(reads[single].astype(np.int64)),
            writes=on_device(writes[single].astype(np.int64)),
            fresh=on_device(starts[single] == 0),
            chunks=chunks,
        )

    def _grow(self) -> None:
        """Twice as many rows. Normally max_num_seqs rows are enough."""
        old = self.capacity
        self.tokens = np.concatenate([self.tokens, np.zeros_like(self.tokens)])
        self.num_tokens = np.concatenate([self.num_tokens, np.zeros_like(self.num_tokens)])
        self.num_prompt = np.concatenate([self.num_prompt, np.zeros_like(self.num_prompt)])
        self.tables = [np.concatenate([table, np.zeros_like(table)]) for table in self.tables]
        self.num_pages = np.concatenate([self.num_pages, np.zeros_like(self.num_pages)], axis=1)
        self._free.extend(range(2 * old - 1, old - 1, -1))
