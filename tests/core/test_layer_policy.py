"""The longest joint hit: the cases by hand, and equal to brute force over tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtool.core.memory.geometry import LayerCacheSpec
from llmtool.core.memory.layer_policy import joint_longest_hit, longest_valid

FULL = LayerCacheSpec(0, 1, 8, 8, 2)
STATE = LayerCacheSpec(0, 0, 0, 0, 2, "recurrent", state_bytes=64)
CROSS = LayerCacheSpec(0, 1, 8, 8, 2, "cross_attention")


def window(size: int) -> LayerCacheSpec:
    return LayerCacheSpec(0, 1, 8, 8, 2, "sliding_window", window=size)


def chunked(size: int) -> LayerCacheSpec:
    return LayerCacheSpec(0, 1, 8, 8, 2, "chunked", chunk=size)


@pytest.mark.parametrize(
    "spec,present,upto,hit",
    [
        (FULL, 0b1111, 4, 4),
        (FULL, 0b1011, 4, 2),
        (FULL, 0b1110, 4, 0),
        (FULL, 0b1111, 3, 3),
        (window(5), 0b1000, 4, 4),  # reads the 4 tokens before: one block of 4
        (window(6), 0b1000, 4, 0),  # one more token: the block before, too
        (window(6), 0b1100, 4, 4),
        (window(6), 0b0110, 4, 3),  # holes before the window do not matter
        (window(6), 0b0001, 4, 1),  # a head shorter than the window
        (window(1), 0b0000, 4, 4),  # reads nothing but itself
        (chunked(8), 0b0100, 4, 4),  # a new chunk begins at 16: nothing is read
        (chunked(8), 0b0100, 3, 3),
        (chunked(8), 0b0010, 3, 2),
        (chunked(6), 0b0001, 1, 1),
        (STATE, 0b1010, 4, 4),
        (STATE, 0b1010, 3, 2),
        (STATE, 0b1000, 3, 0),
        (CROSS, 0, 4, 4),
    ],
)
def test_one_type(spec: LayerCacheSpec, present: int, upto: int, hit: int) -> None:
    assert longest_valid(spec, present, upto, 4) == hit


@pytest.mark.parametrize(
    "specs,present,hit",
    [
        ([FULL, window(6)], [0b1111, 0b1100], 4),
        ([FULL, window(6)], [0b0111, 0b1100], 0),
        ([FULL, window(6)], [0b0111, 0b0110], 3),
        ([FULL, STATE], [0b1111, 0b0100], 3),
        ([FULL, STATE], [0b0011, 0b0100], 0),
        ([window(6), STATE], [0b1111, 0b0010], 2),
        ([window(5), window(9)], [0b1000, 0b1100], 4),
        ([FULL, window(6), STATE], [0b1111, 0b0111, 0b0110], 3),
    ],
)
def test_hybrids(specs: list[LayerCacheSpec], present: list[int], hit: int) -> None:
    assert joint_longest_hit(specs, present, 4, 4) == hit


def brute_force(specs: list[LayerCacheSpec], present: list[int], upto: int, block: int) -> int:
    """Token by token: which ones the next token sees, and whether each one's block is there."""
    for length in range(upto, 0, -1):
        end, valid = length * block, True
        for spec, mask in zip(specs, present, strict=True):
            if spec.kind == "recurrent":
                valid &= bool(mask >> (length - 1) & 1)
                continue
            for token in range(end):
                seen = spec.kind != "cross_attention"
                if spec.window is not None:
                    seen &= end - token < spec.window
                if spec.chunk is not None:
                    seen &= token // spec.chunk == end // spec.chunk
                valid &= not seen or bool(mask >> (token // block) & 1)
        if valid:
            return length
    return 0


kinds = st.one_of(
    st.just(FULL),
    st.just(STATE),
    st.just(CROSS),
    st.integers(1, 20).map(window),
    st.integers(1, 20).map(chunked),
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    types=st.lists(st.tuples(kinds, st.integers(0, 255), st.booleans()), min_size=1, max_size=4),
    upto=st.integers(0, 8),
    block=st.sampled_from([1, 3, 4]),
)
def test_equals_brute_force(types: list[tuple[LayerCacheSpec, int, bool]], upto: int, block: int) -> None:
    specs = [spec for spec, _, _ in types]
    present = [255 & ~(mask & -mask) if dense else mask for _, mask, dense in types]
    assert joint_longest_hit(specs, present, upto, block) == brute_force(specs, present, upto, block)
