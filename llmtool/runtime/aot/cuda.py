"""The CUDA-graph backend: a schedule captured once, with events only where its waits are, and replayed.

A graph keeps no streams, only which launch waits for which: the streams' own order and the waits, which are the
edges of the minimum equivalent graph. What captures is a `Runtime`, so that the same code runs on a recorder in the
tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtool.runtime.aot.cpu import Replay
from llmtool.runtime.aot.machine import Environment, Machine
from llmtool.runtime.aot.order import members
from llmtool.runtime.aot.program import Value


class Runtime(Protocol):
    """Streams are numbered; 0 is the one that captures."""

    def begin(self, streams: int) -> None: ...
    def launch(self, stream: int, work: Callable[[], None]) -> None: ...
    def record(self, stream: int) -> Any:
        """An event after all that the stream has so far."""
        ...

    def wait(self, stream: int, event: Any) -> None: ...
    def end(self) -> Callable[[], None]:
        """What replays the capture."""
        ...

    def abort(self) -> None:
        """Give up a capture that failed, with its memory."""
        ...


class CudaRuntime:
    """torch's streams, events and graphs; a memory pool of its own, or one to share with other captures."""

    def __init__(self, device: torch.device, pool: Any = None) -> None:
        self._device, self._pool = device, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._streams: list[torch.cuda.Stream] = []
        self._capture: Any = None

    def begin(self, streams: int) -> None:
        torch.cuda.synchronize(self._device)
        self._streams = [torch.cuda.Stream(self._device) for _ in range(streams)]
        self._graph = torch.cuda.CUDAGraph()
        self._capture = torch.cuda.graph(self._graph, pool=self._pool, stream=self._streams[0])
        self._capture.__enter__()

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._streams[stream]):
            work()

    def record(self, stream: int) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._streams[stream])
        return event

    def wait(self, stream: int, event: torch.cuda.Event) -> None:
        self._streams[stream].wait_event(event)

    def end(self) -> Callable[[], None]:
        assert self._graph is not None
        self._capture.__exit__(None, None, None)
        return self._graph.replay

    def abort(self) -> None:
        with suppress(RuntimeError):  # the capture is invalid by now, which is why we are here
            self._capture.__exit__(None, None, None)
        self._graph = None
        torch.cuda.empty_cache()


def capture(machine: Machine, runtime: Runtime, inputs: list[Tensor]) -> Replay:
    """A function of the step's inputs that gives its outputs in new memory.

    inputs: examples; the step reads copies of them at fixed addresses, and copies back what it changes. Raises
    whatever a call raises, torch.OutOfMemoryError for one, after the capture is given up.
    """
    program = machine.program
    static = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in inputs
    ]
    environment: Environment = {
        b: static[m.index] for b, m in enumerate(program.memories) if m.kind == "input"
    }
    changed = [program.memories[b].index for b in sorted(program.written("input"))]
    try:
        _emit(machine, runtime, environment)
        go = runtime.end()
    except BaseException:
        runtime.abort()
        raise

    def replay(*given: Tensor) -> list[Any]:
        for place, tensor in zip(static, given, strict=True):
            place.copy_(tensor, non_blocking=True)
        go()
        for index in changed:
            given[index].copy_(static[index])
        outputs = [machine.read(v, environment) if isinstance(v, Value) else v for v in program.outputs]
        return [t.clone() if isinstance(t, Tensor) else t for t in outputs]

    return replay


def _emit(machine: Machine, runtime: Runtime, environment: Environment) -> None:
    streams, waits = machine.assignment.streams, machine.waits()
    runtime.begin(max(1, machine.assignment.num_streams))
    # A stream takes part in a capture once it waits for one that does; nothing runs before this event.
    start = runtime.record(0)
    awaited = {u for u, _ in machine.assignment.waits}
    events: dict[int, Any] = {}
    joined = {0}
    freed = _last_in_stream(machine)
    for i, stream in enumerate(streams):
        if stream not in joined:
            runtime.wait(stream, start)
            joined.add(stream)
        for u in waits[i]:
            runtime.wait(stream, events[u])
        runtime.launch(stream, lambda i=i: machine.step(i, environment))  # type: ignore[misc]
        if i in awaited:
            events[i] = runtime.record(stream)
        for b in freed[i]:
            environment.pop(b, None)
    for stream in sorted(joined - {0}):
        runtime.wait(0, runtime.record(stream))


def _last_in_stream(machine: Machine) -> list[list[int]]:
    """For each task the loose buffers that are done with it and never left its stream: only there does torch's
    allocator know when their memory is free. The others live as long as the graph."""
    found: list[list[int]] = [[] for _ in machine.graph.tasks]
    streams = machine.assignment.streams
    for b, buffer in machine.buffers.items():
        users = list(members(buffer.users))
        if b not in machine.place and not buffer.kept and len({streams[u] for u in users}) == 1:
            found[users[-1]].append(b)
    return found
