"""A program with its memory: an arena for what goes where it is told, windows on it, and calls one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llmtool.runtime.aot.arena import ALIGNMENT, ArenaPlan, Buffer, buffers_of, plan_arena
from llmtool.runtime.aot.order import Order, members, scheduled
from llmtool.runtime.aot.program import Program, Value, mapped, tensors, values
from llmtool.runtime.aot.streams import Assignment
from llmtool.runtime.aot.tasks import TaskGraph

POISON = 0xFF  # as bytes of a float of any width: NaN

Environment = dict[int, Tensor]  # buffer -> a tensor in it, of buffers that are nowhere until they are made


class Machine:
    """Runs a program's calls, in any order that its schedule leaves open.

    Inner buffers whose first writer takes `out=` lie in the arena, unless an output lies in them: outputs must be
    new memory in every step. Other inner buffers are made by their calls, with torch's allocator.
    """

    def __init__(
        self, program: Program, graph: TaskGraph, assignment: Assignment, device: torch.device
    ) -> None:
        self.program, self.graph, self.assignment = program, graph, assignment
        self.order: Order = scheduled(len(graph), graph.edges, assignment.streams)
        self.buffers = buffers_of(graph.tasks, program.inner_bytes(), program.kept())
        placed = {b: buffer for b, buffer in self.buffers.items() if self._told(b, buffer)}
        alignment = 512 if device.type == "cuda" else ALIGNMENT
        self.plan = plan_arena(list(placed.values()), self.order, alignment)
        self.place = dict(zip(placed, self.plan.offsets, strict=True))
        self.arena = torch.empty(self.plan.nbytes, dtype=torch.uint8, device=device)
        self._windows: dict[Value, Tensor] = {}

    def _told(self, b: int, buffer: Buffer) -> bool:
        return self.program.calls[buffer.writer].how == "out" and not buffer.kept

    @property
    def loose_bytes(self) -> int:
        """Of inner buffers that torch's allocator provides."""
        return sum(buffer.nbytes for b, buffer in self.buffers.items() if b not in self.place)

    def is_fixed(self, value: Value) -> bool:
        """Whether it has the same address in every step."""
        return value.buffer in self.place or self.program.memories[value.buffer].kind == "outside"

    def fixed(self, value: Value) -> Tensor:
        """The window of a value that has the same address in every step; the same object each time."""
        if value not in self._windows:
            memory = self.program.memories[value.buffer]
            if value.buffer in self.place:
                offset = self.place[value.buffer] // value.dtype.itemsize + value.offset
                self._windows[value] = window(self.arena, value, offset)
            else:
                assert memory.tensor is not None
                same = memory.tensor if _geometry(memory.tensor) == value.geometry else None
                self._windows[value] = window(memory.tensor, value) if same is None else same
        return self._windows[value]

    def read(self, value: Value, environment: Environment) -> Tensor:
        if self.is_fixed(value):
            return self.fixed(value)
        tensor = environment[value.buffer]
        return tensor if _geometry(tensor) == value.geometry else window(tensor, value)

    def step(self, i: int, environment: Environment) -> None:
        """Run call i."""
        call = self.program.calls[i]
        args, kwargs = mapped((call.args, call.kwargs), Value, lambda v: self.read(v, environment))
        if call.how == "out":
            if all(self.is_fixed(v) for v in values(call.result)):
                call.run(*args, **kwargs, out=mapped(call.result, Value, self.fixed))
                return
            result = (call.functional or call.target)(*args, **kwargs)
        else:
            result = call.run(*args, **kwargs)
        for value, tensor in zip(values(call.result), tensors(result), strict=True):
            b = value.buffer
            if not self.is_fixed(value) and b in self.buffers and self.buffers[b].writer == i:
                environment[b] = tensor

    def run(
        self,
        inputs: list[Tensor],
        turn: Iterable[int] | None = None,
        poison: bool = False,
    ) -> list[Any]:
        """A step, one call after the other; its outputs. turn: an order of the calls. poison: bytes of the arena
        that are free are overwritten, so that a plan that is wrong shows."""
        environment: Environment = {
            b: inputs[m.index] for b, m in enumerate(self.program.memories) if m.kind == "input"
        }
        users = {b: self.buffers[b].users for b in self.place}
        if poison:
            self.arena.fill_(POISON)
        for i in range(len(self.program.calls)) if turn is None else turn:
            self.step(i, environment)
            if poison:
                for b in list(users):
                    users[b] &= ~(1 << i)
                    if not users[b]:
                        del users[b]
                        at = self.place[b]
                        self.arena[at : at + self.buffers[b].nbytes].fill_(POISON)
        return [self.read(v, environment) if isinstance(v, Value) else v for v in self.program.outputs]

    def waits(self) -> list[list[int]]:
        """For each task the tasks of other streams that its own waits for."""
        found: list[list[int]] = [[] for _ in self.graph.tasks]
        for u, v in self.assignment.waits:
            found[v].append(u)
        return found


def planned(program: Program, graph: TaskGraph, assignment: Assignment) -> ArenaPlan:
    """The arena if all inner buffers lay in it, whatever their calls take: what the schedule asks for."""
    buffers = buffers_of(graph.tasks, program.inner_bytes(), program.kept())
    return plan_arena(list(buffers.values()), scheduled(len(graph), graph.edges, assignment.streams))


def last_users(machine: Machine) -> list[list[int]]:
    """For each task of one stream the loose buffers that nothing touches after it, outputs left out."""
    found: list[list[int]] = [[] for _ in machine.graph.tasks]
    for b, buffer in machine.buffers.items():
        if b not in machine.place and not buffer.kept:
            found[max(members(buffer.users))].append(b)
    return found


def window(tensor: Tensor, value: Value, offset: int | None = None) -> Tensor:
    """A tensor of the value's geometry in the memory of another."""
    made = torch.empty(0, dtype=value.dtype, device=tensor.device)
    at = value.offset if offset is None else offset
    return made.set_(tensor.untyped_storage(), at, value.size, value.stride)


def _geometry(t: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
    return t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset())
