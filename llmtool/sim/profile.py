"""A layer-wise profile of one model on one card, as tables: the folders of LLMServingSim 2.0 (MIT).

A folder tpN holds dense.csv (layer, tokens, time_us), per_sequence.csv (lm_head), attention.csv (prefill_chunk,
kv_prefill, n_decode, kv_decode, time_us) and, for mixtures, moe.csv (tokens, activated_experts, time_us). Its
matrices become curves of their exact shapes. One kernel takes prompts and decoding sequences of a step together, in
the prompts' way: what that costs the latter is a table of its own.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from llmtool.errors import UsageError
from llmtool.hardware import DeviceSpec
from llmtool.sim.grid import Grid, Tables, fit_grid
from llmtool.sim.importer import BATCH, LENGTH, PER_EXPERT
from llmtool.sim.ir import Attention, Dense, ModelIR, MoE
from llmtool.sim.ops import Ops, decode_work, gemm_work, moe_work, prefill_work

_M = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
_CHUNK = (16, 64, 256, 1024, 2048)


def import_profile(directory: str | Path, ir: ModelIR, tp: int, device: DeviceSpec) -> Tables:
    """The tables of a profile of `ir` whose folder is `directory`/tpN. Raises UsageError where it is none."""
    folder = Path(directory) / f"tp{tp}"
    mixer = next((b.mixer for b in ir.blocks if isinstance(b.mixer, Attention)), None)
    if mixer is None or mixer.latent is not None:
        raise UsageError("A layer profile is of a model with plain attention.")
    ops, grids = Ops(device, None), {}
    dense = _rows(folder / "dense.csv", "layer")
    heads, kv_heads, dim = mixer.heads // tp, max(1, mixer.kv_heads // tp), mixer.head_dim
    hidden, mlp = ir.hidden, ir.blocks[0].mlp
    shapes = {"qkv_proj": ((heads + 2 * kv_heads) * dim, hidden), "o_proj": (hidden, heads * dim)}
    if isinstance(mlp, Dense):
        inner = mlp.inner // tp
        shapes |= {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    for layer, (n, k) in shapes.items():
        grids[f"gemm/bf16/{n}x{k}"] = _gemm_curve(ops, dense[layer], n, k)
    heads_ = _rows(folder / "per_sequence.csv", "layer")
    grids[f"gemm/bf16/{ir.vocab // tp}x{hidden}"] = _gemm_curve(
        ops, heads_["lm_head"], ir.vocab // tp, hidden
    )
    # Elementwise kernels, by the bytes that stepcost.py counts for them.
    bytes_of = {"": (6.0 * hidden, "layernorm"), "rotary": (4.0 * (heads + kv_heads) * dim, "rotary_emb")}
    if isinstance(mlp, Dense):
        bytes_of["act"] = (6.0 * (mlp.inner // tp), "act_fn")
    for kind, (each, layer) in bytes_of.items():
        times = dict(dense[layer])
        if kind == "rotary" and "qk_norm" in dense:
            times = {m: times[m] + t for m, t in dense["qk_norm"] if m in times}
        grids[f"stream/{kind}".rstrip("/")] = _stream_curve(device, each, times)
    if "sampler" in heads_:
        grids["stream/sampler"] = _stream_curve(device, 8.0 * ir.vocab, dict(heads_["sampler"]))
    grids |= _attention(folder / "attention.csv", ops, heads, kv_heads, dim)
    if isinstance(mlp, MoE):
        grids["moe/bf16"] = _experts(folder / "moe.csv", ops, ir, mlp, tp)
    return Tables(grids, device.name, f"layer profile {directory} (LLMServingSim, MIT)")


def _open(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as e:
        raise UsageError(f"Cannot read the profile {path}: {e.strerror or e}.") from None


def _rows(path: Path, key: str) -> dict[str, list[tuple[float, float]]]:
    """layer -> (tokens or sequences, seconds)."""
    out: dict[str, list[tuple[float, float]]] = {}
    for row in _open(path):
        size = row.get("tokens") or row["sequences"]
        out.setdefault(row[key], []).append((float(size), float(row["time_us"]) * 1e-6))
    return out


def _gemm_curve(ops: Ops, rows: list[tuple[float, float]], n: int, k: int) -> Grid:
    points = np.array(rows)
    best = np.array([ops.roofline(*gemm_work(m, n, k, "bf16"), "bf16")[0] for m in points[:, 0]])
    return fit_grid((_M,), points[:, :1], np.log(points[:, 1] / best))


def _stream_curve(device: DeviceSpec, each: float, times: dict[float, float]) -> Grid:
    """each: bytes per token. times: seconds by tokens."""
    points = np.array([(each * m, t) for m, t in times.items()])
    axis = tuple(each * m for m in _M if m <= max(times))
    return fit_grid((axis,), points[:, :1], np.log(points[:, 1] * device.bandwidth / points[:, 0]))


def _attention(path: Path, ops: Ops, heads: int, kv_heads: int, dim: int) -> dict[str, Grid]:
    rows = [{k: float(v) for k, v in row.items()} for row in _open(path)]
    decode = [r for r in rows if r["prefill_chunk"] == 0 and r["n_decode"] > 0]
    prefill = [r for r in rows if r["n_decode"] == 0 and r["kv_prefill"] == 0 and r["prefill_chunk"] >= 16]
    d_points = np.array([(r["n_decode"], r["kv_decode"], kv_heads, heads / kv_heads) for r in decode])
    d_best = [
        ops.roofline(*decode_work(r["n_decode"], r["kv_decode"], heads, kv_heads, dim, "bf16"), "bf16")[0]
        for r in decode
    ]
    p_points = np.array([(1.0, r["prefill_chunk"], heads) for r in prefill])
    p_best = [
        ops.roofline(*prefill_work(1, r["prefill_chunk"], heads, kv_heads, dim, "bf16"), "bf16")[0]
        for r in prefill
    ]
    name = 64 if dim < 96 else 128 if dim < 192 else 256
    d_log = np.log([r["time_us"] * 1e-6 / b for r, b in zip(decode, d_best, strict=True)])
    p_log = np.log([r["time_us"] * 1e-6 / b for r, b in zip(prefill, p_best, strict=True)])
    grids = {
        f"decode/bf16/{name}": fit_grid(
            (BATCH[:9], LENGTH[:9], (kv_heads,), (heads / kv_heads,)), d_points, d_log
        ),
        f"prefill/bf16/{name}": fit_grid(((1,), LENGTH[:6], (heads,)), p_points, p_log),
    }
    points, logs = _mixed(rows)
    if points:
        grids["mixed"] = fit_grid((_CHUNK, BATCH[:9], LENGTH[:9]), np.array(points), np.array(logs))
    return grids


def _mixed(rows: list[dict[str, float]]) -> tuple[list[tuple[float, float, float]], list[float]]:
    """(chunk, sequences, context), and the logarithm of what the decoding sequences' attention takes beside a chunk
    over what it takes alone."""
    alone = {(r["prefill_chunk"], r["kv_prefill"], r["n_decode"], r["kv_decode"]): r["time_us"] for r in rows}
    points, logs = [], []
    for (chunk, before, n, context), seconds in alone.items():
        prompt, decode = alone.get((chunk, before, 0, 0)), alone.get((0, 0, n, context))
        # Small parts are the difference of two times that are nearly the same.
        if chunk and n and prompt and decode and seconds - prompt > 0.3 * decode:
            points.append((chunk, n, context))
            logs.append(float(np.log((seconds - prompt) / decode)))
    return points, logs


def _experts(path: Path, ops: Ops, ir: ModelIR, mlp: MoE, tp: int) -> Grid:
    points, logs = [], []
    for row in _open(path):
        tokens, active = float(row["tokens"]), float(row["activated_experts"])
        per_expert = tokens * mlp.top_k / active
        # So many experts, all of them visited, each by per_expert tokens.
        flops, nbytes = moe_work(1e6, ir.hidden, mlp.inner / tp, active, 1, 1, "bf16")
        flops, nbytes = flops / 1e6 * per_expert, active * 6.0 * ir.hidden * mlp.inner / tp
        best = ops.roofline(flops, nbytes, "bf16")[0]
        points.append((per_expert, ir.hidden * mlp.inner / tp, active))
        logs.append(np.log(float(row["time_us"]) * 1e-6 / best))
    size = (float(ir.hidden * mlp.inner / tp),)
    return fit_grid((PER_EXPERT[4:], size, (8, 16, 32, 64, 128)), np.array(points), np.array(logs))
