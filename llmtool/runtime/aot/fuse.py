"""Fusion of recorded programs: linear layers side by side become one (q, k and v; gate and up).

They read one input and do not depend on each other; one product by their weights, one under the other, reads the
input once and launches once. What read a part's result reads a window on the whole. Sums may be added up in another
order, so results agree with eager only within `TOLERANCE`; the executor checks it, and that the fused step is
faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmtool.runtime.aot.program import Call, Memory, Program, Value, mapped, values

# Of outputs' largest magnitude.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@dataclass(slots=True)
class Joined:
    """A tensor made of weights that may change. owners: the module's own tensors that the parts are windows on,
    whose versions count their changes; versions: those that it holds."""

    whole: Tensor
    parts: list[Tensor]
    owners: list[Tensor]
    versions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Take over parts that were written since."""
        versions = [owner._version for owner in self.owners]
        if versions == self.versions:
            return
        at = 0
        with torch.no_grad():
            for part in self.parts:
                self.whole[at : at + len(part)].copy_(part)
                at += len(part)
        self.versions = versions


def fused(program: Program, tensors: Iterable[Tensor]) -> tuple[Program, list[Joined]]:
    """The program with every group joined that can be, and the weights that this made. The given one stays as it
    is; without a group its equal is returned. tensors: the module's own, of which weights are."""
    owners = {t.untyped_storage()._cdata: t for t in tensors if not t.is_inference()}
    groups = _groups(program, owners)

    def join(whole: Tensor, parts: list[Tensor]) -> None:
        joined.append(Joined(whole, parts, [owners[p.untyped_storage()._cdata] for p in parts]))

    memories = list(program.memories)
    joined: list[Joined] = []
    moved: dict[
        int, tuple[int, int, int, int]
    ] = {}  # result -> (whole, first column, its columns, all columns)
    calls: dict[int, Call | None] = {}
    for group in groups:
        members = [program.calls[i] for i in group]
        columns = [_result(call).size[1] for call in members]
        weights = [_tensor(program, _weight(call)) for call in members]
        parts = [weight.t() for weight in weights]  # [N, K], as the module has it
        whole = torch.empty(sum(columns), parts[0].shape[1], dtype=parts[0].dtype, device=parts[0].device)
        join(whole, parts)
        arguments: list[Value] = [_x(members[0]), _outside(memories, whole.t())]
        if _has_bias(members[0]):
            biases = [_tensor(program, _bias(call)) for call in members]
            bias = torch.empty(sum(columns), dtype=whole.dtype, device=whole.device)
            join(bias, biases)
            arguments.insert(0, _outside(memories, bias))
        rows = _result(members[0]).size[0]
        made = len(memories)
        memories.append(Memory("inner", rows * sum(columns) * whole.dtype.itemsize, whole.device))
        first = 0
        for call, width in zip(members, columns, strict=True):
            moved[_result(call).buffer] = made, first, width, sum(columns)
            first += width
        result = Value(made, whole.dtype, (rows, sum(columns)), (sum(columns), 1), 0)
        run = torch.addmm if _has_bias(members[0]) else torch.mm
        reads = frozenset(v.buffer for v in arguments)
        seconds = sum(call.seconds for call in members)
        target = members[0].target
        joint = Call(target, tuple(arguments), {}, result, reads, frozenset({made}), run, "out", run, seconds)
        calls |= dict.fromkeys(group)
        calls[group[0]] = joint
    new = Program(memories, [], [])
    for i, call in enumerate(program.calls):
        kept = calls.get(i, call)
        if kept is not None:
            new.calls.append(_moved_call(kept, moved))
    new.outputs = [_moved(v, moved) if isinstance(v, Value) else v for v in program.outputs]
    return new, joined


def _groups(program: Program, owners: Mapping[int, Tensor]) -> list[list[int]]:
    """Numbers of calls that can be one: products of the same input by weights that no call writes."""
    written: dict[int, list[int]] = {}
    for i, call in enumerate(program.calls):
        for b in call.writes:
            written.setdefault(b, []).append(i)
    open_groups: dict[tuple[object, ...], list[int]] = {}
    for i, call in enumerate(program.calls):
        if (
            str(call.target) not in ("aten.mm.default", "aten.addmm.default")
            or call.kwargs
            or len(call.args) > 3
        ):
            continue
        fixed = [_weight(call), *([_bias(call)] if _has_bias(call) else [])]
        if any(program.memories[v.buffer].kind != "outside" or v.buffer in written for v in fixed):
            continue
        if any(_tensor(program, v).untyped_storage()._cdata not in owners for v in fixed):
            continue
        x, weight, result = _x(call), _weight(call), _result(call)
        k, n = weight.size
        dense = weight.stride == (1, k) and result.stride == (n, 1) and result.offset == 0
        first_write = written[result.buffer][0] == i and program.memories[result.buffer].kind == "inner"
        if not dense or not first_write or (_has_bias(call) and _bias(call).size != (n,)):
            continue
        if not all(_splits(v, n) for c in program.calls for v in _all(c) if v.buffer == result.buffer):
            continue
        # The input must be the same: not written between them.
        last_write = max((j for j in written.get(x.buffer, ()) if j < i), default=-1)
        open_groups.setdefault((x, weight.dtype, _has_bias(call), last_write), []).append(i)
    return [group for group in open_groups.values() if len(group) > 1]


def _all(call: Call) -> list[Value]:
    return [*values(call.args), *values(call.kwargs), *values(call.result)]


def _splits(value: Value, columns: int) -> bool:
    """Whether a window on rows of so many columns stays within columns as it walks along a row."""
    inner = sum((n - 1) * s for n, s in zip(value.size, value.stride, strict=True) if n > 1 and s < columns)
    whole = all(
        s % columns == 0 for n, s in zip(value.size, value.stride, strict=True) if n > 1 and s >= columns
    )
    return whole and value.offset % columns + inner < columns


def _moved(value: Value, moved: dict[int, tuple[int, int, int, int]]) -> Value:
    if value.buffer not in moved:
        return value
    buffer, first, columns, total = moved[value.buffer]
    stride = tuple(
        s // columns * total if s >= columns and n > 1 else s
        for n, s in zip(value.size, value.stride, strict=True)
    )
    row, column = divmod(value.offset, columns)
    return replace(value, buffer=buffer, stride=stride, offset=row * total + first + column)


def _moved_call(call: Call, moved: dict[int, tuple[int, int, int, int]]) -> Call:
    def place(buffers: frozenset[int]) -> frozenset[int]:
        return frozenset(moved[b][0] if b in moved else b for b in buffers)

    args, kwargs, result = (
        mapped(tree, Value, lambda v: _moved(v, moved)) for tree in (call.args, call.kwargs, call.result)
    )
    return replace(
        call, args=args, kwargs=kwargs, result=result, reads=place(call.reads), writes=place(call.writes)
    )


def _outside(memories: list[Memory], tensor: Tensor) -> Value:
    memories.append(Memory("outside", tensor.untyped_storage().nbytes(), tensor.device, tensor))
    return Value(len(memories) - 1, tensor.dtype, tuple(tensor.shape), tensor.stride(), 0)


def _tensor(program: Program, value: Value) -> Tensor:
    tensor = program.memories[value.buffer].tensor
    assert tensor is not None
    return tensor.as_strided(value.size, value.stride, value.offset)


def _has_bias(call: Call) -> bool:
    return str(call.target) == "aten.addmm.default"


def _bias(call: Call) -> Value:
    value: Value = call.args[0]
    return value


def _x(call: Call) -> Value:
    value: Value = call.args[-2]
    return value


def _weight(call: Call) -> Value:
    value: Value = call.args[-1]
    return value


def _result(call: Call) -> Value:
    value: Value = call.result
    return value


def close(mine: Sequence[object], theirs: Sequence[object]) -> bool:
    """Whether outputs agree within TOLERANCE."""
    for a, b in zip(mine, theirs, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a != b:
                return False
        elif not a.dtype.is_floating_point:
            if not torch.equal(a, b):
                return False
        else:
            x, y = a.double(), b.double()
            if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
                return False
            x, y = x.nan_to_num(), y.nan_to_num()
            scale = float(x.abs().max()) if x.numel() else 0.0
            if x.numel() and float((x - y).abs().max()) > TOLERANCE[a.dtype] * max(scale, 1e-30):
                return False
    return True
