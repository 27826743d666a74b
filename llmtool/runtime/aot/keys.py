"""What a prepared step is for: everything that changes a launch is in its key, or in memory that the step reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtool.runtime.aot.record import Unrecordable

Key = tuple[Any, ...]
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)


def leaf_key(leaf: Any) -> Any:
    """A tensor by its geometry and kind, anything else by its value. Raises Unrecordable for what has no value."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device, leaf.requires_grad)
    if isinstance(leaf, PLAIN):
        return type(leaf), leaf  # 1, 1.0 and True are equal, and not the same
    raise Unrecordable(f"an argument of type {type(leaf).__name__} has no value to tell it by")


def surroundings(device: torch.device) -> Key:
    """The process's settings that choose kernels."""
    kind = device.type
    return (
        torch.get_num_threads(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch._C._get_flash_sdp_enabled(),
        torch._C._get_math_sdp_enabled(),
        torch._C._get_mem_efficient_sdp_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.benchmark,
    )


class ModuleState:
    """A module's tensors and modes as a prepared step knows them."""

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._tensors = [
            (store, name, tensor, tensor.data_ptr())
            for m in self._modules
            for store in (m._parameters, m._buffers)
            for name, tensor in store.items()
            if tensor is not None
        ]
        self.hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self._modules)

    def same(self) -> bool:
        """Whether all tensors are where they were. Their values may change in place."""
        for store, name, tensor, address in self._tensors:
            if store.get(name) is not tensor or tensor.data_ptr() != address:
                return False
        return True

    def modes(self) -> tuple[bool, ...]:
        return tuple([m.training for m in self._modules])

    @property
    def tensors(self) -> Iterator[Tensor]:
        return (tensor for _, _, tensor, _ in self._tensors)

    @property
    def device(self) -> torch.device | None:
        return next((t.device for t in self.tensors), None)


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
