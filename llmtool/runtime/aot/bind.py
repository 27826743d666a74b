"""Leaner ways to an operator's kernel: torch's Python bindings, with the result's place told where they take it.

A call through `torch.ops` costs twice a call through the binding (design: 37.8 against 16.9 us for 18 of them).
A binding is used only if, on the recorded arguments, it gives the operator's result bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llmtool.runtime.aot.program import mapped, tensors

VERIFY_BYTES = 64 << 20  # arguments changed in place are copied to try a binding, up to so much
REPEATS = 3
Run = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Binding:
    """See program.Call."""

    run: Run
    how: str
    functional: Run | None = None
    seconds: float = 0.0


def bind(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, out_wanted: bool
) -> Binding:
    """How to call an operator that changed nothing and returned `result`."""
    functional = next((run for run in _candidates(target) if _gives(run, args, kwargs, result)), target)
    if out_wanted and all(isinstance(t, Tensor) for t in _listed(result)):
        for run in _out_candidates(target):
            if _gives_out(run, args, kwargs, result):
                out = mapped(result, Tensor, _like)
                seconds = _seconds(partial(run, *args, **kwargs, out=out), result)
                return Binding(run, "out", functional, seconds)
    return Binding(functional, "new", None, _seconds(partial(functional, *args, **kwargs), result))


def bind_in_place(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]
) -> tuple[Run, Any]:
    """Run an operator that changes its arguments `written`; what to call the next time, and its result."""
    copied = {id(t): t.clone() for t in written if sum(w.nbytes for w in written) <= VERIFY_BYTES}
    before = [t.clone() for t in copied.values()]
    result = target(*args, **kwargs)
    if copied and not _share_storage(args, written):
        for run in _candidates(target):
            for t, old in zip(copied.values(), before, strict=True):
                t.copy_(old)
            theirs, theirs_kw = mapped((args, kwargs), Tensor, lambda t: copied.get(id(t), t))
            try:
                run(*theirs, **theirs_kw)
            except (TypeError, RuntimeError, ValueError):
                continue
            if all(same_bits(copied[id(t)], t) for t in written):
                return run, result
    return target, result


def _share_storage(args: Any, written: list[Tensor]) -> bool:
    """Whether a changed argument shares memory with another: copies of them would not."""
    stores = [t.untyped_storage()._cdata for t in tensors(args)]
    return any(stores.count(t.untyped_storage()._cdata) > 1 for t in written)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, NaN and signed zero included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if a.dtype.is_floating_point:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        a, b = a.contiguous().view(kind), b.contiguous().view(kind)
    return torch.equal(a, b)


def _bindings(name: str) -> Iterator[Run]:
    for home in (torch, torch._C._nn, torch.Tensor):
        run = getattr(home, name, None)
        # What is written in Python around an operator is no leaner.
        if callable(run) and type(run).__name__ in ("builtin_function_or_method", "method_descriptor"):
            yield run


def _relu(x: Tensor, *, out: Tensor) -> Tensor:
    return torch.clamp_min(x, 0, out=out)


def _candidates(target: Any) -> Iterator[Run]:
    yield from _bindings(target._schema.name.split("::")[-1])


def _out_candidates(target: Any) -> Iterator[Run]:
    namespace, name = target._schema.name.split("::")
    if namespace != "aten":
        return
    if name == "relu":
        yield _relu
    if _has_own_out(target):
        yield from _bindings(name)


def _has_own_out(target: Any) -> bool:
    """Whether some kernel writes where it is told. The generated `out=` of the others allocates, then copies."""
    packet = target.overloadpacket
    return any(
        overload.endswith("out")
        and not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"{target._schema.name}.{overload}", "CompositeExplicitAutograd"
        )
        for overload in packet.overloads()
    )


def _like(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def _gives_out(run: Run, args: Any, kwargs: Any, result: Any) -> bool:
    out = mapped(result, Tensor, _like)
    places = [(t.data_ptr(), t.stride()) for t in tensors(out)]
    try:
        run(*args, **kwargs, out=out)
    except (TypeError, RuntimeError, ValueError):
        return False
    return places == [(t.data_ptr(), t.stride()) for t in tensors(out)] and _equal(out, result)


def _gives(run: Run, args: Any, kwargs: Any, result: Any) -> bool:
    try:
        found = run(*args, **kwargs)
    except (TypeError, RuntimeError, ValueError):
        return False
    return type(found) is type(result) and _equal(found, result)


def _equal(found: Any, result: Any) -> bool:
    a, b = _listed(found), _listed(result)
    return len(a) == len(b) and all(
        x is y
        or (isinstance(x, Tensor) and isinstance(y, Tensor) and same_bits(x, y) and x.stride() == y.stride())
        for x, y in zip(a, b, strict=True)
    )


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def _seconds(run: Callable[[], object], result: Any) -> float:
    """The least of a few runs; on a GPU between events, after one that warms up."""
    on_gpu = any(t.is_cuda for t in tensors(result))
    least, spent = float("inf"), 0.0
    for _ in range(REPEATS):
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            took = begin.elapsed_time(end) * 1e-3
        else:
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
        least = min(least, took)
        spent += took
        if spent > 0.02:
            break
    return least
