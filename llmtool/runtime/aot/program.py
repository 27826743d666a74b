"""A recorded step: the calls it makes of torch's operators, and the memory that they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmtool.runtime.aot.tasks import Task, TaskGraph, dependencies

RANDOM = 0  # the buffer that stands for the generator's state: random calls keep their order through it


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor as a call sees it: a window on a buffer. offset: in elements from the buffer's start."""

    buffer: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def geometry(self) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
        return self.dtype, self.size, self.stride, self.offset


@dataclass(slots=True)
class Memory:
    """A buffer. kind: outside (parameters, constants: `tensor` is the first of it seen), input (number `index` of
    the step's tensors), inner (made by a call)."""

    kind: str
    nbytes: int
    device: torch.device
    tensor: Tensor | None = None
    index: int = -1
    value: Value | None = None  # an input's own window


@dataclass(slots=True)
class Call:
    """One call of an operator. args, kwargs, result: trees of Values and Python's own values.

    how: out (its result goes where it is told: out=), place (it changes arguments, and returns nothing new), new
    (it allocates its result). run: what is called, with the same arguments, a leaner way to the same kernel maybe.
    functional: for `out`, the leanest way that allocates.
    seconds: alone; share: of the device, see tasks.Task.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    reads: frozenset[int]
    writes: frozenset[int]
    run: Callable[..., Any]
    how: str
    functional: Callable[..., Any] | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return str(self.target).removeprefix("aten.").removesuffix(".default")

    @property
    def random(self) -> bool:
        return RANDOM in self.writes


@dataclass(slots=True)
class Program:
    """calls in program order. outputs: tree of Values and constants, as `spec` flattens it."""

    memories: list[Memory] = field(default_factory=lambda: [Memory("outside", 0, torch.device("cpu"))])
    calls: list[Call] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def graph(self) -> TaskGraph:
        """Tasks and what they wait for. Only what a call touches counts, so outside memory that is never written
        orders nothing."""
        return dependencies([Task(c.name, c.reads, c.writes, c.seconds) for c in self.calls])

    def written(self, kind: str) -> set[int]:
        """Buffers of this kind that calls write."""
        return {b for c in self.calls for b in c.writes if b != RANDOM and self.memories[b].kind == kind}

    def kept(self) -> frozenset[int]:
        """Inner buffers that outlive the step: outputs lie in them."""
        return frozenset(
            v.buffer for v in self.outputs if isinstance(v, Value) and self.memories[v.buffer].kind == "inner"
        )

    def inner_bytes(self) -> dict[int, int]:
        return {b: m.nbytes for b, m in enumerate(self.memories) if m.kind == "inner"}

    def fingerprint(self) -> list[str]:
        """What must be the same for a stored schedule to be of this program: its calls and what they touch."""
        return [f"{c.name} {sorted(c.reads)} {sorted(c.writes)}" for c in self.calls]


def values(tree: Any) -> Iterator[Value]:
    """The Values in arguments."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from values(item)
    elif isinstance(tree, dict):
        yield from values(list(tree.values()))


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in arguments."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def mapped(tree: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same tree with `change` of every leaf of this type."""
    if isinstance(tree, kind):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(item, kind, change) for item in tree)
    if isinstance(tree, dict):
        return {key: mapped(item, kind, change) for key, item in tree.items()}
    return tree
