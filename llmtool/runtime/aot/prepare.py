"""From a step to what replays it: pre-run, schedules, verification against eager bit for bit, a race."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from llmtool.runtime.aot.bind import same_bits
from llmtool.runtime.aot.cost import GRAPH_COST, Candidate, SyncCost, candidates, simulate
from llmtool.runtime.aot.cpu import Replay, compile_step
from llmtool.runtime.aot.cuda import CudaRuntime, Runtime, capture
from llmtool.runtime.aot.fuse import Joined, close, fused
from llmtool.runtime.aot.keys import unflattener
from llmtool.runtime.aot.machine import Machine, planned
from llmtool.runtime.aot.order import order
from llmtool.runtime.aot.program import Program
from llmtool.runtime.aot.record import Recorder, Unrecordable, record
from llmtool.runtime.aot.streams import Assignment, assign, width
from llmtool.runtime.aot.tasks import TaskGraph

RACE_SECONDS = 0.3
TURNS = (5, 200)
NOISE = 0.02


@dataclass(slots=True)
class Plan:
    """A prepared step. result: puts what replay returns together. schedule: serial, gated or full, of the fused
    program if it says so. seconds: measured, by name, `eager` among them; predicted: of the schedules. arena: its
    bytes; loose: of inner buffers outside it; planned, no_reuse: of an arena for all inner buffers, and of all of
    them side by side."""

    replay: Replay
    result: Callable[[list[Any]], Any]
    schedule: str
    assignment: Assignment
    tasks: int
    concurrency: int
    arena: int
    loose: int
    planned: int
    no_reuse: int
    predicted: dict[str, float]
    seconds: dict[str, float]
    fingerprint: list[str]
    prepare_seconds: float = 0.0
    machine: Machine | None = field(default=None, repr=False)
    joined: list[Joined] = field(default_factory=list, repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a saved plan spares: the measurements, and the choice they led to."""

    schedule: str
    streams: tuple[int, ...]
    waits: tuple[tuple[int, int], ...]
    task_seconds: tuple[float, ...]
    seconds: dict[str, float]
    predicted: dict[str, float]
    fingerprint: list[str]


@dataclass(slots=True)
class Step:
    """What is prepared. run: the eager step, with its tensors bound. recorded: the same for the pre-run, where that
    is another function. training: the pre-run is a real step, whose effects stay. tensors: the
    module's own, for fusion."""

    run: Callable[[], Any]
    inputs: list[Tensor]
    device: torch.device
    recorded: Callable[[], Any] | None = None
    training: bool = False
    tensors: list[Tensor] = field(default_factory=list)


def prepare(
    step: Step,
    sync: SyncCost = GRAPH_COST,
    runtime: Callable[[], Runtime] | None = None,
    stored: Stored | None = None,
    race: bool = True,
    fuse: bool = False,
) -> tuple[Plan, Any]:
    """The plan of a step, and what its pre-run returned. Leaves memory as it was, or as one step leaves it when
    training. runtime: makes what captures; None takes the device's own backend. fuse: also try the fused program.

    Raises Unrecordable when the step cannot be replayed or a replay differs from eager in a bit.
    """
    before = _generators(step.device)
    try:
        recorder, result, spec = record(step.recorded or step.run, step.inputs)
    except BaseException:
        _seed(step.device, before)
        raise
    after = _generators(step.device)
    expected = Expected(recorder, result)
    try:
        plan = _planned(step, recorder, spec, expected, before, sync, runtime, stored, race, fuse)
    except BaseException:
        recorder.rewind()
        _seed(step.device, before)
        raise
    recorder.rewind()
    if step.training:
        expected.leave()
    _seed(step.device, after if step.training else before)
    return plan, result


def _planned(
    step: Step,
    recorder: Recorder,
    spec: TreeSpec,
    expected: Expected,
    before: list[Tensor],
    sync: SyncCost,
    runtime: Callable[[], Runtime] | None,
    stored: Stored | None,
    race: bool,
    fuse: bool,
) -> Plan:
    began = time.perf_counter()
    variants = _variants(recorder.program, fuse, stored, step.tensors)
    if variants is None:
        stored, variants = None, _variants(recorder.program, fuse, None, step.tensors)
    assert variants is not None
    captured = step.device.type == "cuda" or runtime is not None

    def again() -> None:
        recorder.rewind()
        _seed(step.device, before)

    ready: dict[str, _Ready] = {}
    predicted: dict[str, float] = {}
    problem: str | None = "it has nothing to replay"
    for label, program, joined in variants:
        graph = program.graph()
        for candidate in _schedules(graph, sync, captured, stored):
            with torch.inference_mode(False), torch.no_grad():
                machine = Machine(program, graph, candidate.assignment, step.device)
                again()
                if captured:
                    make = runtime or (lambda: CudaRuntime(step.device))
                    replay = capture(machine, make(), step.inputs)
                    again()
                else:
                    replay = compile_step(machine)
                problem = expected.differs(replay(*step.inputs), exact=not joined)
            if problem is None:
                name = candidate.name if stored is not None else label + candidate.name
                ready[name] = _Ready(replay, machine, joined)
                predicted[name] = candidate.seconds
    if not ready:
        raise Unrecordable(str(problem))
    if not step.training:  # what was exported must be the module, too
        again()
        problem = expected.differs(tree_flatten(step.run())[0])
        if problem is not None:
            raise Unrecordable(f"what torch.export made of it is not the module: {problem}")
    if stored is not None:
        seconds, best = stored.seconds, stored.schedule
    else:
        runs = {name: _timed(made.replay, step.inputs) for name, made in ready.items()}
        seconds = race_of({"eager": step.run, **runs}, recorder, step.device) if race else {}
        best = min(ready, key=lambda name: seconds.get(name, 0.0))
    machine = ready[best].machine
    program, graph = machine.program, machine.graph
    whole = planned(program, graph, machine.assignment)
    return Plan(
        replay=ready[best].replay,
        result=unflattener(spec),
        schedule=best,
        assignment=machine.assignment,
        tasks=len(graph),
        concurrency=width(order(len(graph), graph.edges)),
        arena=machine.plan.nbytes,
        loose=machine.loose_bytes,
        planned=whole.nbytes,
        no_reuse=whole.no_reuse,
        predicted=predicted,
        seconds=seconds,
        fingerprint=program.fingerprint(),
        prepare_seconds=time.perf_counter() - began,
        machine=machine,
        joined=ready[best].joined,
    )


@dataclass(frozen=True, slots=True)
class _Ready:
    replay: Replay
    machine: Machine
    joined: list[Joined]


def _variants(
    program: Program, fuse: bool, stored: Stored | None, tensors: list[Tensor]
) -> list[tuple[str, Program, list[Joined]]] | None:
    """The recorded program and, if that is another, the fused one; with a stored schedule the one that it is of,
    and its measurements. None where it is of neither."""
    made: list[tuple[str, Program, list[Joined]]] = [("", program, [])]
    if fuse:
        joint, joined = fused(program, tensors)
        if joined:
            made.append(("fused ", joint, joined))
    if stored is None:
        return made
    for label, variant, joined in made:
        if variant.fingerprint() == stored.fingerprint:
            for call, alone in zip(variant.calls, stored.task_seconds, strict=True):
                call.seconds = alone
            return [(label, variant, joined)]
    return None


def _schedules(graph: TaskGraph, sync: SyncCost, captured: bool, stored: Stored | None) -> list[Candidate]:
    if stored is not None:
        kept = Assignment(stored.streams, stored.waits)
        return [Candidate(stored.schedule, kept, stored.predicted.get(stored.schedule, 0.0))]
    if captured:
        return candidates(graph, sync)
    one = assign(graph, "serial")  # a CPU's calls use all threads already
    return [Candidate("serial", one, simulate(graph, one, SyncCost()))]


class Expected:
    """What the pre-run returned and left in memory outside the step."""

    def __init__(self, recorder: Recorder, result: Any) -> None:
        leaves = tree_flatten(result)[0]
        self._outputs = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
        self._changed = [(window, window.clone()) for window, _ in recorder.saved]

    def differs(self, outputs: Sequence[Any], exact: bool = True) -> str | None:
        """In what a run that has just ended differs from the pre-run; None if in no bit, or not exact, by no more
        than fusion may."""
        if not exact:
            windows, news = zip(*self._changed, strict=True) if self._changed else ((), ())
            if close(self._outputs, outputs) and close(news, windows):
                return None
            return "a fused replay differs from eager by more than rounding"
        for i, (mine, theirs) in enumerate(zip(self._outputs, outputs, strict=True)):
            if isinstance(mine, Tensor):
                if not same_bits(mine, theirs.detach()):
                    return f"output {i} of a replay differs from eager"
            elif mine != theirs:
                return f"output {i} is {theirs!r}, not {mine!r}"
        for window, new in self._changed:
            if not same_bits(window, new):
                return "a replay leaves other memory behind than eager"
        return None

    def leave(self) -> None:
        """Memory as the pre-run left it."""
        with torch.no_grad():
            for window, new in self._changed:
                window.copy_(new)


def race_of(
    runs: dict[str, Callable[[], Any]], recorder: Recorder | None, device: torch.device
) -> dict[str, float]:
    """Seconds of each, the least of interleaved turns: what else runs on the machine only adds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for turn in range(TURNS[1]):
        for name, run in runs.items():
            if recorder is not None and turn % 16 == 0:
                recorder.rewind()  # what adds to its memory would run away
            _synchronize(device)
            started = time.perf_counter()
            run()
            _synchronize(device)
            times[name].append(time.perf_counter() - started)
        if turn + 1 >= TURNS[0] and time.perf_counter() - began > RACE_SECONDS:
            break
    return {name: min(taken[1:]) for name, taken in times.items()}


def _timed(replay: Replay, inputs: list[Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return replay(*inputs)

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _seed(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def fastest(plan: Plan) -> bool:
    """Whether the plan beats eager, up to noise. A plan that was not raced is believed."""
    eager = plan.seconds.get("eager")
    return eager is None or plan.seconds[plan.schedule] <= eager * (1 + NOISE)
