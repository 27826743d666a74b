"""The attention kernel as Hopper would run it: it fits, nothing spills, loads are wide, tensor cores work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llmtool_kernels.attention import AttentionBatch, KVLayout
from llmtool_kernels.gpu import attention, table
from llmtool_kernels.gpu.attention_kernel import attention_kernel
from llmtool_kernels.gpu.table import AMPERE, HOPPER, SMALL, choose, fits

from tests.kernels.gpu.conftest import INTERPRETED
from tests.kernels.gpu.sm90 import Compiled, compiled

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles; the interpreter does not")
MULTIPROCESSORS = 132  # of an H100 or H200


LIMITS = {80: AMPERE, 86: SMALL, 89: SMALL, 90: HOPPER, 120: SMALL}  # capability -> bytes a program may have


@pytest.fixture(autouse=True)
def _hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "multiprocessors", lambda _: MULTIPROCESSORS)
    yield


def build(
    queries: int,
    group: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
    tree: bool = False,
    stored: torch.dtype | None = None,
    capability: int = 90,
) -> tuple[Compiled, table.Config]:
    """For two sequences of 1024 tokens. v_dim of 512 under k_dim 576 is latent attention's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "shared_memory", lambda _: LIMITS[capability])
        return _build(
            queries, group, kv_heads, k_dim, v_dim, dtype, window, softcap, sinks, tree, stored, capability
        )


def _build(
    queries: int,
    group: int,
    kv_heads: int,
    k_dim: int,
    v_dim: int,
    dtype: torch.dtype,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    tree: bool,
    stored: torch.dtype | None,
    capability: int,
) -> tuple[Compiled, table.Config]:
    latent = (k_dim, v_dim) == (576, 512)
    layout = KVLayout(0, 16, kv_heads, k_dim, 0 if latent else v_dim, stored)
    bits = [1] * 2 * queries if tree else None
    batch = AttentionBatch.build([queries] * 2, [1024] * 2, [list(range(64))] * 2, 16, tree=bits)
    q = torch.empty(2 * queries, kv_heads * group, k_dim, dtype=dtype)
    out = torch.empty(2 * queries, kv_heads * group, v_dim, dtype=dtype)
    arena = torch.empty(4096, dtype=torch.uint8)
    (work,) = attention.plan(q, layout, batch, window, v_dim if latent else None)
    sink = torch.empty(kv_heads * group, dtype=dtype) if sinks else None
    built = compiled(
        attention_kernel,
        attention.arguments(out, q, arena, layout, batch, work, 0.1, softcap, sink),
        attention.constants(dtype, kv_heads * group, layout, work, softcap, sinks, tree, latent),
        work.config.num_warps,
        work.config.num_stages,
        capability,
    )
    return built, work.config


@pytest.mark.parametrize(
    ("queries", "group", "kv_heads", "k_dim", "v_dim", "extra"),
    [
        (1, 4, 8, 128, 128, {}),  # Llama-3.1-8B
        (8, 4, 8, 128, 128, {"tree": True}),
        pytest.param(16, 4, 8, 128, 128, {}, marks=pytest.mark.slow),
        (512, 4, 8, 128, 128, {}),
        (1, 4, 8, 64, 64, {}),  # Llama-3.2-1B
        (512, 8, 8, 64, 64, {"window": 128, "sinks": True}),  # gpt-oss
        (1, 2, 8, 256, 256, {"softcap": 50.0, "window": 4096}),  # Gemma-2-9B
        pytest.param(512, 2, 8, 256, 256, {"softcap": 50.0, "window": 4096}, marks=pytest.mark.slow),
        (1, 1, 32, 96, 96, {}),  # Phi-3-mini
        (1, 128, 1, 576, 512, {}),  # DeepSeek-V3
        pytest.param(1, 16, 1, 576, 512, {}, marks=pytest.mark.slow),  # DeepSeek-V2-Lite
        (1, 4, 8, 128, 128, {"stored": torch.float8_e4m3fn}),
        (512, 4, 8, 128, 128, {"stored": torch.float8_e4m3fn}),
        pytest.param(
            8, 4, 8, 128, 128, {"tree": True, "stored": torch.float8_e4m3fn}, marks=pytest.mark.slow
        ),
        pytest.param(
            512,
            2,
            8,
            256,
            256,
            {"softcap": 50.0, "window": 4096, "stored": torch.float8_e4m3fn},
            marks=pytest.mark.slow,
        ),
        pytest.param(16, 4, 8, 64, 64, {"stored": torch.float8_e4m3fn}, marks=pytest.mark.slow),
        pytest.param(16, 4, 8, 128, 128, {"stored": torch.float8_e5m2}, marks=pytest.mark.slow),
        pytest.param(1, 4, 8, 64, 64, {"stored": torch.float8_e4m3fn}, marks=pytest.mark.slow),
        pytest.param(1, 1, 32, 96, 96, {"stored": torch.float8_e4m3fn}, marks=pytest.mark.slow),
        (1, 4, 8, 128, 128, {"dtype": torch.float32}),
        pytest.param(512, 4, 8, 128, 128, {"dtype": torch.float32}, marks=pytest.mark.slow),
    ],
)
def test_fits_hopper(
    queries: int, group: int, kv_heads: int, k_dim: int, v_dim: int, extra: dict[str, object]
) -> None:
    built, _ = build(queries, group, kv_heads, k_dim, v_dim, **extra)  # type: ignore[arg-type]
    assert built.shared <= HOPPER
    assert built.spills == 0, f"{built.registers} registers and {built.spills} bytes spilled"
    # Keys and values go to shared memory 16 bytes at a time, past L1, and from there to tensor cores.
    assert "cp.async.cg.shared.global" in built.ptx
    wide = queries * group >= 64 and k_dim < 576 and "dtype" not in extra
    wide = wide and (k_dim < 256 or "stored" not in extra)
    assert ("wgmma.mma_async" if wide else "mma.sync") in built.ptx


FLOAT32 = {"dtype": torch.float32}
FLOAT8 = {"stored": torch.float8_e4m3fn}


@pytest.mark.parametrize(
    ("capability", "queries", "group", "k_dim", "v_dim", "extra"),
    [
        (80, 1, 4, 128, 128, {}),
        (80, 16, 4, 128, 128, {}),
        (80, 512, 4, 128, 128, {}),
        (80, 1, 128, 576, 512, {}),
        (89, 1, 4, 128, 128, {}),
        (89, 16, 4, 128, 128, {}),
        (89, 16, 2, 256, 256, {}),
        (89, 1, 128, 576, 512, {}),
        (89, 16, 4, 128, 128, FLOAT8),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (80, 16, 4, 64, 64, {}),
                (80, 512, 4, 64, 64, {"sinks": True, "window": 128}),
                (80, 8, 4, 128, 128, {"tree": True}),
                (80, 16, 2, 256, 256, {}),
                (80, 512, 2, 256, 256, {"softcap": 50.0, "window": 4096}),
                (80, 1, 16, 576, 512, {}),
                (80, 512, 4, 128, 128, FLOAT32),
                (89, 1, 4, 64, 64, {}),
                (89, 16, 4, 64, 64, {}),
                (89, 512, 4, 64, 64, {"sinks": True, "window": 128}),
                (89, 8, 4, 128, 128, {"tree": True}),
                (89, 512, 4, 128, 128, {}),
                (89, 1, 2, 256, 256, {}),
                (89, 32, 2, 256, 256, {}),
                (89, 512, 2, 256, 256, {"softcap": 50.0, "window": 4096}),
                (89, 1, 16, 576, 512, {}),
                (89, 1, 4, 512, 512, {}),
                (89, 512, 4, 128, 128, FLOAT8),
                (89, 512, 2, 256, 256, FLOAT8),
                (89, 1, 4, 128, 128, FLOAT32),
                (89, 512, 4, 128, 128, FLOAT32),
                (89, 1, 2, 256, 256, FLOAT32),
            )
        ),
    ],
)
def test_fits_gpus_with_less_shared_memory(
    capability: int, queries: int, group: int, k_dim: int, v_dim: int, extra: dict[str, object]
) -> None:
    """A100, L4 and RTX 4090: as many programs beside each other as the table says, each with 1 KB of the system."""
    kv_heads = 1 if k_dim == 576 else 8
    built, config = build(queries, group, kv_heads, k_dim, v_dim, capability=capability, **extra)  # type: ignore[arg-type]
    limit = LIMITS[capability]
    assert built.shared <= limit
    assert config.per_processor * (built.shared + 1024) <= limit + 1024
    if "dtype" not in extra:  # float32 is for checking models
        assert built.spills <= 64, f"{built.registers} registers and {built.spills} bytes spilled"
    assert "cp.async.cg.shared.global" in built.ptx and "mma.sync" in built.ptx


def test_every_shape_has_a_configuration_or_is_said_not_to_fit() -> None:
    """What a step holds, by the sizes of its tiles, is no more than there is, whatever is asked for."""
    for limit in set(LIMITS.values()):
        for k_dim, v_dim in ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (512, 512), (576, 512)):
            for itemsize, kv_itemsize in ((2, 2), (2, 1), (4, 4)):
                if not fits(k_dim, itemsize, limit):
                    assert itemsize == 4 and k_dim > 256 and limit == SMALL
                    continue
                for rows in (1, 16, 17, 40, 64, 65, 4000):
                    config = choose(rows, k_dim, v_dim, itemsize, kv_itemsize, limit)
                    stored = config.block_n * (k_dim if k_dim == 576 else k_dim + v_dim) * kv_itemsize
                    assert config.per_processor * stored <= limit
                    assert config.block_m >= 16 and config.block_n >= 16


def test_two_decoding_programs_fit_beside_each_other() -> None:
    built, _ = build(1, 4, 8, 128, 128)
    assert 2 * built.shared <= HOPPER
    assert 2 * built.registers * 128 <= 65536
