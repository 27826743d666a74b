"""Weight matrices as the CPU kernels read them: in panels, as they are or in 8 or 4 bits.

A packed matrix [n, k] is a sequence of panels of 32 rows, zero-padded, k outermost (csrc/panel.h): float32
[k][32], bfloat16 [k/2][32][2]. compact: bfloat16 in 12 bits, exactly (csrc/compact.h). Integers are symmetric, with
a bfloat16 scale per row and group of columns: w = scale * q. int8: -127..127, a byte each, like bfloat16 panels.
int4: -8..7, stored as q + 8 in nibbles, eight columns of a panel in 128 bytes (csrc/expand.h).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtool_kernels.cpu import abi
from llmtool_kernels.cpu.native import Native

Format = Literal["float32", "bfloat16", "compact", "int8", "int4"]

PANEL = 32
HALF = PANEL // 2
MAX_GROUP = 256  # csrc/linear.cpp
AT_ONCE = 2**22  # values rounded at a time: there are several copies of them in float32
COMPACT_TABLE = 64  # csrc/compact.h
MAX_EXCEPTIONS = 256  # one in so many values of a panel; some trained models have one in 25,000
_FORMATS = {
    "float32": abi.PANEL_F32,
    "bfloat16": abi.PANEL_BF16,
    "compact": abi.PANEL_COMPACT,
    "int8": abi.PANEL_INT8,
    "int4": abi.PANEL_INT4,
}


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """q: int8 [n, k]. scales: bfloat16 [n, k / group]. bits: 8 or 4. What it stands for: `dequantize`."""

    q: Tensor
    scales: Tensor
    bits: int

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """float32 [n, k]: exactly the matrix that the kernels multiply by."""
        return self.q.float() * self.scales.float().repeat_interleave(self.group, dim=1)


class Exceptions(NamedTuple):
    """The values of a compact matrix that its panels leave out. starts: int64 [panels + 1]. values: int64 [N], each
    k, column of the panel << 32 and bfloat16 bits << 48; panel i's are values[starts[i] : starts[i + 1]]."""

    starts: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix [n, k] in panels. data: uint8, flat. scales: bfloat16 [panels, k / group, 32], or None.

    gated: rows were gate, then up, and lie in panels of 16 gate rows and the same 16 up rows.
    """

    format: Format
    n: int
    k: int
    data: Tensor
    scales: Tensor | None = None
    group: int = 0
    gated: bool = False
    exceptions: Exceptions | None = None
    struct: abi.Weight = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        scales = 0 if self.scales is None else self.scales.data_ptr()
        group = self.group or self.k
        struct = abi.Weight(_FORMATS[self.format], self.n, self.k, group, self.data.data_ptr(), scales)
        if self.exceptions is not None:
            struct.starts = self.exceptions.starts.data_ptr()
            struct.exceptions = self.exceptions.values.data_ptr()
        object.__setattr__(self, "struct", struct)

    @property
    def nbytes(self) -> int:
        kept = (self.data, self.scales, *(self.exceptions or ()))
        return sum(t.nbytes for t in kept if t is not None)

    def dense(self) -> Tensor:
        """The matrix [n, k] again, float32 or bfloat16; dequantized float32 for integers."""
        panels, k = num_panels(self.n), self.k
        if self.format == "float32":
            rows = self.data.view(torch.float32).view(panels, k, PANEL).transpose(1, 2)
        elif self.format == "bfloat16":
            rows = _from_pairs(self.data.view(torch.bfloat16).view(panels, k // 2, PANEL, 2))
        elif self.format == "compact":
            assert self.exceptions is not None
            rows = _from_pairs(_from_compact(self.data, self.exceptions, panels, k))
        else:
            pairs = self.data.view(torch.int8) if self.format == "int8" else _from_nibbles(self.data)
            assert self.scales is not None
            scales = self.scales.float().transpose(1, 2).repeat_interleave(self.group, dim=2)
            rows = _from_pairs(pairs.view(panels, k // 2, PANEL, 2)).float() * scales
        return _ungate(rows, self.n) if self.gated else rows.reshape(-1, k)[: self.n]


def num_panels(n: int) -> int:
    return -(-n // PANEL)


def can_pack(weight: Tensor) -> bool:
    """Whether `pack` takes it: bfloat16 goes by pairs of columns."""
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and weight.shape[-1] % 2 == 0)


def pack(weight: Tensor, native: Native, gated: bool = False) -> PackedWeight:
    """weight [n, k] float32 or bfloat16, on CPU. gated: its first n / 2 rows are gate, the others up."""
    n, k = weight.shape
    if not can_pack(weight):
        raise ValueError(f"a {weight.dtype} matrix with {k} columns cannot be packed")
    data = torch.empty(num_panels(n) * PANEL * k * weight.element_size(), dtype=torch.uint8)
    native.pack(weight.contiguous(), gated, data)
    name: Format = "float32" if weight.dtype == torch.float32 else "bfloat16"
    return PackedWeight(name, n, k, data, gated=gated)


def pack_compact(weight: Tensor, native: Native, gated: bool = False) -> PackedWeight | None:
    """weight [n, k] bfloat16 in three quarters of its bytes, exactly (csrc/compact.h). None where that does not
    work: k is no multiple of 4, or so many values have rare exponents that keeping them apart would cost time."""
    n, k = weight.shape
    if weight.dtype != torch.bfloat16 or k % 4:
        return None
    panels, most = num_panels(n), max(8, k * PANEL // MAX_EXCEPTIONS)
    data = torch.empty(panels, COMPACT_TABLE + k * PANEL * 12 // 8, dtype=torch.uint8)
    counts = torch.empty(panels, dtype=torch.int64)
    room = torch.empty(panels, most, dtype=torch.int64)
    native.pack_compact(weight.contiguous(), gated, data, counts, room)
    if int(counts.max()) > most:
        return None
    starts = F.pad(counts.cumsum(0), (1, 0))
    values = room[torch.arange(most) < counts[:, None]]
    return PackedWeight("compact", n, k, data.flatten(), gated=gated, exceptions=Exceptions(starts, values))


def quantize(weight: Tensor, bits: int, group: int) -> QuantizedWeight:
    """Round weight [n, k] to `bits` (8 or 4) per value, with a scale per row and `group` columns.

    group: a multiple of 8, at most MAX_GROUP, that divides k. The scale is the one among a few, from the largest
    absolute value downwards, that gives the smallest squared error: clipping an outlier often serves the others.
    """
    n, k = weight.shape
    if bits not in (8, 4) or group % 8 or group > MAX_GROUP or k % group:
        raise ValueError(f"{k} columns cannot be quantized to {bits} bits in groups of {group}")
    parts = [
        _round(rows.float().unflatten(1, (-1, group)), bits) for rows in weight.split(max(1, AT_ONCE // k))
    ]
    q, scales = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedWeight(q.view(n, k), scales, bits)


def _round(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """values: float32 [n, groups, group] -> int8 of their shape, bfloat16 [n, groups]."""
    extreme = values.gather(2, values.abs().argmax(2, keepdim=True))  # [n, groups, 1]
    # Of 4 bits the lowest level is used too: the value furthest from zero, of either sign, becomes -8.
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    steps = (1.0,) if bits == 8 else (1.0, 0.95, 0.9, 0.85, 0.8)
    best, best_q, best_scale = None, None, None
    for step in steps:
        scale = (extreme.abs() if bits == 8 else extreme) * step / (high if bits == 8 else low)
        scale = scale.bfloat16().float()
        q = (values / torch.where(scale == 0, 1.0, scale)).round_().clamp_(low, high)
        error = (q * scale - values).square_().sum(2, keepdim=True)
        if best is None or best_q is None or best_scale is None:
            best, best_q, best_scale = error, q, scale
            continue
        better = error < best
        best_q = torch.where(better, q, best_q)
        best_scale, best = torch.where(better, scale, best_scale), torch.minimum(error, best)
    assert best_q is not None and best_scale is not None
    return best_q.to(torch.int8), best_scale.squeeze(2).bfloat16()


def pack_quantized(weight: QuantizedWeight, gated: bool = False) -> PackedWeight:
    """The same values, laid out for the kernels."""
    n, k = weight.q.shape
    rows, scales = (_gate(t, n) if gated else _pad(t) for t in (weight.q, weight.scales))  # [panels, 32, ...]
    pairs = rows.view(-1, PANEL, k // 2, 2).transpose(1, 2).contiguous()  # [panels, k / 2, 32, 2]
    data = pairs.view(torch.uint8).flatten() if weight.bits == 8 else _to_nibbles(pairs)
    name: Format = "int8" if weight.bits == 8 else "int4"
    return PackedWeight(name, n, k, data, scales.transpose(1, 2).contiguous(), weight.group, gated)


def pack_bias(bias: Tensor, gated: bool = False) -> Tensor:
    """float32 [panels * 32]: a bias [n] in the order of the packed rows, zeros after them."""
    rows = bias.float()[:, None]
    return (_gate(rows, len(rows)) if gated else _pad(rows)).flatten()


def _pad(rows: Tensor) -> Tensor:
    """[n, c] -> [panels, 32, c], zeros at the end."""
    n, columns = rows.shape
    out = rows.new_zeros(num_panels(n) * PANEL, columns)
    out[:n] = rows
    return out.view(-1, PANEL, columns)


def _gate(rows: Tensor, n: int) -> Tensor:
    """[n, c], gate rows then up rows -> [panels, 32, c] of 16 gate and 16 up rows."""
    out = rows.new_zeros(num_panels(n), 2, HALF, rows.shape[1])
    for i, half in enumerate(rows.view(2, n // 2, -1)):
        padded = rows.new_zeros(num_panels(n) * HALF, rows.shape[1])
        padded[: n // 2] = half
        out[:, i] = padded.view(-1, HALF, rows.shape[1])
    return out.view(-1, PANEL, rows.shape[1])


def _ungate(rows: Tensor, n: int) -> Tensor:
    """The reverse of `_gate`."""
    halves = rows.unflatten(1, (2, HALF)).transpose(0, 1).flatten(1, 2)  # [2, panels * 16, k]
    return halves[:, : n // 2].reshape(n, -1)


def _from_pairs(pairs: Tensor) -> Tensor:
    """[panels, k / 2, 32, 2] -> [panels, 32, k]"""
    return pairs.transpose(1, 2).flatten(2)


def _from_compact(data: Tensor, exceptions: Exceptions, panels: int, k: int) -> Tensor:
    """bfloat16 [panels, k / 2, 32, 2]"""
    panel = data.view(panels, -1)
    table = panel[:, :COMPACT_TABLE].view(torch.int16).to(torch.int64)  # [panels, 32]
    steps = panel[:, COMPACT_TABLE:].view(panels, k // 4, 3, 2 * PANEL).to(torch.int64)
    rest = steps[:, :, :2]
    numbers = torch.stack((steps[:, :, 2] & 15, steps[:, :, 2] >> 4), dim=2)
    exponents = table.gather(1, numbers.flatten(1)).view_as(numbers)
    words = ((rest & 0x80) << 8 | rest & 0x7F | exponents).to(torch.uint16).view(panels, k // 2, PANEL, 2)
    values = exceptions.values
    at = torch.repeat_interleave(torch.arange(panels), exceptions.starts.diff())
    row, column = values & 0xFFFFFFFF, values >> 32 & 0xFFFF
    words.view(torch.int16)[at, row // 2, column, row % 2] = (values >> 48).to(torch.int16)
    return words.view(torch.bfloat16)


def _to_nibbles(pairs: Tensor) -> Tensor:
    """int8 -8..7 [panels, k / 2, 32, 2] -> uint8, flat: four units of 64 values in 64 words of 16 bits."""
    units = (pairs.reshape(-1, 4, 2 * PANEL) + 8).to(torch.int32)
    words = sum(units[:, i] << (4 * i) for i in range(4))
    assert isinstance(words, Tensor)
    return words.to(torch.uint16).view(torch.uint8).flatten()


def _from_nibbles(data: Tensor) -> Tensor:
    """The reverse: int8, flat."""
    words = data.view(torch.uint16).to(torch.int32).view(-1, 1, 2 * PANEL)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32).view(1, 4, 1)
    return ((words >> shifts & 15) - 8).to(torch.int8).flatten()
