"""Joined linear layers against eager, within the stated tolerance."""

import copy

import pytest
import torch
from torch import Tensor, nn

from llmtool import AotExecutor
from llmtool.bench.nets import build
from llmtool.runtime.aot import prepare
from llmtool.runtime.aot.executor import exported
from llmtool.runtime.aot.fuse import TOLERANCE, close, fused
from llmtool.runtime.aot.machine import Machine
from llmtool.runtime.aot.program import Program
from llmtool.runtime.aot.record import record
from llmtool.runtime.aot.streams import assign


def recorded(module: nn.Module, *inputs: Tensor) -> Program:
    with torch.no_grad():
        return record(exported(module, inputs, {}), list(inputs))[0].program


def products(program: Program) -> int:
    return sum(call.name.split(".")[0] in ("mm", "addmm") for call in program.calls)


@pytest.fixture
def fusion_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        prepare, "race_of", lambda runs, *_: {n: 1.0 if n.startswith("fused") else 2.0 for n in runs}
    )


@pytest.mark.parametrize(
    ("name", "batch", "before", "after"),
    [
        ("bert", 1, 12, 8),  # q, k and v of two layers
        ("bert", 3, 12, 8),
        ("decoder", 1, 15, 9),  # and gate and up; the output head is one by itself
        ("decoder", 3, 15, 9),
        ("moe", 2, 37, 15),  # the router twice and all experts' gates and ups read one input
        ("mlp", 2, 6, 6),  # nothing to join
    ],
)
def test_nets(name: str, batch: int, before: int, after: int) -> None:
    net = build(name, batch, tiny=True)
    inputs = net.inputs(batch)
    program = recorded(net.module, *inputs)
    joint, joined = fused(program, [*net.module.parameters(), *net.module.buffers()])
    assert (products(program), products(joint)) == (before, after)
    assert bool(joined) == (after < before)
    graph = joint.graph()
    for mode in ("serial", "exact"):
        machine = Machine(joint, graph, assign(graph, mode), torch.device("cpu"))
        with torch.no_grad():
            expected = net.module(*inputs)
        found = machine.run(list(inputs), poison=True)
        assert close([expected], found)


def test_executor_takes_it_where_it_is_faster(fusion_wins: None) -> None:
    net = build("decoder", 2, tiny=True)
    eager = copy.deepcopy(net.module)
    inputs = net.inputs(2)
    fast = AotExecutor(net.module, inputs, fuse=True).prepare()
    (plan,) = fast.explain().plans
    assert plan.schedule == "fused serial"
    with torch.no_grad():
        assert close([fast(*inputs)], [eager(*inputs)])
        for mine, theirs in zip(net.module.buffers(), eager.buffers(), strict=True):
            assert close([mine], [theirs])
        # Weights that change in place are taken over.
        state = {name: torch.randn_like(t) / 8 for name, t in eager.state_dict().items()}
        net.module.load_state_dict(state)
        eager.load_state_dict(state)
        assert close([fast(*inputs)], [eager(*inputs)])
        with torch.no_grad():
            for module in (net.module, eager):
                module.layers[0].q.weight.mul_(3)  # type: ignore[index, union-attr]
        assert close([fast(*inputs)], [eager(*inputs)])


def test_without_asking_nothing_is_fused(fusion_wins: None) -> None:
    net = build("bert", tiny=True)
    fast = AotExecutor(net.module, net.inputs(1), always=True).prepare()
    assert fast.explain().plans[0].schedule == "serial"


class Written(nn.Module):
    """The input changes between two layers: they cannot be one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.a(x)
        x.add_(y)
        return self.b(x) + y


class Adapted(nn.Module):
    """A weight that the step itself writes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.b.weight.mul_(0.5)
        return self.b(x) + y


class Reshaped(nn.Module):
    """A result that is read across its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).view(-1).unfold(0, 3, 1).sum(-1) + self.b(x).view(-1)[2:]


@pytest.mark.parametrize("module", [Written(), Adapted(), Reshaped()])
def test_what_must_stay_apart(module: nn.Module) -> None:
    x = torch.randn(3, 4)
    module.requires_grad_(False)
    program = recorded(module, x)
    joint, joined = fused(program, module.parameters())
    assert not joined
    assert products(joint) == products(program) == 2


def test_tolerance_is_of_the_largest_magnitude() -> None:
    a = torch.tensor([100.0, 0.001])
    within = TOLERANCE[torch.float32] * 100
    assert close([a, 3], [a + 0.9 * within, 3])
    assert not close([a], [a + 2 * within])
    assert not close([a, 3], [a, 4])
    assert not close([a], [torch.tensor([100.0, float("nan")])])
    assert close([torch.tensor([float("inf")])], [torch.tensor([float("inf")])])
