"""ModelGeometry: what all layers of a model cache, and the types that Jenga sorts them into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmtool.core.memory.geometry import STATES, LayerCacheSpec
from llmtool.errors import UsageError

if TYPE_CHECKING:
    from llmtool.modelspec.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerType:
    """Layers that cache the same thing: equal kind, rows, reach and state."""

    name: str
    layers: tuple[LayerCacheSpec, ...]

    @property
    def spec(self) -> LayerCacheSpec:
        return self.layers[0]

    @property
    def is_state(self) -> bool:
        return self.spec.kind in STATES

    def live_bytes(self, text: int, image: int = 0) -> int:
        return len(self.layers) * self.spec.live_bytes(text, image)

    def pages(self, text: int, image: int, tokens_per_page: int) -> int:
        """Pages of `tokens_per_page` tokens that hold what the newest of `text` tokens reads. What a page holds
        outside the window stays with it."""
        if self.is_state:
            return 1
        live, end = self.spec.live_tokens(text, image), image if self.spec.kind == "cross_attention" else text
        return -(-end // tokens_per_page) - (end - live) // tokens_per_page if live else 0


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """name: for messages. layers: one spec per thing that is cached; a hybrid layer may have two, with the same
    number. Raises UsageError when nothing is cached."""

    name: str
    layers: tuple[LayerCacheSpec, ...]

    def __post_init__(self) -> None:
        if not any(spec.kind != "shared" for spec in self.layers):
            raise UsageError(f"{self.name} has no layer that caches anything.", "Check its config.json.")
        for spec in self.layers:
            if spec.kind != "shared" and not (spec.bytes_per_token or spec.state_bytes):
                raise UsageError(
                    f"Layer {spec.layer} of {self.name} caches rows of no bytes.",
                    "Check its heads and head dimension.",
                )

    @classmethod
    def from_spec(cls, spec: ModelSpec, dtype_bytes: int = 2) -> ModelGeometry:
        """The geometry of a model that runs here; dtype_bytes: per element of its KV."""
        return cls(spec.family, tuple(spec.layer_cache_specs(dtype_bytes)))

    def with_draft(self, draft: ModelGeometry) -> ModelGeometry:
        """This model with a draft model beside it in one arena (Jenga: speculative decoding). The draft's layers
        are numbered after this model's; its full attention becomes the kind `draft`."""
        first = 1 + max(spec.layer for spec in self.layers)
        beside = [
            replace(spec, layer=first + spec.layer, kind="draft" if spec.kind == "full" else spec.kind)
            for spec in draft.layers
        ]
        return ModelGeometry(f"{self.name} + {draft.name}", (*self.layers, *beside))

    def types(self) -> tuple[LayerType, ...]:
        """In order of first appearance; layers that share another's KV have no pages and belong to none."""
        found: dict[tuple[object, ...], list[LayerCacheSpec]] = {}
        for spec in self.layers:
            if spec.kind != "shared":
                key = (spec.kind, spec.bytes_per_token, spec.window, spec.chunk, spec.state_bytes)
                found.setdefault(key, []).append(spec)
        names: dict[str, int] = {}
        types = []
        for layers in found.values():
            kind = layers[0].kind
            names[kind] = names.get(kind, 0) + 1
            name = kind if names[kind] == 1 else f"{kind}-{names[kind]}"
            types.append(LayerType(name, tuple(layers)))
        return tuple(types)

    def live_bytes(self, text: int, image: int = 0) -> int:
        """Bytes that decoding at `text` tokens (and `image` image tokens) reads: what no allocator can avoid."""
        return sum(kind.live_bytes(text, image) for kind in self.types())


def rows(kind: str, count: int, row_bytes: int, reach: int | None = None) -> list[LayerCacheSpec]:
    """`count` attention layers that cache `row_bytes` a token, described as one head of 2-byte elements; reach:
    window or chunk. Layer numbers are given by `build`."""
    row = LayerCacheSpec(0, 1, row_bytes // 2, 0, 2, kind)
    if kind == "sliding_window":
        row = replace(row, window=reach)
    elif kind == "chunked":
        row = replace(row, chunk=reach)
    return [row] * count


def states(kind: str, count: int, state_bytes: int) -> list[LayerCacheSpec]:
    """`count` layers with one state a sequence."""
    return [LayerCacheSpec(0, 0, 0, 0, 2, kind, state_bytes=state_bytes)] * count


def build(name: str, *parts: Sequence[LayerCacheSpec]) -> ModelGeometry:
    """A geometry of several parts; layers are numbered part by part, which no byte depends on."""
    specs = [spec for part in parts for spec in part]
    return ModelGeometry(name, tuple(replace(spec, layer=i) for i, spec in enumerate(specs)))
