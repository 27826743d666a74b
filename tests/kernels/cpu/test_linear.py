"""Packed weights and the products with them against torch, in every format and for every kind of row count."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from llmtool_kernels.cpu.linear import Gate, PackedLinear, join_reference, linear_reference
from llmtool_kernels.cpu.native import Native
from llmtool_kernels.cpu.weights import PackedWeight, pack, pack_compact, pack_quantized, quantize

FORMATS = ["float32", "bfloat16", "compact", "int8", "int4"]
SPECIAL = (0.0, -0.0, 1e-39, -3e-12, 7e4, -1e30)  # of exponents that few weights have
ROWS = [1, 2, 3, 5, 12, 16, 33, 100, 400]
GATES = [Gate(), Gate("gelu"), Gate("gelu_tanh"), Gate("clamped", 1.7, 1.5)]


@pytest.fixture(autouse=True)
def _seed(threads: int) -> None:
    torch.manual_seed(0)


def make(native: Native, form: str, n: int, k: int, gated: bool = False) -> PackedWeight:
    weight = torch.randn(n, k) / k**0.5
    if form == "float32":
        return pack(weight, native, gated)
    if form == "compact":
        packed = pack_compact(with_exceptions(weight), native, gated)
        assert packed is not None
        return packed
    if form == "bfloat16":
        return pack(weight.bfloat16(), native, gated)
    return pack_quantized(quantize(weight, int(form[3:]), 24), gated)


def with_exceptions(weight: torch.Tensor) -> torch.Tensor:
    """bfloat16, with more exponents in the first panel than a table holds, and zeros."""
    weight = weight.bfloat16()
    for i in range(6):
        weight[i % 2, 5 + i] = (-1) ** i * 1.5 * 2.0 ** (-20 - i)
    weight[-1, 0], weight[weight.shape[0] // 2, -1] = -2e-8, 40.0
    weight[0, 2] = weight[-2, 3] = 0
    return weight


def inputs(rows: int, k: int, form: str) -> torch.Tensor:
    return torch.randn(rows, k).to(torch.float32 if form == "float32" else torch.bfloat16)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("n", [2, 32, 70])
def test_packing_loses_nothing(native: Native, form: str, n: int, gated: bool) -> None:
    weight = torch.randn(n, 96)
    if form == "compact":
        dense = with_exceptions(weight)
        for i, value in enumerate(SPECIAL):
            dense[i % n, 20 + i] = value
        packed = pack_compact(dense, native, gated)
        assert packed is not None and packed.exceptions is not None
        assert n == 2 or len(packed.exceptions.values) >= 3
        assert torch.equal(packed.dense().view(torch.int16), dense.view(torch.int16))
    elif form in ("float32", "bfloat16"):
        dense = weight if form == "float32" else weight.bfloat16()
        assert torch.equal(pack(dense, native, gated).dense(), dense)
    else:
        quantized = quantize(weight, int(form[3:]), 24)
        assert torch.equal(pack_quantized(quantized, gated).dense(), quantized.dequantize())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("n", "k"), [(32, 48), (70, 120), (40, 192)])
def test_products(native: Native, form: str, rows: int, n: int, k: int) -> None:
    weight, x, bias = make(native, form, n, k), inputs(rows, k, form), torch.randn(n)
    linear = PackedLinear(weight, native, bias)
    expected = linear_reference(x, weight, bias)
    # Beside integers, bfloat16 inputs may be rounded to 16 bits (csrc/integer.h).
    close = {"atol": 3e-4 if form.startswith("int") else 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(linear(x, torch.float32), expected, **close)
    grown = torch.ones(rows, n)
    linear.add_to(x, grown)
    torch.testing.assert_close(grown, expected + 1, **close)
    if form != "float32":
        assert torch.equal(linear(x), linear(x, torch.float32).bfloat16())


def test_compact_weights_are_smaller_or_not_made(native: Native) -> None:
    weight = torch.randn(70, 576).bfloat16()
    packed = pack_compact(weight, native)
    assert packed is not None and packed.nbytes < 0.77 * pack(weight, native).nbytes
    many = torch.randn(64, 48).exp2().bfloat16() * torch.exp2(torch.randint(-60, 60, (64, 48))).bfloat16()
    assert pack_compact(many, native) is None
    assert pack_compact(torch.randn(64, 50).bfloat16(), native) is None  # not by fours
    assert pack_compact(torch.randn(64, 48), native) is None


@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_a_table(native: Native, form: str) -> None:
    weight, ids = make(native, form, 70, 120), torch.tensor([3, 69, 0, 3, 40])
    rows = PackedLinear(weight, native).rows(ids)
    assert torch.equal(rows, weight.dense().float()[ids])


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
def test_gated_products(native: Native, form: str, gate: Gate) -> None:
    weight, bias = make(native, form, 74, 48, gated=True), torch.randn(74)
    for rows in (1, 14):
        x = inputs(rows, 48, form)
        got = PackedLinear(weight, native, bias, gate)(x, torch.float32)
        expected = linear_reference(x, weight, bias, gate)
        torch.testing.assert_close(got, expected, atol=5e-4 if form.startswith("int") else 1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_integers_take_float32_inputs(native: Native, form: str) -> None:
    weight, x = make(native, form, 40, 48), torch.randn(5, 48)
    got = PackedLinear(weight, native)(x)
    torch.testing.assert_close(got, linear_reference(x, weight), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMATS)
def test_a_row_is_the_same_bit_for_bit_whatever_is_beside_it(native: Native, form: str) -> None:
    if native.isa == "amx" and form in ("bfloat16", "compact"):
        pytest.skip("tiles add up in another order, and take 16 rows or none")
    linear, x = PackedLinear(make(native, form, 70, 48), native), inputs(230, 48, form)
    whole = linear(x, torch.float32)
    for first, last in ((0, 1), (7, 9), (200, 230), (3, 200)):
        assert torch.equal(linear(x[first:last], torch.float32), whole[first:last])


def test_threads_may_share_a_layer(native: Native) -> None:
    """Each gets the product of its own rows."""
    linear = PackedLinear(make(native, "bfloat16", 1024, 512), native)
    inputs_of = [inputs(rows, 512, "bfloat16") for rows in (1, 3, 40)]
    expected = [linear(x) for x in inputs_of]

    def repeat(i: int) -> bool:
        return all(torch.equal(linear(inputs_of[i]), expected[i]) for _ in range(200))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(repeat, range(3)))


def test_strided_inputs(native: Native) -> None:
    linear, x = PackedLinear(make(native, "float32", 40, 48), native), torch.randn(9, 60)
    torch.testing.assert_close(linear(x[:, 5:53]), linear(x[:, 5:53].contiguous()), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda linear: linear(torch.randn(3, 50)), "x is"),
        (lambda linear: linear(torch.randn(3, 96)[:, ::2]), "x is"),
        (lambda linear: linear(torch.randn(48)), "x is"),
        (lambda linear: linear.add_to(torch.randn(3, 48), torch.zeros(3, 41)), "out is"),
        (lambda linear: linear.add_to(torch.randn(3, 48), torch.zeros(3, 40).bfloat16()), "only float32"),
        (lambda linear: linear(torch.randn(3, 48).bfloat16()), "do not run"),
    ],
)
def test_what_does_not_fit_is_refused(
    native: Native, bad: Callable[[PackedLinear], object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        bad(PackedLinear(make(native, "float32", 40, 48), native))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_finds_the_nearest_levels(bits: int) -> None:
    weight = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]
    weight[3] = 0.0
    quantized = quantize(weight, bits, 32)
    error = (quantized.dequantize() - weight).abs()
    step = quantized.scales.float().abs().repeat_interleave(32, dim=1)
    clipped = 1.0 if bits == 8 else 2.0  # the largest of a group may be clipped for the others' sake
    assert (error <= clipped * step).all()
    assert (error <= 0.501 * step + 1e-12).float().mean() > 0.97
    relative = (quantized.dequantize() - weight).square().sum() / weight.square().sum()
    assert relative < (2e-4 if bits == 8 else 1.2e-2)
    with pytest.raises(ValueError, match="groups of 25"):
        quantize(weight, bits, 25)


def test_the_gate_reference_is_what_models_use() -> None:
    x = torch.randn(4, 12)
    torch.testing.assert_close(join_reference(x, Gate()), F.silu(x[:, :6]) * x[:, 6:])


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_not_a_number_stays_none(native: Native, form: str, rows: int) -> None:
    """One NaN among a row's activations: its outputs are NaN, and no other row's."""
    linear, x = PackedLinear(make(native, form, 40, 96), native), inputs(rows, 96, form)
    x[-1, 3] = float("nan")
    y = linear(x)
    assert y[-1].isnan().all() and y[:-1].isfinite().all()
