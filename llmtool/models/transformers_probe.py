"""What a model of transformers asks of attention, and whether paged attention can give it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from llmtool_kernels.attention import AttentionBatch, KVLayout

from llmtool.core.memory.geometry import LayerCacheSpec, uniform_group
from llmtool.errors import ModelError
from llmtool.models.decoder import Decoder, KVContext
from llmtool.modelspec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, NormSpec
from llmtool.modelspec.config import token_ids

IMPLEMENTATION = "llmtool_paged"  # our attention's name among those of transformers
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# How far logits may be off, on average, in units of their own spread.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.03}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer asked of attention. num_heads: of queries. window: tokens a token sees, None for all."""

    layer: int
    num_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    scale: float
    window: int | None


@dataclass(frozen=True, slots=True)
class MeasuredSpec(ModelSpec):
    """A model of which only this is known: what its layers cache, and how many parameters it has."""

    calls: tuple[AttentionCall, ...] = ()
    parameters: int = 0

    def matrices(self) -> dict[str, tuple[int, int]]:
        return {"parameters": (self.parameters, 1)}

    def layer_cache_specs(self, dtype_bytes: int, state_bytes: int | None = None) -> list[LayerCacheSpec]:
        return [
            LayerCacheSpec(
                c.layer,
                c.num_kv_heads,
                c.k_dim,
                c.v_dim,
                dtype_bytes,
                "full" if c.window is None else "sliding_window",
                c.window,
            )
            for c in self.calls
        ]


def measure(model: Any) -> tuple[AttentionCall, ...]:
    """Run two tokens, and see what attention is asked for. Raises ModelError for what pages cannot serve."""
    config = model.config.get_text_config()
    unknown = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if unknown:
        raise refusal(model, f"it has layers of {', '.join(sorted(unknown))}")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refusal(model, "some of its layers read the keys and values of others")
    kinds = {str(table.get("rope_type")) for table in _rope_tables(config)}
    if "longrope" in kinds:
        raise refusal(model, "its longrope turns cached keys by the length of the batch")
    if not model._supports_attention_backend:
        raise refusal(model, "its code does not take transformers' attention interface")
    calls: list[AttentionCall] = []
    model.set_attn_implementation(IMPLEMENTATION)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    model.get_decoder()(
        input_ids=ids,
        position_ids=ids + torch.arange(2, device=model.device),
        use_cache=False,
        llmtool_kv=calls.append,
    )
    layers = [call.layer for call in calls]
    if layers != list(range(config.num_hidden_layers)):
        raise refusal(
            model,
            f"attention is called by layers {layers}, and each of its {config.num_hidden_layers} layers must call "
            "it once",
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "layer_types", None) is None and all(c.window is None for c in calls):
        raise refusal(model, f"its sliding window of {window} is hidden in its masks")
    return tuple(calls)


def measured_spec(model: Any, calls: tuple[AttentionCall, ...]) -> MeasuredSpec:
    config, generation = model.config.get_text_config(), model.generation_config
    hidden, widest = config.hidden_size, max(calls, key=lambda c: c.num_heads * c.k_dim)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    max_positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(max_positions, int):
        raise refusal(
            model, "its config.json does not say how long a sequence may be (max_position_embeddings)"
        )
    return MeasuredSpec(
        architecture=type(model).__name__,
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        max_positions=max_positions,
        attention=AttentionSpec(widest.num_heads, widest.num_kv_heads, widest.k_dim, widest.scale),
        norms=NormSpec(getattr(config, "rms_norm_eps", 1e-6)),
        layers=tuple(LayerSpec(c.window, None, DenseSpec(inner)) for c in calls),
        eos_ids=token_ids(generation.eos_token_id, config.eos_token_id),
        bos_id=next(iter(token_ids(config.bos_token_id)), None),
        pad_id=next(iter(token_ids(config.pad_token_id)), None),
        calls=calls,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def compare(model: Any, decoder: Decoder) -> None:
    """Two sequences over pages, one of them in two chunks, against the model's own attention."""
    generator = torch.Generator().manual_seed(0)
    vocab, longest = decoder.spec.vocab_size, decoder.spec.max_positions
    long, short = (
        torch.randint(0, vocab, (min(n, longest),), generator=generator).to(decoder.device) for n in (21, 5)
    )
    model.set_attn_implementation("eager")
    expected = torch.cat(
        [model(input_ids=ids[None], use_cache=False).logits[0] for ids in (long, short)]
    ).float()
    model.set_attn_implementation(IMPLEMENTATION)
    cut = len(long) - 8
    kv, first, second = _scratch_memory(decoder, [cut, len(long)], len(short))
    at = torch.arange(longest, device=decoder.device)
    one = decoder.logits(decoder.forward(long[:cut], at[:cut], kv(first)))
    both_ids, both_at = torch.cat((long[cut:], short)), torch.cat((at[cut : len(long)], at[: len(short)]))
    two = decoder.logits(decoder.forward(both_ids, both_at, kv(second)))
    error = (torch.cat((one, two)) - expected).abs().mean() / expected.std()
    if not error <= _TOLERANCE[decoder.dtype]:
        raise refusal(
            model,
            f"over pages its logits differ by {error.item():.1%} of their spread from those of its own attention, "
            "so it must look at more than its queries, keys and values",
        )


def _scratch_memory(
    decoder: Decoder, lengths: list[int], other: int
) -> tuple[Callable[[AttentionBatch], KVContext], AttentionBatch, AttentionBatch]:
    """Pages for a few tokens; batches of a step with a sequence's first chunk, and with its rest and another."""
    group = uniform_group(decoder.spec.layer_cache_specs(decoder.dtype.itemsize), tokens_per_page=4)
    tables = [[i * group.page_units for i in range(6)], [i * group.page_units for i in range(6, 8)]]
    arena = torch.zeros(8 * group.page_bytes, dtype=torch.uint8, device=decoder.device)
    layouts = {
        spec.layer: KVLayout(offset, 4, spec.num_kv_heads, spec.k_head_dim, spec.v_head_dim)
        for spec, offset in zip(group.layers, group.layer_offsets, strict=True)
    }
    cut, total = lengths
    first = AttentionBatch.build([cut], [cut], tables[:1], 4, decoder.device)
    second = AttentionBatch.build([total - cut, other], [total, other], tables, 4, decoder.device)
    return (
        lambda batch: KVContext(arena, {i: (layout, 0) for i, layout in layouts.items()}, (batch,)),
        first,
        second,
    )


def _rope_tables(config: Any) -> list[dict[str, Any]]:
    table = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in table.values() if isinstance(value, dict)]
    return nested or [table]


def refusal(model: Any, why: str) -> ModelError:
    return ModelError(
        f"{type(model).__name__} does not run here: it has no native family, and through transformers it cannot: "
        f"{why}."
    )
