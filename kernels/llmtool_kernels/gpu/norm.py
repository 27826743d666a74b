"""RMS norm, alone and with what decoders do around it: residual addition, and a norm of what is added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from llmtool_kernels.gpu.platform import load32, power_of_2, rounded


@triton.jit
def norm_kernel(
    normed, summed, hidden, x, x_weight, weight, hidden_row, x_row, eps, scale,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, NORM_X: tl.constexpr, NORM: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Grid (N,), a row each. normed, summed: contiguous [N, SIZE]; hidden, x: of these strides, in elements."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < SIZE
    dtype: tl.constexpr = x.dtype.element_ty
    y = load32(x + row * x_row + d, inside)
    if NORM_X:
        y = rounded(y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps) * load32(x_weight + d, inside), dtype)
    if SCALED:
        y = rounded(y * scale, dtype)
    if ADD:
        y = rounded(load32(hidden + row * hidden_row + d, inside) + y, dtype)
        tl.store(summed + row * SIZE + d, y.to(dtype), mask=inside)
    if NORM:
        y = y * tl.rsqrt(tl.sum(y * y, 0) / SIZE + eps) * load32(weight + d, inside)
        tl.store(normed + row * SIZE + d, y.to(dtype), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] / rms(x) * weight [D]; one kernel. The reference is `rms_norm_reference`."""
    rows = x.reshape(-1, x.shape[-1])
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(normed, normed, rows, rows, weight, weight, eps, 1.0, add=False, norm_x=False, norm=True)
    return normed


def add_rms_norm(
    hidden: Tensor,
    x: Tensor,
    x_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(hidden + scale * norm(x, x_weight), its norm by weight), both [N, D]; no weight, no norm. One kernel."""
    summed = torch.empty_like(hidden)
    normed = summed if weight is None else torch.empty_like(hidden)
    _launch(
        normed,
        summed,
        hidden,
        x,
        x if x_weight is None else x_weight,
        x if weight is None else weight,
        eps,
        scale,
        add=True,
        norm_x=x_weight is not None,
        norm=weight is not None,
    )
    return summed, normed


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if weight.dtype == x.dtype:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def add_rms_norm_reference(
    hidden: Tensor,
    x: Tensor,
    x_weight: Tensor | None,
    weight: Tensor | None,
    eps: float,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    if x_weight is not None:
        x = rms_norm_reference(x, x_weight, eps)
    summed = hidden + (x if scale == 1.0 else x * scale)
    return summed, summed if weight is None else rms_norm_reference(summed, weight, eps)


def _launch(
    normed: Tensor,
    summed: Tensor,
    hidden: Tensor,
    x: Tensor,
    x_weight: Tensor,
    weight: Tensor,
    eps: float,
    scale: float,
    *,
    add: bool,
    norm_x: bool,
    norm: bool,
) -> None:
    size = x.shape[1]
    assert x.stride(1) == hidden.stride(1) == 1
    if not len(x):
        return
    norm_kernel[(len(x),)](
        normed, summed, hidden, x, x_weight, weight, hidden.stride(0), x.stride(0), eps, scale,
        SIZE=size, BLOCK=power_of_2(size), ADD=add, NORM_X=norm_x, NORM=norm, SCALED=scale != 1.0,
        num_warps=num_warps(size),
    )  # fmt: skip


def num_warps(size: int) -> int:
    """So that a thread has 16 bytes or two, where a row is long enough."""
    return min(16, max(1, power_of_2(size) // 512))
