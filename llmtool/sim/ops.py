"""How long one operation takes on one device: a roofline, times a measured ratio where a table has one.

The roofline is max(operations / dense peak, bytes / memory bandwidth). Tables (grid.Tables) are either imported in
full or the built-in pack of efficiencies, the same thing with fewer points.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from llmtool.hardware import DeviceSpec
from llmtool.sim.grid import Grid, Tables

WEIGHT_BYTES = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "fp8_block": 1.0,
    "int8": 1.0,
    "fp4": 0.5625,
    "int4": 0.53125,
}  # with scales of fp4 and int4
KV_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}
LAUNCH = 3e-6  # seconds of the shortest kernel
# What kernels reach without a table: of peak, of bandwidth.
COMPUTE_SHARE, MEMORY_SHARE = 0.7, 0.8


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds: of the operation. bound: compute | memory | network. flops, bytes: what it does and moves. slack:
    seconds that the other of compute and memory would take, where both are only estimated; 0 where the time is
    measured."""

    seconds: float
    bound: str
    flops: float = 0.0
    bytes: float = 0.0
    slack: float = 0.0

    def under(self, compute: float, memory: float) -> Cost:
        """By which of the two the operation is bound when compute takes `compute` times as long, memory `memory`
        times: seconds are still without the factors."""
        if not self.slack or self.bound == "network":
            return self
        mine, other = (compute, memory) if self.bound == "compute" else (memory, compute)
        if self.slack * other <= self.seconds * mine:
            return self
        bound = "memory" if self.bound == "compute" else "compute"
        return Cost(self.slack, bound, self.flops, self.bytes, self.seconds)


def load_pack(device: DeviceSpec) -> Tables | None:
    """The built-in efficiencies for a device, its own or borrowed from a relative."""
    if not device.efficiency:
        return None
    return Tables.load(files("llmtool.hardware") / "packs" / f"{device.efficiency}.npz")


class Ops:
    """tables: None is the roofline alone. Results are remembered: plans of one search ask for the same shapes."""

    def __init__(self, device: DeviceSpec, tables: Tables | None) -> None:
        self.device = device
        self.tables = tables
        self._grids = dict(tables.grids) if tables is not None else {}
        self._memo: dict[tuple[object, ...], Cost] = {}

    def roofline(self, flops: float, nbytes: float, dtype: str) -> tuple[float, str]:
        compute, memory = flops / self.device.peak(dtype), nbytes / self.device.bandwidth
        return (compute, "compute") if compute > memory else (memory, "memory")

    def _cost(self, key: str, at: tuple[float, ...], flops: float, nbytes: float, dtype: str) -> Cost:
        best, bound = self.roofline(flops, nbytes, dtype)
        table: Grid | None = self._grids.get(key)
        if table is not None:
            return Cost(best * table.ratio(*at), bound, flops, nbytes)
        compute = LAUNCH + flops / self.device.peak(dtype) / COMPUTE_SHARE
        memory = LAUNCH + nbytes / self.device.bandwidth / MEMORY_SHARE
        if compute > memory:
            return Cost(compute, "compute", flops, nbytes, memory)
        return Cost(memory, "memory", flops, nbytes, compute)

    def gemm(self, m: float, n: int, k: int, dtype: str) -> Cost:
        """[m, k] x [k, n], weights in `dtype`; those in blocks take what plain ones take."""
        dtype = dtype.removesuffix("_block")
        key = ("gemm", m, n, k, dtype)
        if key not in self._memo:
            flops, nbytes = gemm_work(m, n, k, dtype)
            name = f"gemm/{dtype}/{n}x{k}"
            if name in self._grids:
                self._memo[key] = self._cost(name, (m,), flops, nbytes, dtype)
            else:
                self._memo[key] = self._cost(f"gemm/{dtype}", (m, n, k), flops, nbytes, dtype)
        return self._memo[key]

    def prefill(self, n: float, length: float, heads: int, kv_heads: int, dim: int, kv: str) -> Cost:
        """Causal attention of n sequences over `length` tokens each, none of them computed before."""
        key = ("prefill", n, length, heads, kv_heads, dim, kv)
        if key not in self._memo:
            flops, nbytes = prefill_work(n, length, heads, kv_heads, dim, kv)
            self._memo[key] = self._cost(
                f"prefill/{kv}/{_nearest_dim(dim)}", (n, length, heads), flops, nbytes, "bf16"
            )
        return self._memo[key]

    def decode(self, n: float, length: float, heads: int, kv_heads: int, dim: int, kv: str) -> Cost:
        """One query token each of n sequences over `length` cached tokens."""
        key = ("decode", n, length, heads, kv_heads, dim, kv)
        if key not in self._memo:
            flops, nbytes = decode_work(n, length, heads, kv_heads, dim, kv)
            self._memo[key] = self._cost(
                f"decode/{kv}/{_nearest_dim(dim)}",
                (n, length, kv_heads, heads / kv_heads),
                flops,
                nbytes,
                "bf16",
            )
        return self._memo[key]

    def mixed(self, chunk: float, n: float, length: float) -> float:
        """How much longer attention of n decoding sequences takes in a step that also has `chunk` prompt tokens: 1
        where nothing says that one kernel takes both."""
        table = self._grids.get("mixed")
        return 1.0 if table is None else table.ratio(chunk, n, length)

    def moe(
        self, tokens: float, hidden: int, inner: float, local: float, experts: int, top_k: int, dtype: str
    ) -> Cost:
        """The experts' three matrices. tokens: of the whole group that shares the experts. inner: neurons of one
        expert on this device, local: experts on it, of `experts` in all."""
        key = ("moe", tokens, hidden, inner, local, experts, top_k, dtype)
        if key not in self._memo:
            flops, nbytes = moe_work(tokens, hidden, inner, local, experts, top_k, dtype)
            at = (tokens * top_k / experts, hidden * inner, local)
            self._memo[key] = self._cost(f"moe/{dtype}", at, flops, nbytes, dtype)
        return self._memo[key]

    def latent(
        self, phase: str, n: float, length: float, heads: int, work: tuple[float, float], kv: str
    ) -> Cost:
        """A whole module of latent attention, projections and all; phase: prefill | decode; work: (flops,
        bytes)."""
        return self._cost(f"latent_{phase}/{kv}", (n, length, heads), *work, "bf16")

    def knows(self, key: str) -> bool:
        return key in self._grids

    def stream(self, nbytes: float, kind: str = "") -> Cost:
        """Elementwise work: norms, activations, rotary embeddings, a recurrent state. kind: act, rotary or sampler,
        of which a table may have times of its own."""
        table = self._grids.get(f"stream/{kind}") or self._grids.get("stream")
        if table is not None:
            return Cost(nbytes / self.device.bandwidth * table.ratio(nbytes), "memory", 0.0, nbytes)
        return Cost(LAUNCH + nbytes / (self.device.bandwidth * MEMORY_SHARE), "memory", 0.0, nbytes)


def _nearest_dim(dim: int) -> int:
    return 64 if dim < 96 else 128 if dim < 192 else 256


def gemm_work(m: float, n: int, k: int, dtype: str) -> tuple[float, float]:
    size = WEIGHT_BYTES[dtype]
    wide = max(2.0, size if dtype == "fp32" else 0.0)
    return 2.0 * m * n * k, size * n * k + min(size, wide) * m * k + wide * m * n


def prefill_work(
    n: float, length: float, heads: int, kv_heads: int, dim: int, kv: str
) -> tuple[float, float]:
    flops = 2.0 * n * length * (length + 1) * heads * dim
    return flops, n * length * dim * (4.0 * heads + 2.0 * kv_heads * KV_BYTES[kv])


def decode_work(n: float, length: float, heads: int, kv_heads: int, dim: int, kv: str) -> tuple[float, float]:
    nbytes = n * (length * 2.0 * kv_heads * dim * KV_BYTES[kv] + 4.0 * heads * dim)
    return 4.0 * n * length * heads * dim, nbytes


def moe_work(
    tokens: float, hidden: int, inner: float, local: float, experts: int, top_k: int, dtype: str
) -> tuple[float, float]:
    """Experts that at least one token visits are read: all but (1 - k/E)^tokens of them, tokens choosing evenly."""
    pairs = tokens * top_k * local / experts
    touched = local * (1.0 - (1.0 - top_k / experts) ** tokens)
    nbytes = touched * 3.0 * hidden * inner * WEIGHT_BYTES[dtype] + pairs * (4.0 * hidden + 4.0 * inner)
    return 6.0 * pairs * hidden * inner, nbytes
