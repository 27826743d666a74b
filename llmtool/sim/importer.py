"""Kernel tables of others, as ours: the parquet files that come with the aiconfigurator-core wheel (Apache-2.0).

    plan --import-tables DIR --device h100 -o h100.npz

DIR holds .../gemm/ENGINE/VERSION/gemm_perf.parquet and its neighbours for one device; of several versions the
newest counts. Times are milliseconds there. Of several kernels for one shape the fastest counts, as an engine would
choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtool.errors import UsageError
from llmtool.hardware import DeviceSpec
from llmtool.sim.grid import Grid, Tables, fit_grid
from llmtool.sim.ops import Ops, decode_work, gemm_work, moe_work, prefill_work

# Block-wise fp8 products are left out: their rows hold 40 to 80 us of launches that a captured graph does not have;
# those of plain fp8 stand for them.
DTYPES = {"bfloat16": "bf16", "fp8": "fp8", "nvfp4": "fp4", "int4_wo": "int4"}
MOE_DTYPES = {**DTYPES, "fp8_block": "fp8_block", "w4a16_mxfp4": "fp4"}
# The tables' own coordinates, thinned: enough to be within a few percent of every row.
FINE = {
    "m": (1, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 512, 1024, 2048, 4096, 8192, 32768),
    "n": (256, 512, 1024, 2048, 3072, 4096, 5120, 6144, 8192, 10240, 12288, 16384, 65536),
}
COARSE = {
    "m": (1, 8, 16, 32, 64, 128, 192, 256, 512, 1024, 2048, 8192, 32768),
    "n": (256, 1024, 2048, 4096, 8192, 16384, 65536),
}
BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
LENGTH = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 131072)
PER_EXPERT = (0.004, 0.0156, 0.0625, 0.25, 1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
EXPERT_SIZE = (2**17, 2**18, 2**19, 2**20, 2**21, 2**22, 2**23, 2**25, 2**27)
LOCAL = (1, 4, 16, 64, 256)
DEFAULTS = {"window_size": 0, "kv_cache_dtype": "bfloat16", "backend": "graph"}
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}


def import_tables(directory: str | Path, device: DeviceSpec, coarse: bool = False) -> Tables:
    """All tables under `directory` for `device`. coarse: fewer points, as the built-in packs have.

    Raises UsageError where there are none.
    """
    root, axes = Path(directory), COARSE if coarse else FINE
    readers: dict[str, Callable[[Any, DeviceSpec], dict[str, Grid]]] = {
        "gemm_perf": lambda rows, d: _gemm(rows, d, axes),
        "context_attention_perf": _prefill,
        "generation_attention_perf": _decode,
        "moe_perf": _moe,
        "mla_context_module_perf": lambda rows, d: _latent(rows, d, "prefill"),
        "mla_generation_module_perf": lambda rows, d: _latent(rows, d, "decode"),
        "custom_allreduce_perf": _custom_all_reduce,
        "nccl_perf": _nccl,
    }
    grids: dict[str, Grid] = {}
    used = []
    for name in ("nccl_perf", *(n for n in readers if n != "nccl_perf")):
        files = sorted(root.rglob(f"{name}.parquet"), key=lambda p: (_version(p.parent.name), str(p)))
        if files:
            grids |= readers[name](_read(files[-1]), device)
            used.append(f"{files[-1].parent.parent.name} {files[-1].parent.name}")
    if not grids:
        raise UsageError(
            f"{directory} has no kernel tables.",
            "Give the folder of one device from an aiconfigurator-core wheel.",
        )
    source = f"AIConfigurator kernel tables ({', '.join(dict.fromkeys(used))}), Apache-2.0"
    return Tables(grids, device.name, source)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UsageError("Reading these tables needs pyarrow.", "pip install pyarrow") from None
    table = parquet.read_table(path)
    rows = {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
    for name, value in DEFAULTS.items():  # columns that older tables lack
        rows.setdefault(name, np.full(table.num_rows, value))
    return rows


def _select(rows: dict[str, NDArray[Any]], mask: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {k: v[mask] for k, v in rows.items()}


def _fastest(rows: dict[str, NDArray[Any]], keys: Sequence[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Coordinates [n, keys] without doubles, and the least seconds of each."""
    points = np.stack([rows[k].astype(np.float64) for k in keys], axis=1)
    unique, inverse = np.unique(points, axis=0, return_inverse=True)
    seconds = np.full(len(unique), np.inf)
    np.minimum.at(seconds, inverse.ravel(), rows["latency"].astype(np.float64) * 1e-3)
    return unique, seconds


def _ratios(
    device: DeviceSpec,
    points: NDArray[Any],
    seconds: NDArray[Any],
    work: Callable[..., tuple[float, float]],
    dtype: str,
) -> NDArray[Any]:
    ops = Ops(device, None)
    best = np.array([ops.roofline(*work(*p), dtype)[0] for p in points.tolist()])
    return np.log(seconds / best)


def _gemm(rows: Any, device: DeviceSpec, axes: dict[str, tuple[int, ...]]) -> dict[str, Grid]:
    grids = {}
    for theirs in np.unique(rows["gemm_dtype"]).tolist():
        ours = DTYPES.get(theirs)
        if ours is None:
            continue
        points, seconds = _fastest(_select(rows, rows["gemm_dtype"] == theirs), ("m", "n", "k"))
        keep = (points[:, 1] >= 256) & (points[:, 2] >= 256)
        points, seconds = points[keep], seconds[keep]

        def work(m: float, n: float, k: float, dtype: str = ours) -> tuple[float, float]:
            return gemm_work(m, int(n), int(k), dtype)

        ratios = _ratios(device, points, seconds, work, ours)
        grids[f"gemm/{ours}"] = fit_grid((axes["m"], axes["n"], axes["n"]), points, ratios)
    return grids


def _dims(rows: Any) -> list[int]:
    return [d for d in (64, 128, 256) if d in rows["head_dim"]]


def _prefill(rows: Any, device: DeviceSpec) -> dict[str, Grid]:
    grids = {}
    for dim in _dims(rows):
        for theirs, kv in (("bfloat16", "bf16"), ("fp8", "fp8")):
            mask = (rows["head_dim"] == dim) & (rows["window_size"] == 0) & (rows["kv_cache_dtype"] == theirs)
            mask &= rows["isl"] >= 16
            if not mask.any():
                continue
            keys = ("batch_size", "isl", "num_heads", "num_key_value_heads")
            points, seconds = _fastest(_select(rows, mask), keys)

            def work(n: float, length: float, heads: float, kvh: float, d: int = dim, t: str = kv) -> Any:
                return prefill_work(n, length, int(heads), int(kvh), d, t)

            ratios = _ratios(device, points, seconds, work, "bf16")
            axes = ((1, 2, 4, 8, 16, 64, 256), LENGTH[:9], (1, 4, 8, 16, 32, 64))
            grids[f"prefill/{kv}/{dim}"] = fit_grid(axes, points[:, :3], ratios)
    return grids


def _decode(rows: Any, device: DeviceSpec) -> dict[str, Grid]:
    rows = {**rows, "length": rows["step"] + 1}
    grids = {}
    for dim in _dims(rows):
        for theirs, kv in (("bfloat16", "bf16"), ("fp8", "fp8")):
            mask = (rows["head_dim"] == dim) & (rows["window_size"] == 0) & (rows["kv_cache_dtype"] == theirs)
            if not mask.any():
                continue
            keys = ("batch_size", "length", "num_key_value_heads", "num_heads")
            points, seconds = _fastest(_select(rows, mask), keys)

            def work(n: float, length: float, kvh: float, heads: float, d: int = dim, t: str = kv) -> Any:
                return decode_work(n, length, int(heads), int(kvh), d, t)

            ratios = _ratios(device, points, seconds, work, "bf16")
            points[:, 3] = points[:, 3] / points[:, 2]
            axes = (BATCH, LENGTH, (1, 2, 4, 8), (1, 4, 8, 16, 64))
            grids[f"decode/{kv}/{dim}"] = fit_grid(axes, points, ratios)
    return grids


def _moe(rows: Any, device: DeviceSpec) -> dict[str, Grid]:
    grids = {}
    for theirs in np.unique(rows["moe_dtype"]).tolist():
        ours = MOE_DTYPES.get(theirs)
        if ours is None or f"moe/{ours}" in grids:  # weights alone in 4 bits: where nothing is all in 4 bits
            continue
        plain = "fp8" if ours == "fp8_block" else ours
        # Real routers are uneven: the tables' power law with exponent 1.01 stands for them.
        mask = (rows["moe_dtype"] == theirs) & (rows["distribution"] == "power_law_1.01")
        keys = (
            "num_tokens",
            "hidden_size",
            "inter_size",
            "moe_tp_size",
            "moe_ep_size",
            "num_experts",
            "topk",
        )
        points, seconds = _fastest(_select(rows, mask), keys)
        tokens, hidden, inner, tp, ep, experts, top_k = points.T
        shapes = np.stack([tokens, hidden, inner / tp, experts / ep, experts, top_k], axis=1)

        def work(t: float, h: float, i: float, local: float, e: float, k: float, dtype: str = plain) -> Any:
            return moe_work(t, int(h), i, local, int(e), int(k), dtype)

        ratios = _ratios(device, shapes, seconds, work, plain)
        at = np.stack([tokens * top_k / experts, hidden * inner / tp, experts / ep], axis=1)
        grids[f"moe/{ours}"] = fit_grid((PER_EXPERT, EXPERT_SIZE, LOCAL), at, ratios)
    return grids


def _latent(rows: Any, device: DeviceSpec, phase: str) -> dict[str, Grid]:
    """DeepSeek-V3's whole attention module, with weights in 16 bits."""
    from llmtool.sim.latent import module_work

    grids = {}
    length = rows["isl"] if phase == "prefill" else rows["step"] + rows["isl"]
    rows = {**rows, "length": length}
    for theirs, kv in (("bfloat16", "bf16"), ("fp8", "fp8")):
        mask = (rows["kv_cache_dtype"] == theirs) & (rows["gemm_type"] == "bfloat16") & (rows["length"] >= 16)
        if not mask.any():
            continue
        points, seconds = _fastest(_select(rows, mask), ("batch_size", "length", "num_heads"))

        def work(n: float, size: float, heads: float, t: str = kv) -> tuple[float, float]:
            return module_work(phase, n, size, int(heads), (1536, 512, 128, 64, 128), 7168, "bf16", t)

        ratios = _ratios(device, points, seconds, work, "bf16")
        axes = (BATCH if phase == "decode" else (1, 4, 16, 64, 256), LENGTH[:9], (1, 4, 16, 64, 128))
        grids[f"latent_{phase}/{kv}"] = fit_grid(axes, points, ratios)
    return grids


SIZES = tuple(2**i for i in range(8, 30))


def _curve(sizes: NDArray[Any], seconds: NDArray[Any], best: NDArray[Any]) -> Grid:
    return fit_grid((SIZES,), sizes[:, None].astype(float), np.log(seconds / best))


def _custom_all_reduce(rows: Any, device: DeviceSpec) -> dict[str, Grid]:
    from llmtool.sim.collectives import wire_seconds

    grids = {}
    graph = np.char.find(rows["backend"].astype(str), "graph") >= 0
    for group in np.unique(rows["num_gpus"]).tolist():
        points, seconds = _fastest(_select(rows, graph & (rows["num_gpus"] == group)), ("message_size",))
        sizes = points[:, 0]
        best = np.array([wire_seconds("all_reduce", s, group, device.link) for s in sizes])
        grids[f"all_reduce/{group}"] = _curve(sizes, seconds, best)
    return grids


def _nccl(rows: Any, device: DeviceSpec) -> dict[str, Grid]:
    from llmtool.sim.collectives import wire_seconds

    grids = {}
    for theirs, ours in COLLECTIVES.items():
        for group in np.unique(rows["num_gpus"]).tolist():
            mask = (rows["op_name"] == theirs) & (rows["num_gpus"] == group) & (rows["nccl_dtype"] == "half")
            if not mask.any():
                continue
            points, seconds = _fastest(_select(rows, mask), ("message_size",))
            sizes = points[:, 0]
            best = np.array([wire_seconds(ours, s, group, device.link) for s in sizes])
            grids[f"{ours}/{group}"] = _curve(sizes, seconds, best)
    return grids
