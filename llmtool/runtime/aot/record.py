"""The pre-run: a step is run once, and every operator it calls is noted with the memory that it touches.

What is noted are the operators below autograd, with the arguments that eager execution gave them; so a replay runs
the kernels of eager execution in its order. Nothing a module does in Python between them is repeated, so whatever
reads a tensor's value into Python ends the recording (`Unrecordable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from llmtool.runtime.aot.bind import Binding, bind, bind_in_place
from llmtool.runtime.aot.program import RANDOM, Call, Memory, Program, Value, mapped, tensors


class Unrecordable(Exception):
    """The step cannot be replayed, and why: one clause, for the log."""


# They change running statistics, which their schemas do not say: (arguments, the flag that says so).
HIDDEN = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::_native_batch_norm_legit": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
    "aten::_batch_norm_with_update": ((3, 4), None),
}


class Recorder(TorchDispatchMode):
    """Within it, calls run and are noted in `program`.

    restore: remember what is written outside the step before it is, so that `rewind` takes the pre-run back.
    bound: look for leaner ways to the kernels, and measure them.
    """

    def __init__(self, inputs: Sequence[Tensor], restore: bool, bound: bool = True) -> None:
        super().__init__()
        self.program = Program()
        self._of: dict[int, int] = {}  # storage -> buffer
        self._alive: list[Tensor] = []  # so that no storage takes the place of another
        self._restore = restore
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}
        self._bound = bound
        self._first: dict[int, Tensor] = {}  # buffer -> the first tensor in it
        for index, tensor in enumerate(inputs):
            if tensor.untyped_storage()._cdata in self._of:
                raise Unrecordable("two inputs share memory")
            buffer = self._known(tensor)
            memory = self.program.memories[buffer]
            memory.kind, memory.index, memory.tensor = "input", index, None
            memory.value = self._value(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch.no_grad():  # it runs below autograd, and what tries bindings must not begin anew
            return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Marks for torch's profiler, and checks of what the key holds: no work.
        if func.namespace == "profiler" or func._schema.name == "aten::_assert_tensor_metadata":
            return func(*args, **kwargs)
        _check(func, args)
        written = _written(func, args, kwargs)
        given = list(tensors((args, kwargs)))
        for t in given:
            if t.layout != torch.strided or type(t) not in (Tensor, torch.nn.Parameter):
                raise Unrecordable(f"{func} takes a {type(t).__name__} of layout {t.layout}")
        reads = {self._known(t) for t in given}
        writes = {self._known(t) for t in written}
        self._save(written)
        seen = mapped((args, kwargs), Tensor, self._value)
        random = _random(func, args, kwargs)
        binding = Binding(func, "place" if written else "new")
        if written and self._bound and not random and not _hidden(func):
            run, result = bind_in_place(func, args, kwargs, written)
            binding = Binding(run, "place")
        else:
            result = func(*args, **kwargs)
        made = [t for t in tensors(result) if t.untyped_storage()._cdata not in self._of]
        if not written and not made:  # a view, or the argument itself: windows say all of it
            if not any(True for _ in tensors(result)):
                raise Unrecordable(f"{func} returns {type(result).__name__} to Python")
            self._alive += list(tensors(result))
            return result
        if not written and self._bound and not random:
            one_each = len({t.untyped_storage()._cdata for t in made}) == len(list(tensors(result)))
            binding = bind(func, args, kwargs, result, one_each and _dense(made))
        for t in made:
            self._known(t, "inner")
        how = "new" if binding.how == "place" and made else binding.how
        if random:
            reads.add(RANDOM)
            writes.add(RANDOM)
        writes |= {self._known(t) for t in made}
        self._alive += list(tensors(result))
        self.program.calls.append(
            Call(
                func,
                seen[0],
                seen[1],
                mapped(result, Tensor, self._value),
                frozenset(reads),
                frozenset(writes),
                binding.run,
                how,
                binding.functional,
                binding.seconds,
            )
        )
        return result

    def outputs(self, tree: Any) -> Any:
        """Note what the step returns; the spec that puts it together again."""
        leaves, spec = tree_flatten(tree)
        self.program.outputs = [
            self._value(leaf) if isinstance(leaf, Tensor) and self._known(leaf) >= 0 else leaf
            for leaf in leaves
        ]
        self._fold()
        return spec

    def _fold(self) -> None:
        """Calls on nothing but constants (ranges, masks, zeros) are done once: their results are constants too."""
        program = self.program
        changed = {b for c in program.calls if c.how == "place" for b in c.writes}
        fixed: set[int] = set()
        left = []
        for call in program.calls:
            made = call.writes - call.reads
            if call.how != "place" and call.reads <= fixed and not made & (changed | program.kept()):
                fixed |= made
                for buffer in made:
                    program.memories[buffer].kind = "outside"
                    program.memories[buffer].tensor = self._first[buffer]
            else:
                left.append(call)
        program.calls = left

    @property
    def saved(self) -> list[tuple[Tensor, Tensor]]:
        """Windows on memory outside the step that it wrote, and copies of what they held before."""
        return list(self._saved.values())

    def rewind(self) -> None:
        """Undo what was written outside the step."""
        with torch.no_grad():
            for window, old in self._saved.values():
                window.copy_(old)

    def _save(self, written: Sequence[Tensor]) -> None:
        if not self._restore:
            return
        for t in written:
            buffer = self._of[t.untyped_storage()._cdata]
            if self.program.memories[buffer].kind != "inner" and buffer not in self._saved:
                window = t.detach()
                if t.nbytes != t.untyped_storage().nbytes():
                    whole = t.untyped_storage().nbytes() // t.dtype.itemsize
                    window = window.as_strided((whole,), (1,), 0)
                self._saved[buffer] = (window, window.clone())

    def _known(self, tensor: Tensor, kind: str = "outside") -> int:
        """The buffer a tensor lies in; memory not seen before comes from outside the step, or was just made."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._of:
            self._of[storage._cdata] = len(self.program.memories)
            kept = tensor.detach() if kind == "outside" else None
            self.program.memories.append(Memory(kind, storage.nbytes(), tensor.device, kept))
            self._alive.append(tensor)
            self._first[self._of[storage._cdata]] = tensor
        return self._of[storage._cdata]

    def _value(self, t: Tensor) -> Value:
        return Value(
            self._of[t.untyped_storage()._cdata], t.dtype, tuple(t.shape), t.stride(), int(t.storage_offset())
        )


def record(
    step: Callable[[], Any], inputs: Sequence[Tensor], restore: bool = True, bound: bool = True
) -> tuple[Recorder, Any, Any]:
    """Run a step on its tensors: (the recorder, what it returned, the spec of that). Raises Unrecordable."""
    recorder = Recorder(inputs, restore, bound)
    mode: AbstractContextManager[Any] = recorder
    try:
        with mode:
            result = step()
    except BaseException:
        recorder.rewind()  # half a step is none
        raise
    spec = recorder.outputs(result)
    return recorder, result, spec


def _check(func: Any, args: tuple[Any, ...]) -> None:
    name = func._schema.name
    if name in ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"):
        raise Unrecordable("the value of a tensor decides what Python does next")
    if torch.Tag.dynamic_output_shape in func.tags:
        indices = args[1] if len(args) > 1 and isinstance(args[1], (tuple, list)) else ()
        whole = all(i is None or i.dtype not in (torch.bool, torch.uint8) for i in indices)
        if not (name in ("aten::index", "aten::index_put", "aten::index_put_") and whole):
            raise Unrecordable(f"the shape of {func}'s result depends on data")


def _random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws from the generator: those that can, but not with a dropout of 0."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            return given != 0.0
    return True


def _hidden(func: Any) -> bool:
    return func._schema.name in HIDDEN


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments that a call changes, each once."""
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [t for t in tensors(given) if not any(t is f for f in found)]
    if _hidden(func):
        which, flag = HIDDEN[func._schema.name]
        if flag is None or args[flag]:
            found += [args[i] for i in which if i < len(args) and args[i] is not None]
    return found


def _dense(made: Sequence[Tensor]) -> bool:
    """Whether results fill their memory, so that a window on the arena can take their place."""
    return all(
        t.storage_offset() == 0 and t.untyped_storage().nbytes() == t.nbytes and t.layout == torch.strided
        for t in made
    )
