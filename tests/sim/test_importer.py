"""Kernel tables of others: what of them is taken, and that it comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtool.errors import UsageError
from llmtool.sim.importer import import_tables
from llmtool.sim.ops import Ops
from tests.plan.made import device

parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{name}.parquet")


def experts(dtype: str, ms: float, hidden: int = 1024) -> list[dict[str, Any]]:
    shape = {"hidden_size": hidden, "inter_size": 1024, "topk": 2, "num_experts": 16, "moe_tp_size": 1,
             "moe_ep_size": 1, "distribution": "power_law_1.01"}  # fmt: skip
    return [{"moe_dtype": dtype, "num_tokens": m, "latency": ms, **shape} for m in (1, 8, 64)]


def test_gemms_and_experts_come_back(tmp_path: Path) -> None:
    sizes = (256, 1024, 4096)
    gemms = [
        {"gemm_dtype": "bfloat16", "m": m, "n": n, "k": k, "latency": 0.02 + m * n * k * 1e-10}
        for m in (1, 8, 64, 256) for n in sizes for k in sizes
    ]  # fmt: skip
    slower = [row | {"latency": 3 * row["latency"]} for row in gemms]  # another kernel for the same shapes
    write(tmp_path / "gemm" / "vllm" / "0.24.0", "gemm_perf", gemms + slower)
    write(tmp_path / "gemm" / "vllm" / "0.9.0", "gemm_perf", slower)
    write(tmp_path / "moe" / "vllm" / "0.24.0", "moe_perf", experts("bfloat16", 0.5))
    spec = device()
    tables = import_tables(tmp_path, spec)
    assert tables.device == "toy" and "0.24.0" in tables.source and "0.9.0" not in tables.source
    ops = Ops(spec, tables)
    for row in gemms:
        taken = ops.gemm(row["m"], row["n"], row["k"], "bf16").seconds
        assert taken == pytest.approx(row["latency"] * 1e-3, rel=0.1)
    assert ops.moe(8, 1024, 1024, 16, 16, 2, "bf16").seconds == pytest.approx(5e-4, rel=0.1)


@pytest.mark.parametrize("weights_alone_first", [False, True])
def test_weights_alone_in_four_bits_stand_in_and_never_aside(
    tmp_path: Path, weights_alone_first: bool
) -> None:
    """Where kernels have all in four bits, those of weights alone are of other models, and far slower."""
    alone, whole = experts("w4a16_mxfp4", 4.0), experts("nvfp4", 0.4)
    rows = [*alone, *whole] if weights_alone_first else [*whole, *alone]
    spec = device(flops={"bf16": 20e12, "fp4": 80e12})
    for folder, given, ms in (("both", rows, 0.4), ("alone", alone, 4.0)):
        write(tmp_path / folder / "moe" / "vllm" / "0.24.0", "moe_perf", given)
        ops = Ops(spec, import_tables(tmp_path / folder, spec))
        assert ops.moe(8, 1024, 1024, 16, 16, 2, "fp4").seconds == pytest.approx(ms * 1e-3, rel=0.1)


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no kernel tables"):
        import_tables(tmp_path, device())
