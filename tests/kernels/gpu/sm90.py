"""Kernels compiled for Hopper, or another GPU, on a machine without one, and what the assembler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, slots=True)
class Compiled:
    """shared: bytes a program takes. registers: per thread. spills: bytes stored and loaded per thread."""

    ptx: str
    shared: int
    registers: int
    spills: int


def compiled(
    kernel: Any,
    arguments: Sequence[object],
    constants: Mapping[str, object],
    num_warps: int = 4,
    num_stages: int = 3,
    capability: int = 90,
) -> Compiled:
    """`kernel` as a launch with these arguments would compile it: tensors may be on any device, meta included.

    capability: of the GPU it is compiled for, 90 for 9.0.
    """
    names = [p.name for p in kernel.params if not p.is_constexpr]
    assert len(names) == len(arguments), f"{len(arguments)} arguments for {names}"
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    signature = {p.name: "constexpr" for p in kernel.params if p.is_constexpr}
    values, attributes = dict(constants), {}
    order = [p.name for p in kernel.params]
    for name, value in zip(names, arguments, strict=True):
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned = value.storage_offset() * value.dtype.itemsize % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and name not in fixed:
            signature[name], values[name] = "constexpr", 1
        else:
            assert isinstance(value, int)
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned = value % 16 == 0 and name not in fixed
        if aligned:
            attributes[(order.index(name),)] = [["tt.divisibility", 16]]
    signature = {name: signature[name] for name in order}
    source = ASTSource(kernel, signature, values, attributes)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    registers, spills = _assemble(built.asm["ptx"], capability)
    return Compiled(built.asm["ptx"], built.metadata.shared, registers, spills)


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, by `ptxas -v`."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        # One of Triton's assemblers knows the version of what was emitted; the newer wants Triton's own flag.
        newer = TOOLS / "ptxas-blackwell"
        for tool in ([newer, "--regAllocOptLevel=2"], [newer], [TOOLS / "ptxas"]):
            if not Path(tool[0]).exists():
                continue
            name = f"sm_{capability}{'a' if capability >= 90 else ''}"
            command = [*tool, "-v", "--gpu-name", name, source, "-o", source.with_suffix(".cubin")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
    said = done.stderr
    assert done.returncode == 0, said
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said)]
    assert registers and spilled, said
    return max(registers), sum(spilled)
