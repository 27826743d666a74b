"""AotExecutor against eager, bit for bit; what falls back, and that it says why once."""

import copy
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from llmtool import AotExecutor
from llmtool.bench.nets import NETS, build
from llmtool.errors import UsageError
from llmtool.runtime.aot.bind import same_bits
from llmtool.runtime.aot.machine import Machine
from llmtool.runtime.aot.program import Program
from llmtool.runtime.aot.streams import assign
from tests.runtime.aot.graphs import linear_extension, stream_edges
from tests.runtime.aot.recorder import FakeRuntime


def same(a: Any, b: Any) -> bool:
    left, right = tree_flatten(a)[0], tree_flatten(b)[0]
    return len(left) == len(right) and all(same_bits(x, y) for x, y in zip(left, right, strict=True))


def state_of(module: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in (*module.parameters(), *module.buffers())]


@pytest.mark.parametrize("captured", [False, True], ids=["pre-bound", "captured"])
@pytest.mark.parametrize("name", NETS)
def test_equal_to_eager_in_every_bit(name: str, captured: bool) -> None:
    net = build(name, 2, tiny=True)
    eager = copy.deepcopy(net.module)
    runtime = FakeRuntime if captured else None
    fast = AotExecutor(net.module, net.inputs(2), always=True, runtime=runtime).prepare()
    assert same(state_of(net.module), state_of(eager))  # preparing leaves no trace
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = net.inputs(2)
        with torch.no_grad():
            assert same(fast(*inputs), eager(*inputs))
        assert same(state_of(net.module), state_of(eager))
    explained = fast.explain()
    assert not explained.fallbacks
    (plan,) = explained.plans
    assert plan.planned <= plan.no_reuse
    assert plan.tasks > 10


@pytest.mark.parametrize("name", NETS)
def test_any_interleaving_the_schedule_allows_with_freed_bytes_poisoned(name: str) -> None:
    net = build(name, 1, tiny=True)
    inputs = net.inputs(1)
    fast = AotExecutor(net.module, inputs, always=True).prepare()
    made = fast.explain().plans[0].machine
    assert made is not None
    with torch.no_grad():
        expected = net.module(*inputs)
    program: Program = made.program
    for mode in ("exact", "edges"):
        machine = Machine(program, made.graph, assign(made.graph, mode), torch.device("cpu"))
        edges = [*stream_edges(machine.assignment.streams), *machine.assignment.waits]
        for seed in range(3):
            turn = linear_extension(random.Random(seed), len(made.graph), edges)
            assert same(machine.run(list(inputs), turn, poison=True)[0], expected)


def test_capture_waits_only_where_the_schedule_does() -> None:
    net = build("inception", 1, tiny=True)
    runtimes: list[FakeRuntime] = []

    def make() -> FakeRuntime:
        runtimes.append(FakeRuntime())
        return runtimes[-1]

    fast = AotExecutor(net.module, net.inputs(1), always=True, runtime=make).prepare()
    (plan,) = fast.explain().plans
    assert plan.machine is not None
    full = runtimes[-1]  # one stream, gated, full concurrency
    made = assign(plan.machine.graph, "edges")
    # A wait for each of the schedule's, and one at the end for each side stream; joining takes part in no order.
    assert full.waits == made.synchronisations + made.num_streams - 1
    assert full.edges == {*stream_edges(made.streams), *made.waits}
    assert not runtimes[0].edges - set(stream_edges([0] * plan.tasks))


class Cached(nn.Module):
    """Pages that are read, written, read again: the second read must see the write, the first must not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pages", torch.zeros(8, 4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        before = self.pages.sum(0) + x
        self.pages[at] = self.linear(x)
        self.steps += 1
        return before, self.pages.mean(1)


@pytest.mark.parametrize("captured", [False, True], ids=["pre-bound", "captured"])
def test_mutation_edges(captured: bool) -> None:
    module = Cached().eval()
    eager = copy.deepcopy(module)
    runtime = (lambda: FakeRuntime(seed=3)) if captured else None
    fast = AotExecutor(module, (torch.zeros(4), torch.tensor([0])), always=True, runtime=runtime).prepare()
    for i in range(6):
        x, at = torch.randn(4), torch.tensor([i])
        with torch.no_grad():
            assert same(fast(x, at), eager(x, at))
        assert same(state_of(module), state_of(eager))
    assert module.steps == 6
    assert not fast.explain().fallbacks


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x + 1


@pytest.mark.parametrize("captured", [False, True], ids=["pre-bound", "captured"])
def test_inputs_written_in_place_are_the_callers(captured: bool) -> None:
    fast = AotExecutor(Writes(), (torch.ones(4),), always=True, runtime=FakeRuntime if captured else None)
    fast.prepare()
    x = torch.arange(4.0)
    assert fast(x).tolist() == [1, 3, 5, 7]
    assert x.tolist() == [0, 2, 4, 6]
    assert not fast.explain().fallbacks


def test_outputs_are_new_memory() -> None:
    net = build("mlp")
    (x,) = net.inputs(1)
    fast = AotExecutor(net.module, (x,), always=True).prepare()
    first = fast(x)
    kept = first.clone()
    fast(torch.randn_like(x))
    assert same(first, kept)


# -- training --------------------------------------------------------------------------------------------------


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.linear = nn.Dropout(0.2), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def cross_entropy(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y)


def trained(
    make: Callable[[nn.Module], torch.optim.Optimizer],
    steps: int,
    captured: bool,
    net: Callable[[], nn.Module],
) -> AotExecutor:
    """Train the same net both ways; they must agree in every bit of losses, weights and statistics."""
    torch.manual_seed(0)
    mine = net().train()
    theirs = copy.deepcopy(mine)
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,))) for _ in range(steps)]
    optimizer, other = make(mine), make(theirs)
    runtime = FakeRuntime if captured else None
    step = AotExecutor(
        mine, batches[0], loss=cross_entropy, optimizer=optimizer, always=True, runtime=runtime
    ).prepare()
    torch.manual_seed(1)
    losses = [step(*batch) for batch in batches]
    torch.manual_seed(1)
    expected = []
    for x, y in batches:
        other.zero_grad()
        loss = cross_entropy(theirs, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        other.step()
        expected.append(loss.detach())
    assert same(losses, expected)
    assert same(state_of(mine), state_of(theirs))
    return step


@pytest.mark.parametrize("captured", [False, True], ids=["pre-bound", "captured"])
def test_training_steps(captured: bool) -> None:
    def sgd(m: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    step = trained(sgd, 6, captured, Trained)
    assert len(step.explain().plans) == 1
    assert [f.reason for f in step.explain().fallbacks] == ["the optimizer has no state yet"]


def test_training_a_residual_net() -> None:
    step = trained(
        lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
        4,
        False,
        lambda: build("resnet", tiny=True).module,
    )
    (plan,) = step.explain().plans
    assert plan.concurrency > 4  # weight gradients wait for nobody


def test_fused_adam_is_recorded_and_one_that_counts_in_python_is_not() -> None:
    step = trained(lambda m: torch.optim.Adam(m.parameters(), fused=True), 5, False, Trained)
    assert len(step.explain().plans) == 1
    step = trained(lambda m: torch.optim.Adam(m.parameters(), foreach=False), 4, False, Trained)
    assert not step.explain().plans
    assert "the value of a tensor decides what Python does next" in str(step.explain())


def test_a_learning_rate_is_part_of_the_key() -> None:
    torch.manual_seed(0)
    mine, (x, y) = nn.Linear(4, 2), (torch.randn(3, 4), torch.tensor([0, 1, 0]))
    theirs = copy.deepcopy(mine)
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1)
    step = AotExecutor(mine, (x, y), loss=cross_entropy, optimizer=optimizer, always=True)
    for i in range(8):
        for group in (*optimizer.param_groups, *other.param_groups):
            group["lr"] = 0.1 if i < 4 else 0.01
        step(x, y)
        other.zero_grad()
        cross_entropy(theirs, x, y).backward()  # type: ignore[no-untyped-call]
        other.step()
        assert same(state_of(mine), state_of(theirs))
    assert len(step.explain().plans) == 2


# -- keys ------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, mode: str = "plain") -> Tensor:
        y = self.linear(x) * scale
        return F.dropout(y, 0.5, self.training) if mode == "plain" else -y


def changed_dtype(module: nn.Module) -> tuple[Any, ...]:
    module.double()
    return (torch.randn(2, 4, dtype=torch.float64),)


def replaced_weight(module: Any) -> tuple[Any, ...]:
    module.linear.weight = nn.Parameter(torch.randn(4, 4))
    return (torch.randn(2, 4),)


def moved_data(module: Any) -> tuple[Any, ...]:
    module.linear.weight.data = torch.randn(4, 4)
    return (torch.randn(2, 4),)


def loaded(module: nn.Module) -> tuple[Any, ...]:
    module.load_state_dict({name: torch.randn_like(t) for name, t in module.state_dict().items()})
    return (torch.randn(2, 4),)


def trained_mode(module: nn.Module) -> tuple[Any, ...]:
    module.train()
    return (torch.randn(2, 4),)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: (torch.randn(3, 4),),  # rows
        lambda m: (torch.randn(4, 2).t(),),  # strides
        lambda m: (torch.randn(9)[1:].view(2, 4),),  # where it begins
        lambda m: (torch.randn(2, 4), 2.0),  # a number baked into a launch
        lambda m: (torch.randn(2, 4), 1),  # equal, and of another type
        lambda m: (torch.randn(2, 4), 1.0, "negative"),
        changed_dtype,
        replaced_weight,
        moved_data,
        loaded,
        trained_mode,
    ],
)
def test_whatever_changes_a_launch_is_in_the_key(change: Callable[[Any], tuple[Any, ...]]) -> None:
    module = Scaled().eval()
    fast = AotExecutor(module, (torch.randn(2, 4),), always=True).prepare()
    inputs = change(module)
    for _ in range(4):  # eager, prepared, replayed
        torch.manual_seed(0)
        with torch.no_grad():
            expected = module(*inputs)
        torch.manual_seed(0)
        with torch.no_grad():
            assert same(fast(*inputs), expected)


@pytest.mark.parametrize("change", [changed_dtype, replaced_weight, moved_data, trained_mode])
def test_a_call_like_the_one_before_looks_at_everything_too(change: Callable[[Any], tuple[Any, ...]]) -> None:
    """After two calls alike the third is told by one expression, which a change of anything fails."""
    module = Scaled().eval()
    x = torch.randn(2, 4)
    fast = AotExecutor(module, (x,), always=True).prepare()
    with torch.no_grad():
        fast(x)
    assert fast._last is not None and not fast._last[1](x)  # gradients might be wanted
    with torch.no_grad():
        holds = fast._last[1]
        assert holds(x) and holds(torch.randn(2, 4))
        assert not any(map(holds, (torch.randn(2, 4).t(), torch.randn(3, 4), x.double(), nn.Parameter(x))))
        before = torch.get_num_threads()
        torch.set_num_threads(before + 1)
        assert not holds(x)
        torch.set_num_threads(before)
        with torch.autocast("cpu", torch.bfloat16):
            assert not holds(x)
        assert holds(x)
        inputs = change(module)
        assert not holds(*inputs)
        for _ in range(4):
            torch.manual_seed(0)
            expected = module(*inputs)
            torch.manual_seed(0)
            assert same(fast(*inputs), expected)


def test_settings_of_the_process_are_in_the_key() -> None:
    module = Scaled().eval()
    x = torch.randn(2, 4)
    fast = AotExecutor(module, (x,), always=True).prepare()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert same(fast(x), module(x))
            assert fast(x).dtype == torch.bfloat16
    assert len(fast.explain().plans) == 2


def test_unseen_shapes_run_eagerly_then_are_prepared_up_to_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    module = Scaled().eval()
    fast = AotExecutor(module, (torch.randn(1, 4),), always=True, max_shapes=3).prepare()
    with caplog.at_level(logging.INFO, "llmtool.aot"):
        for rows in range(2, 7):
            x = torch.randn(rows, 4)
            for _ in range(3):
                with torch.no_grad():
                    assert same(fast(x), module(x))
    assert len(fast.explain().plans) == 3
    assert [f.shapes for f in fast.explain().fallbacks] == [[(n, 4)] for n in (4, 5, 6)]
    assert sum("an unseen shape" in record.message for record in caplog.records) == 1


# -- fallbacks -------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * int(x.max().item())


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]


class Foreign(nn.Module):
    """What torch.export cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.linear = nn.Linear(4, 4)
        self.linear.register_forward_hook(self._see)

    def _see(self, *_: Any) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branches(), "depends on data"),
        (Reads(), "tensor|depends on data"),
        (Selects(), "depends on data"),
        (Foreign(), "torch.export refuses it|shares no memory|is not the module"),
        (Hooked(), "hooks"),
    ],
)
def test_what_cannot_be_replayed_runs_eagerly(
    module: nn.Module, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    fast = AotExecutor(module, (torch.randn(2, 4),), always=True)
    with caplog.at_level(logging.WARNING, "llmtool.aot"):
        fast.prepare()
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(2, 4)
            with torch.no_grad():
                assert same(fast(x), module(x))
    assert not fast.explain().plans
    (fallback,) = fast.explain().fallbacks
    assert fallback.calls >= 4
    import re

    assert re.search(reason, fallback.reason), fallback.reason
    assert sum(record.name == "llmtool.aot" for record in caplog.records) == 1


def test_gradients_that_are_wanted_come_from_eager() -> None:
    module = nn.Linear(4, 4).eval()
    x = torch.randn(2, 4)
    fast = AotExecutor(module, (x,), always=True).prepare()
    y = fast(x.clone().requires_grad_())
    assert y.requires_grad
    module.train()
    assert fast(x).requires_grad
    assert "gradients are wanted" in str(fast.explain())


def test_out_of_memory_in_a_capture(caplog: pytest.LogCaptureFixture) -> None:
    net = build("mlp")
    (x,) = net.inputs(2)
    runtimes: list[FakeRuntime] = []

    def make() -> FakeRuntime:
        runtimes.append(FakeRuntime(memory=5))
        return runtimes[-1]

    with caplog.at_level(logging.WARNING, "llmtool.aot"):
        fast = AotExecutor(net.module, (x,), always=True, runtime=make).prepare()
        with torch.no_grad():
            for _ in range(3):
                assert same(fast(x), net.module(x))
    assert all(r.aborted for r in runtimes)
    assert "out of memory" in fast.explain().fallbacks[0].reason
    assert len(caplog.records) == 1


def test_a_plan_that_is_slower_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtool.runtime.aot import prepare

    monkeypatch.setattr(prepare, "race_of", lambda runs, *_: {n: 1.0 + (n != "eager") for n in runs})
    net = build("mlp")
    (x,) = net.inputs(1)
    fast = AotExecutor(net.module, (x,)).prepare()
    assert not fast.explain().plans
    assert "slower than eager" in fast.explain().fallbacks[0].reason
    with torch.no_grad():
        assert same(fast(x), net.module(x))


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ((nn.Linear(2, 2), torch.zeros(2)), {}),
        ((len, (torch.zeros(2),)), {}),
        ((nn.Linear(2, 2), (torch.zeros(2),)), {"loss": cross_entropy}),
    ],
)
def test_wrong_arguments(arguments: Any, settings: Any) -> None:
    with pytest.raises(UsageError):
        AotExecutor(*arguments, **settings)


# -- files -----------------------------------------------------------------------------------------------------


def test_saved_schedules_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtool.runtime.aot import prepare

    net = build("inception", tiny=True)
    inputs = net.inputs(1)
    first = AotExecutor(net.module, inputs, always=True, runtime=FakeRuntime).prepare()
    first.save(tmp_path / "plan.json")
    monkeypatch.setattr(prepare, "race_of", lambda *_: pytest.fail("it raced again"))
    again = AotExecutor(net.module, inputs, always=True, runtime=FakeRuntime).load(tmp_path / "plan.json")
    again.prepare()
    (mine,), (theirs,) = first.explain().plans, again.explain().plans
    assert (mine.schedule, mine.assignment, mine.seconds) == (
        theirs.schedule,
        theirs.assignment,
        theirs.seconds,
    )
    with torch.no_grad():
        assert same(again(*inputs), net.module(*inputs))


def test_a_schedule_of_another_net_is_left_alone(tmp_path: Path) -> None:
    one, other = nn.Linear(4, 4).eval(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    AotExecutor(one, (x,), always=True).prepare().save(tmp_path / "plan.json")
    fast = AotExecutor(other, (x,), always=True).load(tmp_path / "plan.json").prepare()
    with torch.no_grad():
        assert same(fast(x), other(x))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "plans": {"a": {}}}', "\x00"]
)
def test_a_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError):
        AotExecutor(nn.Linear(2, 2), (torch.zeros(2),)).load(tmp_path / "plan.json")
    with pytest.raises(UsageError):
        AotExecutor(nn.Linear(2, 2), (torch.zeros(2),)).load(tmp_path / "absent.json")
