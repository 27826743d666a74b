"""A dense and a pruned model side by side, layer by layer: what the pruned one's consumers read, and what they
should give so that the residual stream is the dense model's again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.prune.batches import Batch
from llmtool.prune.modeling import Layout, layers_of
from llmtool.prune.remove import cut_layer
from llmtool.prune.units import Kept, Sublayer, columns, consumer_of

Progress = Callable[[float], None]
TokenWeights = Callable[[int, Sublayer, Batch, tuple[int, int]], Tensor]
"""(batch's place, sublayer, batch, (B, S)) -> float32 [B * S]: how much each token counts."""
Solve = Callable[[Sublayer, "Moments", "Moments"], None]
"""(sublayer, moments of its kept columns to fit, and held out): changes the student's consumer in place."""


@dataclass(slots=True)
class Moments:
    """Sums over weighted tokens for least squares: xx [in, in], xy [in, out], x [in], y [out], yy, weight.

    x: what the consumer reads. y: what it should give, its bias included.
    """

    xx: Tensor
    xy: Tensor
    x: Tensor
    y: Tensor
    yy: float = 0.0
    weight: float = 0.0

    @classmethod
    def zeros(cls, inputs: int, outputs: int, device: torch.device | str = "cpu") -> Moments:
        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, device=device)

        return cls(new(inputs, inputs), new(inputs, outputs), new(inputs), new(outputs))

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """x [T, in], y [T, out], weights [T]; tokens of weight 0 are left out."""
        real = weights > 0
        if not bool(real.all()):
            x, y, weights = x[real], y[real], weights[real]
        weighted = x * weights[:, None]
        self.xx.addmm_(weighted.T, x)
        self.xy.addmm_(weighted.T, y)
        self.x += weighted.sum(0)
        self.y += weights @ y
        self.yy += float((y * y).sum(1).double() @ weights.double())
        self.weight += float(weights.double().sum())

    def merged(self, other: Moments) -> Moments:
        return Moments(
            self.xx + other.xx,
            self.xy + other.xy,
            self.x + other.x,
            self.y + other.y,
            self.yy + other.yy,
            self.weight + other.weight,
        )

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Weighted mean of ||y - W x - b||^2; weight [out, in], bias [out]."""
        w = weight.T.double()
        total = self.yy - 2 * float((w * self.xy.double()).sum()) + float((w * (self.xx.double() @ w)).sum())
        if bias is not None:
            b = bias.double()
            total += float(self.weight * (b @ b) - 2 * b @ self.y.double() + 2 * self.x.double() @ w @ b)
        return max(0.0, total) / max(self.weight, 1e-30)


class Enough(Exception):
    """Raised by a `solve` that wants to see no further sublayer."""


class _Stop(Exception):
    """Ends a layer's forward pass where nothing after it is needed."""


@dataclass(slots=True)
class LayerInputs:
    """A batch on its way up: what each layer is called with beside hidden states."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    hidden: Tensor


@torch.no_grad()
def side_by_side(
    teacher: nn.Module,
    student: nn.Module,
    layout: Layout,
    sublayers: Sequence[Sublayer],
    batches: Sequence[Batch],
    held_out: Sequence[int],
    kept: Kept,
    solve: Solve,
    weights: TokenWeights,
    progress: Progress = lambda fraction: None,
) -> None:
    """From the bottom up: of every sublayer the moments of the student's consumer towards the teacher's stream,
    then `solve`. held_out: places of batches whose moments are kept apart. kept: units whose columns are looked at.

    The student's consumers have the dense shapes; pruned columns are zero, and what feeds them is not computed.
    Target: the teacher's residual stream after the sublayer, minus what the student's stream was before it.
    """
    device = next(student.parameters()).device
    runs = [layer_inputs(teacher, layout, batch.to(device)) for batch in batches]
    teacher_hidden = [run.hidden for run in runs]
    student_hidden = list(teacher_hidden)
    layers = list(zip(layers_of(teacher, layout), layers_of(student, layout), strict=True))
    for i, (dense, pruned) in enumerate(layers):
        own = [s for s in sublayers if s.layer == i]
        thin = copy.deepcopy(pruned)
        cut_layer(thin, layout, own[0], own[1], kept)
        streams: list[dict[str, Tensor]] = []
        for b, run in enumerate(runs):
            found, teacher_hidden[b] = _run(dense, run.calls[i], teacher_hidden[b], layout)
            streams.append(found)
        for k, sublayer in enumerate(own):
            consumer = consumer_of(student, layout, sublayer)
            small: Any = thin.get_submodule(layout.out if sublayer.kind == "attention" else layout.down)
            at = columns(sublayer, kept[sublayer.index]).to(device)
            fit, apart = (Moments.zeros(len(at), consumer.out_features, device) for _ in range(2))
            inputs: list[Tensor] = []
            for b, run in enumerate(runs):
                stream = streams[b].pop(sublayer.kind)
                x, before = _pair(thin, small, sublayer, run.calls[i], student_hidden[b], layout)
                count = weights(b, sublayer, batches[b], (x.shape[0], x.shape[1])).to(device)
                into = apart if b in held_out else fit
                into.add(x.flatten(0, 1).float(), (stream - before).flatten(0, 1).float(), count)
                if sublayer.kind == "mlp":
                    student_hidden[b] = before
                    inputs.append(x)
            try:
                solve(sublayer, fit, apart)
            except Enough:
                return
            small.weight.copy_(consumer.weight[:, at])
            if consumer.bias is not None:
                small.bias.copy_(consumer.bias)
            progress((2 * i + k + 1) / (2 * len(layers)))
        for b, x in enumerate(inputs):
            student_hidden[b] = _after(thin, layout, student_hidden[b] + small(x))


def layer_inputs(model: nn.Module, layout: Layout, batch: Batch) -> LayerInputs:
    """What each layer is called with; the layers themselves do nothing meanwhile."""
    layers = layers_of(model, layout)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    first: list[Tensor] = []

    def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        first.append(hidden_states)
        calls.append((args, kwargs))
        return hidden_states

    for layer in layers:
        layer.forward = record
    try:
        options = {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
        model(**batch.inputs, **options)
    finally:
        for layer in layers:
            del layer.forward
    return LayerInputs(calls, first[0])


def _run(
    layer: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor, layout: Layout
) -> tuple[dict[str, Tensor], Tensor]:
    """(the residual stream after attention and after the MLP, the layer's output)."""
    found: dict[str, Tensor] = {}
    hooks = []
    for kind, name in zip(("attention", "mlp"), layout.streams, strict=True):
        if name:
            hooks.append(layer.get_submodule(name).register_forward_pre_hook(_keeping(found, kind)))
    try:
        out = _first(layer(hidden, *call[0], **call[1]))
    finally:
        for hook in hooks:
            hook.remove()
    found.setdefault("mlp", out)
    return found, out


def _pair(
    layer: nn.Module,
    consumer: nn.Linear,
    sublayer: Sublayer,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    hidden: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """(what the consumer reads [B, S, in], the residual stream that its output is added to [B, S, out])."""
    seen: dict[str, Tensor] = {}

    def on_consumer(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen["x"], seen["f"] = inputs[0], output

    def on_stream(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["stream"] = inputs[0]
        raise _Stop

    name = layout.streams[0 if sublayer.kind == "attention" else 1]
    hooks = [consumer.register_forward_hook(on_consumer)]
    if name:
        hooks.append(layer.get_submodule(name).register_forward_pre_hook(on_stream))
    try:
        seen["stream"] = _first(layer(hidden, *call[0], **call[1]))
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen["x"], seen["stream"] - seen["f"]


def _after(layer: nn.Module, layout: Layout, stream: Tensor) -> Tensor:
    """The layer's output, of the residual stream after its MLP."""
    name = layout.streams[1]
    out: Tensor = layer.get_submodule(name)(stream) if name else stream
    return out


def _keeping(found: dict[str, Tensor], kind: str) -> Any:
    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found[kind] = inputs[0]

    return keep


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
