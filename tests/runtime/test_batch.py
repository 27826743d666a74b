from __future__ import annotations

import numpy as np
import pytest
import torch
from llmtool_kernels.attention import AttentionBatch

from llmtool.core.memory.geometry import LayerCacheSpec, uniform_group
from llmtool.core.ports import NewRequest, ScheduledRequest
from llmtool.core.request import SamplingParams
from llmtool.runtime.batch import SequenceTable

GROUPS = [
    uniform_group([LayerCacheSpec(0, 1, 8, 8, 4)], 4),
    uniform_group([LayerCacheSpec(1, 1, 8, 8, 4)], 2),
]
CPU = torch.device("cpu")


def new(seq: str, tokens: list[int], *tables: list[int]) -> NewRequest:
    return NewRequest(seq, tokens, len(tokens), SamplingParams(), 0, tables)


def test_inputs_of_a_mixed_step() -> None:
    table = SequenceTable(GROUPS, 3, 20)
    table.add(new("a", [10, 11, 12, 13, 14], [7, 3], [1, 2, 3]))
    table.add(new("b", [20, 21, 22], [5], [8, 9]))
    table.add(new("c", [30], [6], [4]))
    scheduled = [
        ScheduledRequest("b", 2, 2, True, [23], [[], []], [(0, 0, 55)]),
        ScheduledRequest("a", 1, 3, False),
        ScheduledRequest("c", 0, 3, True, [31, 32], [[], [40]]),
    ]
    inputs = table.inputs(scheduled, table.apply(scheduled), CPU)
    assert inputs.input_ids.tolist() == [22, 23, 11, 12, 13, 30, 31, 32]
    assert inputs.positions.tolist() == [2, 3, 1, 2, 3, 0, 1, 2]
    assert inputs.ends.tolist() == [2, 5, 8]
    for batch, tables, size in zip(
        inputs.batches, ([[55], [7], [6]], [[8, 9], [1, 2], [4, 40]]), (4, 2), strict=True
    ):
        expected = AttentionBatch.build([2, 3, 3], [4, 4, 3], tables, size)
        for name in ("query_start", "seq_lens", "block_tables", "token_units", "token_slots"):
            ours, theirs = getattr(batch, name), getattr(expected, name)
            assert torch.equal(ours, theirs), name
            assert ours.dtype == theirs.dtype
        assert (batch.query_lens, batch.kv_lens) == ([2, 3, 3], [4, 4, 3])
    assert table.output(table.row_of["b"]) == [23]
    assert table.output(table.row_of["c"]) == [31, 32]


def test_rows_are_reused_and_grow() -> None:
    table = SequenceTable(GROUPS[:1], 1, 8)
    assert table.add(new("a", [1, 2], [3])) == 0
    assert table.add(new("b", [4], [5])) == 1
    assert table.capacity == 2
    assert table.tokens[0, :2].tolist() == [1, 2]
    assert table.tables[0][0, 0] == 3
    assert table.remove("a") == 0
    assert table.remove("a") is None
    assert table.add(new("c", [9], [7])) == 0
    assert table.num_tokens.tolist() == [1, 1]


def test_our_own_mistakes_are_caught() -> None:
    table = SequenceTable(GROUPS[:1], 2, 8)
    table.add(new("a", [1, 2], [3]))
    with pytest.raises(AssertionError, match="known already"):
        table.add(new("a", [1, 2], [3]))
    for entry, message in (
        (ScheduledRequest("a", 0, 3, True), "before it is known"),
        (ScheduledRequest("a", 0, 5, True, [3, 4, 5]), "has no page"),
    ):
        with pytest.raises(AssertionError, match=message):
            table.inputs([entry], table.apply([entry]), CPU)


def test_many_decoding_sequences() -> None:
    rng = np.random.default_rng(0)
    n = 50
    table = SequenceTable(GROUPS[:1], n, 64)
    known = {}
    for i in range(n):
        tokens = rng.integers(0, 100, rng.integers(1, 30)).tolist()
        pages = rng.integers(0, 1000, 16).tolist()
        known[str(i)] = (tokens, pages)
        table.add(new(str(i), tokens, pages))
    order = [str(i) for i in rng.permutation(n)]
    scheduled = [ScheduledRequest(s, len(known[s][0]), 1, True, [int(s) + 200]) for s in order]
    inputs = table.inputs(scheduled, table.apply(scheduled), CPU)
    assert inputs.input_ids.tolist() == [int(s) + 200 for s in order]
    (batch,) = inputs.batches
    assert batch.token_units.tolist() == [known[s][1][len(known[s][0]) // 4] for s in order]
    assert batch.token_slots.tolist() == [len(known[s][0]) % 4 for s in order]
