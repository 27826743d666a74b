"""The CPU backend: a step becomes one Python function of pre-bound calls, straight down, into the arena."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmtool.runtime.aot.machine import Machine, last_users, window
from llmtool.runtime.aot.program import Value, mapped, values

FREE_BYTES = (
    1 << 14
)  # a loose buffer of so much is let go after its last use, a smaller one when the step ends
Replay = Callable[..., list[Any]]


def compile_step(machine: Machine) -> Replay:
    """A function of the step's input tensors that gives its outputs. One stream, program order."""
    return _Writer(machine).function()


class _Writer:
    """Writes the function's source: a line a call; whatever is the same in every step is a global of it."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.program = machine, machine.program
        self._globals: dict[str, Any] = {"_window": window, "_as_strided": torch.as_strided}
        self._globals["_below_autograd"] = torch._C._AutoDispatchBelowAutograd
        self._lines: list[str] = []
        self._names: dict[Value, str] = {}  # of values that are nowhere until they are made
        self._base: dict[int, tuple[str, torch.dtype]] = {}
        self._of_buffer: dict[int, list[str]] = {}

    def function(self) -> Replay:
        inputs = sorted((m.index, b) for b, m in enumerate(self.program.memories) if m.kind == "input")
        parameters = [f"i{index}" for index, _ in inputs]
        for (_, b), name in zip(inputs, parameters, strict=True):
            value = self.program.memories[b].value
            assert value is not None
            self._name(value, name)
        freed = last_users(self.machine)
        for i, call in enumerate(self.program.calls):
            self._call(i, call)
            names = [
                name
                for b in freed[i]
                if self.machine.buffers[b].nbytes >= FREE_BYTES
                for name in self._of_buffer.get(b, ())
            ]
            if names:
                self._lines.append(f"{' = '.join(dict.fromkeys(names))} = None")
        outputs = ", ".join(
            self._read(v) if isinstance(v, Value) else self._constant(v) for v in self.program.outputs
        )
        # Nothing here is differentiated: dispatch begins below autograd.
        body = "\n".join(f"        {line}" for line in [*self._lines, f"return [{outputs}]"])
        source = f"def replay({', '.join(parameters)}):\n    with _below_autograd():\n{body}\n"
        exec(compile(source, "<replay>", "exec"), self._globals)
        replay: Replay = self._globals["replay"]
        return replay

    def _call(self, i: int, call: Any) -> None:
        args = [self._expression(a) for a in call.args]
        args += [f"{key}={self._expression(a)}" for key, a in call.kwargs.items()]
        run = call.run
        if call.how == "out":
            if all(self.machine.is_fixed(v) for v in values(call.result)):
                args.append(f"out={self._constant(mapped(call.result, Value, self.machine.fixed))}")
                self._lines.append(f"{self._global(run)}({', '.join(args)})")
                return
            run = call.target if call.functional is None else call.functional
        invocation = f"{self._global(run)}({', '.join(args)})"
        fresh = [v for v in values(call.result) if not self.machine.is_fixed(v) and v not in self._names]
        if not fresh:
            self._lines.append(invocation)
            return
        self._lines.append(f"r{i} = {invocation}")
        self._unpack(call.result, f"r{i}")

    def _unpack(self, result: Any, name: str) -> None:
        if isinstance(result, Value):
            if not self.machine.is_fixed(result) and result not in self._names:
                self._name(result, name)
        elif isinstance(result, (tuple, list)):
            for j, item in enumerate(result):
                if isinstance(item, Value):
                    part = f"{name}_{j}"
                    self._lines.append(f"{part} = {name}[{j}]")
                    self._unpack(item, part)
            self._lines.append(f"{name} = None")

    def _expression(self, argument: Any) -> str:
        if isinstance(argument, Value):
            return self._read(argument)
        loose = [v for v in values(argument) if not self.machine.is_fixed(v)]
        if loose:
            inner = ", ".join(self._expression(item) for item in argument)
            return f"({inner},)" if isinstance(argument, tuple) else f"[{inner}]"
        return self._constant(mapped(argument, Value, self.machine.fixed))

    def _read(self, value: Value) -> str:
        if self.machine.is_fixed(value):
            return self._global(self.machine.fixed(value))
        if value not in self._names:
            name = f"w{len(self._names)}"
            base, dtype = self._base[value.buffer]
            if dtype == value.dtype:
                call = f"_as_strided({base}, {value.size}, {value.stride}, {value.offset})"
            else:
                call = f"_window({base}, {self._global(value)})"
            self._lines.append(f"{name} = {call}")
            self._name(value, name)
        return self._names[value]

    def _name(self, value: Value, name: str) -> None:
        self._names[value] = name
        self._base.setdefault(value.buffer, (name, value.dtype))
        self._of_buffer.setdefault(value.buffer, []).append(name)

    def _constant(self, value: Any) -> str:
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        return self._global(value)

    def _global(self, value: Any) -> str:
        name = f"g{id(value)}"
        # The name holds the object, so that no other gets its id.
        self._globals[name] = value
        return name
