"""Rows -> token ids, as the model's head wants them; and plain text -> blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtool.errors import UsageError
from llmtool.prune.batches import Item
from llmtool.prune.tasks import Row

DOC_STRIDE = 128  # tokens by which the windows over a long context of SQuAD overlap


@dataclass(frozen=True, slots=True)
class Window:
    """A window over a row's context. row: its place in the rows. spans: per token of the context its place in
    the text, None for all other tokens."""

    row: int
    spans: tuple[tuple[int, int] | None, ...]


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, max_length: int, label_ids: dict[str, int] | None = None
) -> list[Item]:
    """Sentences and pairs. label_ids: numbers of labels that are spelled out. Raises UsageError for a label that
    is none of them."""
    single = all(row.pair is None for row in rows)
    encoded = tokenizer(
        [row.text for row in rows],
        None if single else [row.pair or "" for row in rows],
        truncation=True,
        max_length=max_length,
    )
    names = list(encoded.keys())
    return [
        Item({name: encoded[name][i] for name in names}, _label(row.label, label_ids or {}))
        for i, row in enumerate(rows)
    ]


def encode_answers(rows: Sequence[Row], tokenizer: Any, max_length: int) -> tuple[list[Item], list[Window]]:
    """Windows over SQuAD's contexts; a window's label is (start, end) of its answer, (0, 0) where it has none.
    Raises UsageError for a tokenizer that cannot say where its tokens stand in the text."""
    if not tokenizer.is_fast:
        raise UsageError(
            "The model's tokenizer does not say where its tokens stand in the text, which SQuAD needs.",
            "Use a model with a tokenizer.json.",
        )
    encoded = tokenizer(
        [row.text for row in rows],
        [row.pair or "" for row in rows],
        truncation="only_second",
        max_length=max_length,
        stride=min(DOC_STRIDE, max_length // 3),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    source, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    items, windows = [], []
    for i, row in enumerate(source):
        parts = encoded.sequence_ids(i)
        spans = tuple(tuple(o) if p == 1 else None for o, p in zip(offsets[i], parts, strict=True))
        answer = _answer_tokens(rows[row], spans)
        items.append(Item({name: encoded[name][i] for name in encoded}, answer))
        windows.append(Window(row, spans))
    return items, windows


def encode_blocks(text: str, tokenizer: Any, length: int) -> list[Item]:
    """The text as blocks of exactly `length` tokens, without special ones between them; the rest is dropped."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [
        Item({"input_ids": ids[at : at + length], "attention_mask": [1] * length})
        for at in range(0, len(ids) - length + 1, length)
    ]


def _answer_tokens(row: Row, spans: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    for text, start in (row.answers or ())[:1]:
        end = start + len(text)
        inside = [
            i
            for i, span in enumerate(spans)
            if span and span[0] < end and span[1] > start and span[1] > span[0]
        ]
        covered = inside and spans[inside[0]][0] <= start and spans[inside[-1]][1] >= end  # type: ignore[index]
        if covered:
            return inside[0], inside[-1]
    return 0, 0


def _label(label: float | int | str | None, ids: dict[str, int]) -> float | int | None:
    if isinstance(label, str):
        if label not in ids:
            known = ", ".join(ids) or "numbers only"
            raise UsageError(f"The label {label!r} is none of the model's ({known}).")
        return ids[label]
    return label
