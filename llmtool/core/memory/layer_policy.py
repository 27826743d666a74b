"""Which cached pages make a prefix usable, per layer type, and the longest prefix that all types can use
(Jenga: the policy interface of a layer type).

Prefixes are counted in blocks of `block` tokens. What is cached of a type is a bitmask of blocks, bit i for
tokens [i * block, (i + 1) * block); of a state, bit i says that its checkpoint after i + 1 blocks is there. A hit
of n blocks must hold everything that the next token, at position n * block, reads: it sees itself and what came
before, so a window of w tokens wants the w - 1 before it. Recomputing only a missing window would not be exact:
what its tokens hold depends, layer by layer, on windows before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmtool.core.memory.geometry import STATES, LayerCacheSpec


def live_blocks(spec: LayerCacheSpec, num_blocks: int, block: int) -> range:
    """Blocks that a token right after `num_blocks` whole ones reads in this layer; of a state, its checkpoint."""
    end = num_blocks * block
    if num_blocks == 0 or spec.kind in ("cross_attention", "shared"):
        return range(0)  # image tokens have keys of their own; a shared layer's KV is another layer's
    if spec.kind in STATES:
        return range(num_blocks - 1, num_blocks)
    first = 0
    if spec.kind == "sliding_window" and spec.window is not None:
        first = max(0, end - spec.window + 1)
    elif spec.kind == "chunked" and spec.chunk is not None:
        first = end // spec.chunk * spec.chunk
    return range(min(first // block, num_blocks), num_blocks) if first < end else range(0)


def longest_valid(spec: LayerCacheSpec, present: int, upto: int, block: int) -> int:
    """The longest prefix of at most `upto` blocks that this type can use by itself."""
    length = upto
    while length > 0:
        live = live_blocks(spec, length, block)
        if not live:
            return length
        missing = _mask(live) & ~present
        if not missing:
            return length
        length = _next_below(spec, present, live, missing, length)
    return 0


def _next_below(spec: LayerCacheSpec, present: int, live: range, missing: int, length: int) -> int:
    """The next shorter candidate; every length between is invalid."""
    if spec.kind in STATES:
        return (present & ((1 << (length - 1)) - 1)).bit_length()
    if live.start == 0:
        # All that is read begins at the start: the lowest hole is where it ends.
        lowest = (missing & -missing).bit_length() - 1
        return min(lowest, length - 1)
    # A shorter prefix begins to read no later, so it reads the highest hole until it ends before it.
    return missing.bit_length() - 1


def joint_longest_hit(specs: Sequence[LayerCacheSpec], present: Sequence[int], upto: int, block: int) -> int:
    """The longest prefix, in blocks, that every type can use: shrink until all agree. specs: one per layer type;
    present: its cached blocks; upto: blocks of the prompt that may be taken over."""
    length = upto
    while length > 0:
        before = length
        for spec, mask in zip(specs, present, strict=True):
            length = longest_valid(spec, mask, length, block)
        if length == before:
            break
    return length


def _mask(blocks: range) -> int:
    return ((1 << len(blocks)) - 1) << blocks.start
