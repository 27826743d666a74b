"""What can be pruned: query heads, KV groups and neurons, and where they lie in the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtool.prune.modeling import Layout, head_dim, layers_of


@dataclass(frozen=True, slots=True)
class Sublayer:
    """A layer's attention or MLP. Its units feed one Linear, the consumer.

    kind: attention | mlp. num_units: query heads or neurons. unit_dim: columns of the consumer that one unit fills.
    group: query heads that share a KV head; units of one group are neighbours. min_units: what must stay.
    """

    index: int
    layer: int
    kind: str
    num_units: int
    unit_dim: int
    group: int = 1
    min_units: int = 0

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.kind}"

    @property
    def num_groups(self) -> int:
        return self.num_units // self.group


Kept = tuple[tuple[int, ...], ...]
"""Of each sublayer the units that stay, in order."""


def sublayers_of(model: nn.Module, layout: Layout, causal: bool = False) -> tuple[Sublayer, ...]:
    """Attention and MLP of each layer, from the bottom up."""
    found: list[Sublayer] = []
    for i, layer in enumerate(layers_of(model, layout)):
        dim = head_dim(layer, layout)
        query, key, out, down = (
            _linear(layer, name) for name in (layout.query, layout.key, layout.out, layout.down)
        )
        heads, kv_heads = query.out_features // dim, key.out_features // dim
        # The length of a cached sequence is read off the first layer; a bias after no heads has no place in a spec.
        least = int(causal and (i == 0 or out.bias is not None))
        found.append(Sublayer(len(found), i, "attention", heads, dim, heads // kv_heads, least))
        found.append(Sublayer(len(found), i, "mlp", down.in_features, 1))
    return tuple(found)


def all_units(sublayers: Sequence[Sublayer]) -> Kept:
    return tuple(tuple(range(s.num_units)) for s in sublayers)


def columns(sublayer: Sublayer, units: Sequence[int]) -> Tensor:
    """int64: columns of the consumer that these units fill."""
    at = torch.tensor(list(units), dtype=torch.int64)
    return (at[:, None] * sublayer.unit_dim + torch.arange(sublayer.unit_dim)).flatten()


def kv_heads_of(sublayer: Sublayer, units: Sequence[int]) -> list[int]:
    """The KV heads that these query heads read, in order."""
    return sorted({u // sublayer.group for u in units})


def is_whole(sublayer: Sublayer, units: Sequence[int]) -> bool:
    """Whether every KV head that is left serves equally many query heads, as attention needs."""
    counts = {sum(u // sublayer.group == g for u in units) for g in kv_heads_of(sublayer, units)}
    return len(counts) <= 1


def consumer_of(model: nn.Module, layout: Layout, sublayer: Sublayer) -> nn.Linear:
    layer = layers_of(model, layout)[sublayer.layer]
    return _linear(layer, layout.out if sublayer.kind == "attention" else layout.down)


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    module = layer.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def check_kept(sublayers: Sequence[Sublayer], kept: Kept) -> None:
    """Our own invariant: sorted, different, at least the minimum, whole groups."""
    for s, units in zip(sublayers, kept, strict=True):
        assert list(units) == sorted(set(units)) and all(0 <= u < s.num_units for u in units), s.name
        assert len(units) >= s.min_units and is_whole(s, units), s.name
