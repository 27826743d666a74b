"""What a model's layers cache, and how pages hold it. Pure numbers: no tensors, no device.

A block-table entry is an offset into the KV arena in units of `UNIT` bytes, not a page id: int32 then reaches
1 TiB and pages of different sizes can share one arena. A page holds all layers of its group for
`tokens_per_page` tokens, so that it is contiguous and exchangeable (Jenga: small pages).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmtool.errors import UsageError

UNIT = 512  # bytes per block-table unit


KINDS = (
    "full",
    "mla",
    "sliding_window",
    "chunked",
    "recurrent",
    "short_conv",
    "cross_attention",
    "shared",
    "draft",
)
STATES = ("recurrent", "short_conv")


@dataclass(frozen=True, slots=True)
class LayerCacheSpec:
    """What one layer caches: rows per token, or one state per sequence (`state_bytes`, kinds of STATES).

    head_dim may differ between K and V (MLA, MiMo). dtype_bytes: bytes per element. window: tokens that a token
    of a sliding-window layer sees, itself included. chunk: a chunked-local layer sees the tokens of its own chunk.
    cross_attention caches image tokens, not text. shared: reads another layer's KV and caches nothing. draft: a
    full-attention layer of a draft model. Raises UsageError for a kind or size that makes no sense.
    """

    layer: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype_bytes: int
    kind: str = "full"
    window: int | None = None
    chunk: int | None = None
    state_bytes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(
                f"Layer {self.layer} has the cache kind {self.kind!r}, which is not known.",
                f"Known kinds: {', '.join(KINDS)}.",
            )
        if (self.kind in STATES) != (self.state_bytes > 0) or self.state_bytes < 0:
            raise UsageError(
                f"Layer {self.layer} of kind {self.kind!r} has a state of {self.state_bytes} bytes.",
                f"A state belongs to the kinds {' and '.join(STATES)}, and to no other.",
            )
        if (self.window is not None and self.window < 1) or (self.chunk is not None and self.chunk < 1):
            raise UsageError(
                f"Layer {self.layer} sees a window of {self.window} and chunks of {self.chunk} tokens.",
                "Give 1 or more, or nothing for all tokens.",
            )

    @property
    def bytes_per_token(self) -> int:
        if self.kind == "shared":
            return 0
        return self.num_kv_heads * (self.k_head_dim + self.v_head_dim) * self.dtype_bytes

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes of `num_tokens` tokens in one page: a state is of one size however many it has seen."""
        return self.state_bytes or self.bytes_per_token * num_tokens

    def live_tokens(self, text: int, image: int = 0) -> int:
        """Tokens whose KV the newest of `text` tokens reads, itself included; a state counts as none."""
        if self.kind in STATES or self.kind == "shared":
            return 0
        if self.kind == "cross_attention":
            return image
        if self.kind == "sliding_window" and self.window is not None:
            return min(text, self.window)
        if self.kind == "chunked" and self.chunk is not None:
            return (text - 1) % self.chunk + 1 if text else 0
        return text

    def live_bytes(self, text: int, image: int = 0) -> int:
        return self.state_bytes + self.bytes_per_token * self.live_tokens(text, image)


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
        return sum(spec.bytes_for(self.tokens_per_page) for spec in self.layers)

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.bytes_per_token for spec in self.layers)

    @property
    def page_units(self) -> int:
        return self.page_bytes // UNIT

    def pages(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens need."""
        return -(-num_tokens // self.tokens_per_page)

    def least(self, sequences: int) -> int:
        """Pages that so many sequences need to run at once."""
        return sequences


def uniform_group(layers: Sequence[LayerCacheSpec], tokens_per_page: int, name: str = "full") -> KVCacheGroup:
    """One group for all `layers`, packed in order, the page padded to a multiple of UNIT bytes."""
    offsets, at = [], 0
    for spec in layers:
        offsets.append(at)
        at += spec.bytes_for(tokens_per_page)
    padded = max(UNIT, -(-at // UNIT) * UNIT)
    return KVCacheGroup(name, tuple(layers), tokens_per_page, tuple(offsets), padded)
