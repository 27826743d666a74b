"""What a prepared step is for: everything that changes a launch is in its key, or in memory that the step reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from llmtool.runtime.aot.record import Unrecordable

Key = tuple[Any, ...]
_training = attrgetter("training")
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)


def leaf_key(leaf: Any) -> Any:
    """A tensor by its geometry and kind, anything else by its value. Raises Unrecordable for what has no value."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device, leaf.requires_grad)
    if isinstance(leaf, PLAIN):
        return type(leaf), leaf  # 1, 1.0 and True are equal, and not the same
    raise Unrecordable(f"an argument of type {type(leaf).__name__} has no value to tell it by")


def flattened(inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Any], Any]:
    """Leaves of the arguments, and what puts them together again; for tensors alone, their number."""
    if not kwargs and set(map(type, inputs)) == {Tensor}:
        return inputs, len(inputs)
    return tree_flatten((inputs, kwargs))


def unflattener(spec: TreeSpec) -> Callable[[list[Any]], Any]:
    """Puts a step's outputs together."""
    if spec.is_leaf():
        return lambda outputs: outputs[0]
    if spec.type in (tuple, list) and all(child.is_leaf() for child in spec.children()):
        return spec.type
    return lambda outputs: tree_unflatten(outputs, spec)


# The process's settings that choose kernels, but autocast, which has one per kind of device.
SETTINGS: tuple[Callable[[], Any], ...] = (
    torch.get_num_threads,
    torch._C._get_deterministic_algorithms,
    torch.get_default_dtype,
    torch._C._get_float32_matmul_precision,
    torch._C._get_flash_sdp_enabled,
    torch._C._get_math_sdp_enabled,
    torch._C._get_mem_efficient_sdp_enabled,
    torch._C._get_mkldnn_enabled,
    torch._C._get_cudnn_benchmark,
)


def surroundings(device: torch.device) -> Key:
    """The process's settings that choose kernels."""
    kind = device.type
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return (cast, *[setting() for setting in SETTINGS])


class ModuleState:
    """A module's tensors and modes as a prepared step knows them."""

    def __init__(self, module: nn.Module) -> None:
        self.modules = list(module.modules())
        self.stores: list[dict[str, Any]] = [
            store for m in self.modules for store in (m._parameters, m._buffers) if store
        ]
        held = [tensor for store in self.stores for tensor in store.values()]
        self._held = held  # alive, so that no other gets the same id
        self._ids = list(map(id, held))
        self.tensors = [tensor for tensor in held if tensor is not None]
        self._addresses = [tensor.data_ptr() for tensor in self.tensors]
        self.hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules)

    def same(self) -> bool:
        """Whether all tensors are where they were. Their values may change in place."""
        now = list(map(id, chain.from_iterable([store.values() for store in self.stores])))
        return now == self._ids and list(map(Tensor.data_ptr, self.tensors)) == self._addresses

    def modes(self) -> tuple[bool, ...]:
        return tuple(map(_training, self.modules))

    @property
    def device(self) -> torch.device | None:
        return next((t.device for t in self.tensors), None)


def guard(inputs: Sequence[Tensor], state: ModuleState, device: torch.device) -> Callable[..., bool]:
    """Whether a call with as many tensors has the key that one with `inputs` has now, wants no gradients, and finds
    the module's tensors where they are: all that `AotExecutor` looks at before a replay, as one expression."""
    names: dict[str, Any] = {"Tensor": Tensor, "grad": torch.is_grad_enabled}

    def name(value: Any) -> str:
        names[f"g{len(names)}"] = value
        return f"g{len(names) - 1}"

    terms = ["not grad()"]
    for i, x in enumerate(inputs):
        terms += [f"type(i{i}) is Tensor", f"i{i}.shape == {name(x.shape)}", f"i{i}.stride() == {x.stride()}"]
        terms += [f"i{i}.storage_offset() == {x.storage_offset()}", f"i{i}.dtype is {name(x.dtype)}"]
        terms += [f"i{i}.device == {name(x.device)}", f"i{i}.requires_grad is {x.requires_grad}"]
    kind, (cast, *settings) = device.type, surroundings(device)
    enabled = f"{name(torch.is_autocast_enabled)}({kind!r})"
    terms.append(
        f"{enabled} and {name(torch.get_autocast_dtype)}({kind!r}) is {name(cast)}"
        if cast
        else f"not {enabled}"
    )
    terms += [f"{name(f)}() == {name(value)}" for f, value in zip(SETTINGS, settings, strict=True)]
    terms += [f"{name(m)}.training is {m.training}" for m in state.modules]
    for store in state.stores:
        held = name(store)
        terms.append(f"len({held}) == {len(store)}")
        terms += [f"{held}[{key!r}] is {name(tensor)}" for key, tensor in store.items()]
    terms += [f"{name(t.data_ptr)}() == {t.data_ptr()}" for t in state.tensors]
    parameters = ", ".join(f"i{i}" for i in range(len(inputs)))
    body = "\n        and ".join(terms)
    exec(compile(f"def holds({parameters}):\n    return ({body})\n", "<guard>", "exec"), names)
    holds: Callable[..., bool] = names["holds"]
    return holds


def optimizer_key(optimizer: torch.optim.Optimizer) -> Key:
    """Hyperparameters are numbers in launches; state is tensors at addresses. A learning rate that is a tensor is
    read by the step, and may change."""
    groups = tuple(
        tuple(
            (name, leaf.data_ptr() if isinstance(leaf, Tensor) else _frozen(leaf))
            for name, leaf in sorted(group.items())
            if name != "params"
        )
        for group in optimizer.param_groups
    )
    state = tuple(
        (name, leaf.data_ptr() if isinstance(leaf, Tensor) else _frozen(leaf))
        for parameter in _parameters(optimizer)
        for name, leaf in optimizer.state.get(parameter, {}).items()
    )
    return groups, state


def _parameters(optimizer: torch.optim.Optimizer) -> Sequence[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _frozen(leaf: Any) -> Any:
    return tuple(leaf) if isinstance(leaf, list) else leaf
