"""y = x w^T over packed weights, for any number of rows; the reference is `F.linear` over the dense weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtool_kernels.cpu import abi
from llmtool_kernels.cpu.native import ELEMENTS, Native
from llmtool_kernels.cpu.weights import PackedWeight, pack_bias

GATES = {"silu": abi.SILU, "gelu_tanh": abi.GELU_TANH, "gelu": abi.GELU, "clamped": abi.CLAMPED}


@dataclass(frozen=True, slots=True)
class Gate:
    """How gate and up are joined. kind: silu | gelu | gelu_tanh: act(gate) * up; clamped: with gate at most limit
    and up within +-limit, gate * sigmoid(alpha * gate) * (up + 1)."""

    kind: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0

    @property
    def struct(self) -> abi.Gate:
        return abi.Gate(GATES[self.kind], self.alpha, self.limit)


class PackedLinear:
    """A linear layer bound to its weight. A gated one returns its two halves joined, [rows, n / 2].

    Rows do not influence each other: a row's result is the same, bit for bit, with any others beside it.
    """

    def __init__(
        self, weight: PackedWeight, native: Native, bias: Tensor | None = None, gate: Gate = Gate()
    ) -> None:
        self.weight = weight
        self.gate = gate
        self.bias = None if bias is None else pack_bias(bias, weight.gated)
        self.out_features = weight.n // 2 if weight.gated else weight.n
        self._native = native

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """x: [rows, k] float32 or bfloat16 -> [rows, out_features] of out_dtype, x's by default.

        x has the weight's type, or any of the two for integers. Sums are kept in float32.
        """
        out = x.new_empty(x.shape[0], self.out_features, dtype=out_dtype or x.dtype)
        self._launch(x, out, None)
        return out

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [N, k]: rows ids [N], int64, of the weight."""
        out = torch.empty(len(ids), self.weight.k)
        op = (abi.Op * 1)()
        op[0].kind, op[0].rows = abi.EMBED, len(ids)
        op[0].embed = abi.Embed(self.weight.struct, 1.0, out.data_ptr(), out.stride(0))
        ids = ids.contiguous()
        self._native.run(op, abi.Step(len(ids), ids.data_ptr()))
        return out

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """out, float32 [rows, n], grows by x w^T + bias. Not for a gated weight."""
        self._launch(x, out, 1.0)

    def bound(self, x: Tensor, out: Tensor, add: float | None = None) -> abi.Linear:
        """The operation from buffer x to buffer out, which must outlive it. add: out grows by so many times y."""
        weight = self.weight
        if x.dim() != 2 or x.shape[1] != weight.k or x.stride(1) != 1:
            raise ValueError(f"x is {list(x.shape)}, the weight [{weight.n}, {weight.k}]")
        if out.shape[1] != self.out_features or out.stride(1) != 1:
            raise ValueError(f"out is {list(out.shape)}, and {self.out_features} features come")
        if add is not None and (weight.gated or out.dtype != torch.float32):
            raise ValueError("only float32 grows, and not by a gated weight")
        return abi.Linear(
            weight.struct,
            x.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            out.data_ptr(),
            x.stride(0),
            ELEMENTS[x.dtype],
            out.stride(0),
            ELEMENTS[out.dtype],
            abi.GATED if weight.gated else abi.STORE if add is None else abi.ADD,
            1.0 if add is None else add,
            self.gate.struct,
        )

    def _launch(self, x: Tensor, out: Tensor, add: float | None) -> None:
        ops = (abi.Op * 1)()  # of this call alone: the library runs without Python's lock
        ops[0].kind, ops[0].rows, ops[0].linear = abi.LINEAR, x.shape[0], self.bound(x, out, add)
        self._native.run(ops, abi.Step())


def linear_reference(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, gate: Gate = Gate()
) -> Tensor:
    """What a PackedLinear computes, in torch and float32."""
    y = F.linear(x.float(), weight.dense().float(), None if bias is None else bias.float())
    return join_reference(y, gate) if weight.gated else y


def join_reference(x: Tensor, gate: Gate) -> Tensor:
    """x [rows, 2 * n], gates then ups -> [rows, n]."""
    g, up = x.chunk(2, dim=-1)
    if gate.kind == "clamped":
        g, up = g.clamp(max=gate.limit), up.clamp(-gate.limit, gate.limit)
        return g * torch.sigmoid(gate.alpha * g) * (up + 1)
    if gate.kind == "silu":
        return F.silu(g) * up
    return F.gelu(g, approximate="tanh" if gate.kind == "gelu_tanh" else "none") * up
