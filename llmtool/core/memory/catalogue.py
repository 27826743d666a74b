"""What well-known models cache, in bf16: bytes per token and layer, or bytes of a state. From their published
config.json; those in UNCHECKED are from general knowledge and not compared with a published file yet."""

from __future__ import annotations

from llmtool.core.memory.geometry import LayerCacheSpec
from llmtool.core.memory.model import ModelGeometry, build, rows, states
from llmtool.errors import UsageError


def _full(count: int, row: int) -> list[LayerCacheSpec]:
    return rows("full", count, row)


def _window(count: int, row: int, window: int) -> list[LayerCacheSpec]:
    return rows("sliding_window", count, row, window)


CATALOGUE: dict[str, ModelGeometry] = {
    geometry.name: geometry
    for geometry in (
        build("llama-2-7b", _full(32, 16384)),
        build("llama-3.1-8b", _full(32, 4096)),
        build("llama-3.1-70b", _full(80, 4096)),
        build("llama-3.2-1b", _full(16, 2048)),
        build("llama-3.2-11b-vision", _full(32, 4096), rows("cross_attention", 8, 4096)),
        build("mistral-7b-v0.1", _window(32, 4096, 4096)),
        build("ministral-8b", _full(9, 4096), _window(27, 4096, 32768)),
        build("mixtral-8x7b", _full(32, 4096)),
        build("gemma-2-9b", _full(21, 8192), _window(21, 8192, 4096)),
        build("gemma-2-27b", _full(23, 8192), _window(23, 8192, 4096)),
        build("gemma-3-4b", _full(5, 4096), _window(29, 4096, 1024)),
        build("gemma-3-12b", _full(8, 8192), _window(40, 8192, 1024)),
        build("gemma-3-27b", _full(10, 8192), _window(52, 8192, 1024)),
        # 35 layers, every fifth full; the last 15 (3 full, 12 window) read KV of layers before them.
        build("gemma-3n-e4b", _full(4, 2048), _window(16, 2048, 512), rows("shared", 15, 2048)),
        build("qwen2.5-7b", _full(28, 2048)),
        build("qwen3-8b", _full(36, 4096)),
        build("qwen3-30b-a3b", _full(48, 2048)),
        build("qwen3-next-80b-a3b", _full(12, 2048), states("recurrent", 36, 2_146_304)),
        build("deepseek-v3", rows("mla", 61, 1152)),
        build("gpt-oss-20b", _full(12, 2048), _window(12, 2048, 128)),
        build("gpt-oss-120b", _full(18, 2048), _window(18, 2048, 128)),
        build("jamba-1.5-mini", _full(4, 4096), states("recurrent", 28, 573_440)),
        build("falcon-h1-1.5b", _full(24, 1024), states("recurrent", 24, 3_167_232)),
        build("nemotron-h-8b", _full(4, 4096), states("recurrent", 24, 4_255_744)),
        build("lfm2-1.2b", _full(6, 2048), states("short_conv", 10, 8192)),
        build("llama-4-scout", _full(12, 4096), rows("chunked", 36, 4096, 8192)),
        build("phi-3-mini", _window(32, 12288, 2047)),
        build("phi-4", _full(40, 5120)),
        build("smollm2-135m", _full(30, 768)),
        build("smollm3-3b", _full(36, 2048)),
        build("kimi-linear-48b", rows("mla", 7, 1152), states("recurrent", 20, 2_170_880)),
        build("mimo-v2-flash", _full(9, 2560), _window(39, 5120, 128)),
    )
}

UNCHECKED = frozenset(
    (
        *("llama-3.2-1b", "ministral-8b", "gemma-2-9b", "gemma-2-27b", "qwen2.5-7b", "qwen3-8b"),
        *("qwen3-30b-a3b", "phi-3-mini", "phi-4", "kimi-linear-48b"),
    )
)


def geometry_of(name: str) -> ModelGeometry:
    """A model of the catalogue by its name. Raises UsageError for one that is not there."""
    if name not in CATALOGUE:
        raise UsageError(f"{name!r} is not in the catalogue.", f"It has: {', '.join(sorted(CATALOGUE))}.")
    return CATALOGUE[name]
