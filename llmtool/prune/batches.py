"""Examples as token ids, in batches of alike lengths: padding is work that nobody reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Item:
    """One encoded example. inputs: the model's arguments as lists of ids, or one array [C, H, W] of pixels.
    label: a class, a number, or (start, end) of an answer."""

    inputs: Mapping[str, Any]
    label: Any = None

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"]) if "input_ids" in self.inputs else 0


@dataclass(frozen=True, slots=True)
class Batch:
    """inputs: the model's arguments, [B, S] each (attention_mask among them where there are tokens), or pixels
    [B, C, H, W]. labels [B] or [B, 2], or None. indices: of its items in the list they come from."""

    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def tokens(self) -> Tensor | None:
        """bool [B, S]: which places hold a token; None without an attention mask (all do)."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()

    def to(self, device: torch.device) -> Batch:
        inputs = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(inputs, None if self.labels is None else self.labels.to(device), self.indices)


def batches(items: Sequence[Item], batch_size: int, pad_id: int = 0, seed: int | None = None) -> list[Batch]:
    """All items, sorted by length and cut into batches; with a seed, batches in random order.

    Ties in length go by place in `items`, so the result depends on its arguments alone.
    """
    order = sorted(range(len(items)), key=lambda i: (items[i].length, i))
    cut = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        cut = [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return [collate(items, indices, pad_id) for indices in cut]


def collate(items: Sequence[Item], indices: Iterable[int], pad_id: int = 0) -> Batch:
    chosen = tuple(indices)
    picked = [items[i] for i in chosen]
    inputs = {name: _stack([item.inputs[name] for item in picked], name, pad_id) for name in picked[0].inputs}
    labels = None if picked[0].label is None else torch.tensor([item.label for item in picked])
    return Batch(inputs, labels, chosen)


def _stack(rows: Sequence[Any], name: str, pad_id: int) -> Tensor:
    if isinstance(rows[0], Tensor):
        return torch.stack(list(rows))
    width = max(len(row) for row in rows)
    fill = pad_id if name == "input_ids" else 0
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def sample(rows: Sequence[Any], count: int, seed: int) -> Iterator[Any]:
    """`count` different rows at random; all of them, in random order, where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(rows), generator=generator)[:count].tolist():
        yield rows[i]
