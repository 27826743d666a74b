"""The compiled kernels: loaded once, or the reason why not."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
import time

import torch
from torch import Tensor

from llmtool_kernels.cpu import abi
from llmtool_kernels.cpu.build import BuildError, build

log = logging.getLogger(__name__)

ENV = "LLMTOOL_CPU_KERNELS"
MODES = ("auto", "portable", "off")
ELEMENTS = {torch.float32: abi.F32, torch.bfloat16: abi.BF16}


class Native:
    """The kernels' library. isa: "amx", "avx512_bf16" or "portable": what its bfloat16 code uses."""

    def __init__(self, library: ctypes.CDLL) -> None:
        abi.declare(library)
        self._run = library.llmtool_run
        self._pack = library.llmtool_pack
        self.isa: str = library.llmtool_isa().decode()

    def run(self, ops: ctypes.Array[abi.Op], step: abi.Step, num_ops: int | None = None) -> None:
        """Run the first `num_ops` operations in order on torch's number of threads."""
        count = len(ops) if num_ops is None else num_ops
        failed = self._run(ctypes.addressof(ops), count, ctypes.addressof(step), torch.get_num_threads())
        if failed:
            raise ValueError(f"operation {failed - 1} has shapes or types that the CPU kernels do not run")

    def timed(self, ops: ctypes.Array[abi.Op], step: abi.Step) -> float:
        """`run`, and the seconds it took."""
        started = time.perf_counter()
        self.run(ops, step)
        return time.perf_counter() - started

    def pack(self, weight: Tensor, gated: bool, out: Tensor) -> None:
        """weight [n, k], contiguous float32 or bfloat16, into panels."""
        n, k = weight.shape
        form = abi.PANEL_F32 if weight.dtype == torch.float32 else abi.PANEL_BF16
        threads = torch.get_num_threads()
        self._pack(form, weight.data_ptr(), n, k, gated, out.data_ptr(), None, None, 0, threads)

    def pack_compact(self, weight: Tensor, gated: bool, out: Tensor, counts: Tensor, room: Tensor) -> None:
        """weight [n, k], contiguous bfloat16, k a multiple of 4, into compact panels. counts [panels]: how many
        exceptions each has, of which room [panels, most], both int64, takes the first."""
        n, k = weight.shape
        self._pack(
            abi.PANEL_COMPACT, weight.data_ptr(), n, k, gated, out.data_ptr(),
            counts.data_ptr(), room.data_ptr(), room.shape[1], torch.get_num_threads(),
        )  # fmt: skip


def kernels() -> Native | None:
    """The kernels of this process, or None where torch has to serve; the log says why, once."""
    chosen = mode()
    return None if chosen == "off" else load("native" if chosen == "auto" else chosen)


def mode() -> str:
    """LLMTOOL_CPU_KERNELS: auto (the default), portable (no instructions of one processor family), or off.

    Raises ValueError for anything else.
    """
    chosen = os.environ.get(ENV) or "auto"
    if chosen not in MODES:
        raise ValueError(f"{ENV} is {chosen!r}; it must be one of {', '.join(MODES)}")
    return chosen


@functools.cache
def load(variant: str = "native") -> Native | None:
    """Build and load one variant; None, with a warning, where that cannot be done."""
    try:
        if sys.platform != "linux":
            raise BuildError("they need Linux")
        return Native(ctypes.CDLL(str(build(variant))))
    except (BuildError, OSError) as error:
        log.warning("The C++ kernels are not available: %s. PyTorch's own operators serve, slower.", error)
        return None


def supports(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tensors of this kind are the kernels' business, were they available."""
    return device.type == "cpu" and dtype in ELEMENTS
