"""`AotExecutor`: a module, or its training step, that is scheduled ahead of time and otherwise called as before."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.errors import UsageError
from llmtool.runtime.aot.cost import GRAPH_COST, SyncCost
from llmtool.runtime.aot.cuda import Runtime
from llmtool.runtime.aot.explain import Explanation, Fallback
from llmtool.runtime.aot.keys import (
    Key,
    ModuleState,
    flattened,
    guard,
    leaf_key,
    optimizer_key,
    surroundings,
)
from llmtool.runtime.aot.prepare import Plan, Step, Stored, fastest, prepare
from llmtool.runtime.aot.record import Unrecordable
from llmtool.runtime.aot.saved import dump, parse

log = logging.getLogger("llmtool.aot")
HOT = 2  # a shape that comes so often is prepared
FORMAT = 1


class AotExecutor:
    """Calls like `module`, and gives what it would give under torch.no_grad(), bit for bit.

        fast = AotExecutor(model.eval(), (ids,)).prepare()
        logits = fast(ids)

        step = AotExecutor(model, (x, y), loss=lambda m, x, y: F.cross_entropy(m(x), y), optimizer=optimizer)
        loss = step(x, y)      # zero_grad, forward, backward, optimizer.step(); gradients are gone afterwards

    Whatever cannot be prepared runs eagerly, and `explain` says why; the log says it once. A shape (and whatever
    else is in its key, see keys.py) that comes a second time is prepared then, up to max_shapes of them.

    example_inputs: positional arguments, trees of tensors and plain values. loss, optimizer: make it a training
    step; loss takes the module and the inputs. The first training step makes the optimizer's state and runs
    eagerly, the second is recorded. always: use a plan even where eager was measured to be faster. fuse: let
    inference join linear layers that read the same input where that is faster, within fuse.TOLERANCE. sync: cost of
    forks and joins for the cost gate. runtime: what captures, for tests; None takes CUDA graphs on a GPU and
    pre-bound calls on a CPU.

    Nimble (2012.02732), sections 4.1 and 4.2.
    """

    def __init__(
        self,
        module: nn.Module,
        example_inputs: Sequence[Any],
        example_kwargs: Mapping[str, Any] | None = None,
        *,
        loss: Callable[..., Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        max_shapes: int = 8,
        always: bool = False,
        fuse: bool = False,
        sync: SyncCost = GRAPH_COST,
        runtime: Callable[[], Runtime] | None = None,
    ) -> None:
        if (loss is None) != (optimizer is None):
            raise UsageError("A training step needs a loss and an optimizer.", "Give both, or neither.")
        if not isinstance(module, nn.Module):
            raise UsageError(f"AotExecutor takes a torch.nn.Module, not a {type(module).__name__}.")
        if not isinstance(example_inputs, (tuple, list)):
            raise UsageError("example_inputs is a tuple of the module's arguments.", "For one x, give (x,).")
        self.module = module
        self._example = tuple(example_inputs), dict(example_kwargs or {})
        self._loss, self._optimizer = loss, optimizer
        self._max_shapes, self._always, self._sync, self._runtime = max_shapes, always, sync, runtime
        self._fuse = fuse and loss is None
        self._state = ModuleState(module)
        self._plans: dict[Key, Plan] = {}
        self._fallbacks: dict[Key, Fallback] = {}
        self._stored: dict[str, Stored] = {}
        self._logged: set[str] = set()
        # Of the plan of the call before: how many inputs, whether a call is such a one again, the plan.
        self._last: tuple[int, Callable[..., bool], Plan] | None = None

    # -- use -----------------------------------------------------------------------------------------------

    def prepare(self, *inputs: Any, **kwargs: Any) -> AotExecutor:
        """Prepare for inputs of these shapes, or for the example's. A training step that has no optimizer state yet
        is prepared when it first can be."""
        if not inputs and not kwargs:
            inputs, kwargs = self._example
        leaves, spec = flattened(inputs, kwargs)
        try:
            key = self._key(leaves, spec)
        except Unrecordable as why:
            self._note((str(spec),), str(why))
            return self
        if key not in self._plans and not self._stateless():
            with torch.no_grad() if self._loss is None else torch.enable_grad():
                self._prepare(key, leaves, inputs, kwargs, keep=False)
        return self

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        last = self._last
        if last is not None and not kwargs and len(inputs) == last[0] and last[1](*inputs):
            return last[2].result(last[2].replay(*inputs))
        leaves, spec = flattened(inputs, kwargs)
        try:
            key = self._key(leaves, spec)
        except Unrecordable as why:
            self._note((str(spec),), str(why))
            return self._eager(inputs, kwargs)
        plan = self._plans.get(key)
        if plan is None:
            return self._unprepared(key, leaves, inputs, kwargs)
        if not self._state.same():
            self._forget("the module's parameters or buffers were replaced")
            return self._unprepared(key, leaves, inputs, kwargs)
        if self._loss is None and torch.is_grad_enabled() and self._wants_grad(leaves):
            self._note((*key, "grad"), "gradients are wanted, which a replay does not give")
            return self._eager(inputs, kwargs)
        for weight in plan.joined:
            weight.refresh()
        if leaves is inputs and self._loss is None and not plan.joined and not torch.is_grad_enabled():
            self._last = len(inputs), guard(inputs, self._state, self._device(inputs)), plan
        tensors = leaves if leaves is inputs else [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return plan.result(plan.replay(*tensors))

    def explain(self) -> Explanation:
        """What is prepared and how, and what is not and why."""
        kind = "inference" if self._loss is None else "training"
        return Explanation(kind, list(self._plans.values()), list(self._fallbacks.values()))

    # -- files ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write schedules, keys and measured costs as JSON. Recordings and graphs are made again after `load`."""
        plans = {self._name(key): dump(plan) for key, plan in self._plans.items()}
        Path(path).write_text(json.dumps({"format": FORMAT, "plans": {**plans}}, indent=1) + "\n")

    def load(self, path: str | Path) -> AotExecutor:
        """Take schedules from a file: a shape whose recording is the stored one is not measured again.

        Raises UsageError for a file that `save` did not write.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data["format"] != FORMAT:
                raise UsageError(f"{path} has format {data['format']}, and this version reads {FORMAT}.")
            self._stored.update({name: parse(plan) for name, plan in data["plans"].items()})
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path} is no file of AotExecutor.save: {error}.", "Prepare anew, and save again."
            ) from None
        return self

    # -- inside --------------------------------------------------------------------------------------------

    def _key(self, leaves: Sequence[Any], spec: Any) -> Key:
        key = (
            *[leaf_key(leaf) for leaf in leaves],
            spec,
            self._state.modes(),
            surroundings(self._device(leaves)),
        )
        return key if self._optimizer is None else (*key, optimizer_key(self._optimizer))

    def _name(self, key: Key) -> str:
        """The key across processes: without addresses, which the optimizer's part has."""
        return repr(key if self._optimizer is None else key[:-1])

    def _device(self, leaves: Sequence[Any]) -> torch.device:
        found = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), self._state.device)
        return found or torch.device("cpu")

    def _wants_grad(self, leaves: Sequence[Any]) -> bool:
        """Whether eager would give results to differentiate that somebody may: an input asks for it, or the module
        is being trained."""
        asked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
        return asked or (self.module.training and any(t.requires_grad for t in self._state.tensors))

    def _stateless(self) -> bool:
        return self._optimizer is not None and not self._optimizer.state and bool(self._optimizer.defaults)

    def _unprepared(
        self, key: Key, leaves: Sequence[Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        fallback = self._fallbacks.get(key)
        if fallback is not None and fallback.final:
            fallback.calls += 1
            return self._eager(inputs, kwargs)
        if self._loss is None and torch.is_grad_enabled() and self._wants_grad(leaves):
            self._note((*key, "grad"), "gradients are wanted, which a replay does not give")
            return self._eager(inputs, kwargs)
        if fallback is None:
            what = "the optimizer has no state yet" if self._stateless() else "an unseen shape"
            fallback = self._note(key, what, final=False)
        elif len(self._plans) >= self._max_shapes:
            fallback.calls += 1
        elif fallback.calls + 1 >= HOT:
            with torch.no_grad() if self._loss is None else torch.enable_grad():
                prepared, result = self._prepare(key, leaves, inputs, kwargs, keep=self._loss is not None)
            if prepared and self._loss is not None:
                return result
            if prepared:
                return self(*inputs, **kwargs)
        else:
            fallback.calls += 1
        return self._eager(inputs, kwargs)

    def _prepare(
        self, key: Key, leaves: Sequence[Any], inputs: tuple[Any, ...], kwargs: dict[str, Any], keep: bool
    ) -> tuple[bool, Any]:
        """Make the plan of a key, or note why not. keep: let the pre-run be a step of training. Whether it ran, and
        what it returned."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._state.same():
            self._forget("the module's parameters or buffers were replaced")
        try:
            if self._state.hooked:
                raise Unrecordable("the module has hooks, which a replay would not call")
            step = Step(lambda: self._eager(inputs, kwargs), tensors, self._device(leaves), training=keep)
            step.tensors = self._state.tensors
            if self._loss is None:
                step.recorded = exported(self.module, inputs, kwargs)
            stored = self._stored.get(self._name(key))
            plan, result = prepare(step, self._sync, self._runtime, stored, fuse=self._fuse)
        except Unrecordable as why:
            self._note(key, str(why))
            return False, None
        except torch.OutOfMemoryError:
            self._note(key, "out of memory while it was prepared")
            return False, None
        if not self._always and not fastest(plan):
            eager, took = plan.seconds["eager"], plan.seconds[plan.schedule]
            self._note(key, f"measured slower than eager: {1e6 * took:.1f} against {1e6 * eager:.1f} us")
            return True, result
        self._plans[key] = plan
        self._fallbacks.pop(key, None)
        return True, result

    def _eager(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._loss is None:
            return self.module(*inputs, **kwargs)
        assert self._optimizer is not None
        with torch.enable_grad():
            self._optimizer.zero_grad(set_to_none=True)
            value = self._loss(self.module, *inputs, **kwargs)
            value.backward()
            self._optimizer.step()
            # A replay makes no gradients that outlive it, so none are left here either.
            self._optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def _forget(self, why: str) -> None:
        log.info("Plans are made anew: %s.", why)
        self._last = None
        self._plans.clear()
        self._fallbacks.clear()
        self._state = ModuleState(self.module)

    def _note(self, key: Key, why: str, final: bool = True) -> Fallback:
        """A step that runs eagerly, and why; each reason is logged once."""
        previous = self._fallbacks.get(key)
        calls = 1 if previous is None else previous.calls + 1
        shapes = [tuple(part[0]) for part in key if isinstance(part, tuple) and _is_tensor(part)]
        fallback = self._fallbacks[key] = Fallback(shapes, why, final, calls)
        if why not in self._logged:
            self._logged.add(why)
            level = logging.WARNING if final else logging.INFO
            log.log(level, "A step of shapes %s runs eagerly: %s.", shapes, why)
        return fallback


def _is_tensor(part: tuple[Any, ...]) -> bool:
    return len(part) == 6 and isinstance(part[0], torch.Size)


def exported(module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any]:
    """The module as torch.export reads it, whose control flow depends on no data. Raises Unrecordable."""
    try:
        program = torch.export.export(module, inputs, kwargs, strict=False)
        run = program.module()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a foreign module can raise anything
        name = type(error).__name__
        if "DataDependent" in name or "Unbacked" in name or "data-dependent" in str(error):
            raise Unrecordable("its control flow depends on data") from error
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise Unrecordable(f"torch.export refuses it ({name}: {first[:160]})") from error
    return lambda: run(*inputs, **kwargs)
