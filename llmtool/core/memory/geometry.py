"""What a model's layers cache, and how pages hold it. Pure numbers: no tensors, no device.

A block-table entry is an offset into the KV arena in units of `UNIT` bytes, not a page id: int32 then reaches
1 TiB and pages of different sizes can share one arena. A page holds all layers of its group for
`tokens_per_page` tokens, so that it is contiguous and exchangeable (Jenga, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

UNIT = 512  # bytes per block-table unit


@dataclass(frozen=True, slots=True)
class LayerCacheSpec:
    """What one attention layer caches per token.

    head_dim may differ between K and V (MLA, MiMo). dtype_bytes: bytes per element.
    """

    layer: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype_bytes: int
    kind: str = "full"

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim) * self.dtype_bytes


@dataclass(frozen=True, slots=True)
class KVCacheGroup:
    """Layers that share block tables. Inside a page, layer i of `layers` starts at `layer_offsets[i]` bytes and
    stores K rows of all slots, then V rows: K[slot, head, dim], V[slot, head, dim].
    """

    name: str
    layers: tuple[LayerCacheSpec, ...]
    tokens_per_page: int
    layer_offsets: tuple[int, ...]
    page_bytes: int  # a multiple of UNIT; the tail past the last layer is padding

    @property
    def payload_bytes(self) -> int:
        return sum(spec.bytes_per_token for spec in self.layers) * self.tokens_per_page

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.bytes_per_token for spec in self.layers)

    @property
    def page_units(self) -> int:
        return self.page_bytes // UNIT

    def pages(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens need."""
        return -(-num_tokens // self.tokens_per_page)


def uniform_group(layers: Sequence[LayerCacheSpec], tokens_per_page: int, name: str = "full") -> KVCacheGroup:
    """One group for all `layers`, packed in order, the page padded to a multiple of UNIT bytes."""
    offsets, at = [], 0
    for spec in layers:
        offsets.append(at)
        at += spec.bytes_per_token * tokens_per_page
    padded = max(UNIT, -(-at // UNIT) * UNIT)
    return KVCacheGroup(name, tuple(layers), tokens_per_page, tuple(offsets), padded)
