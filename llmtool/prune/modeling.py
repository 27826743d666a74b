"""Layers with heads and widths of their own: where each family keeps them, and how a model gets them.

This file is copied into every pruned checkpoint, where `from_pretrained(..., trust_remote_code=True)` runs it.
So it imports torch and transformers alone, and says nothing of how the units were chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its layers (a path from the base model), and inside a layer its parts.

    attention: the module that is replaced when no head is left. streams: the modules whose input is the residual
    stream after attention and after the MLP; "" is the output of the layer. heads, kv_heads, width: fields of
    config.json; kv_heads is "" where every head has its own keys and values.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    out: str
    inner: tuple[str, ...]
    down: str
    streams: tuple[str, str]
    heads: str = "num_attention_heads"
    kv_heads: str = ""
    width: str = "intermediate_size"
    groups: str = ""  # attribute of `attention` that says how many query heads share a KV head


_BERT = Layout(
    "encoder.layer",
    "attention.self",
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    ("intermediate.dense",),
    "output.dense",
    ("attention.output.LayerNorm", "output.LayerNorm"),
)
_DISTILBERT = Layout(
    "transformer.layer",
    "attention",
    "attention.q_lin",
    "attention.k_lin",
    "attention.v_lin",
    "attention.out_lin",
    ("ffn.lin1",),
    "ffn.lin2",
    ("sa_layer_norm", "output_layer_norm"),
    heads="n_heads",
    width="hidden_dim",
)
_LLAMA = Layout(
    "layers",
    "self_attn",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    ("post_attention_layernorm", ""),
    kv_heads="num_key_value_heads",
    groups="num_key_value_groups",
)
_VIT = Layout(
    "layers",
    "attention",
    "attention.q_proj",
    "attention.k_proj",
    "attention.v_proj",
    "attention.o_proj",
    ("mlp.fc1",),
    "mlp.fc2",
    ("layernorm_after", ""),
)
LAYOUTS = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": _DISTILBERT,
    "vit": _VIT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


class NoAttention(nn.Module):
    """Attention without heads: nothing is mixed, and only a bias after the heads is left to add."""

    def __init__(self, path: str, out: nn.Linear) -> None:
        """path: of the output projection inside the module, "" where it is outside."""
        super().__init__()
        self.path = path
        if path:
            self.add_module(path, out)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        empty = hidden_states[..., :0]
        return (getattr(self, self.path)(empty) if self.path else empty), None


def field(config: Any, layer: int, name: str) -> int:
    """A field of a layer. Old releases of transformers keep per_layer_config as the plain table it is."""
    table = getattr(config, "per_layer_config", None) or {}
    if isinstance(table, dict):
        entry = {int(key): value for key, value in table.items()}.get(layer, {})
        return int(entry.get(name, getattr(config, name)))
    return int(getattr(table[layer], name))


def base_of(model: nn.Module) -> nn.Module:
    prefix = getattr(model, "base_model_prefix", "")
    return getattr(model, prefix) if prefix and hasattr(model, prefix) else model


def layers_of(model: nn.Module, layout: Layout) -> list[nn.Module]:
    layers: Any = base_of(model).get_submodule(layout.layers)
    return list(layers)


def head_dim(layer: nn.Module, layout: Layout) -> int:
    attention: Any = layer.get_submodule(layout.attention)
    return int(getattr(attention, "attention_head_size", None) or attention.head_dim)


def shrink(model: nn.Module, model_type: str, sizes: list[tuple[int, int, int]]) -> None:
    """Give each layer (query heads, KV heads, neurons): its Linears become smaller, their values undefined."""
    layout = LAYOUTS[model_type]
    for layer, own in zip(layers_of(model, layout), sizes, strict=True):
        shrink_layer(layer, layout, own)


def shrink_layer(layer: nn.Module, layout: Layout, sizes: tuple[int, int, int]) -> None:
    heads, kv_heads, width = sizes
    dim = head_dim(layer, layout) if heads else 0
    for name in (layout.query, layout.key, layout.value):
        if heads:
            _resize(layer, name, rows=(heads if name == layout.query else kv_heads) * dim)
    _resize(layer, layout.out, columns=heads * dim)
    for name in layout.inner:
        _resize(layer, name, rows=width)
    _resize(layer, layout.down, columns=width)
    set_heads(layer, layout, heads, kv_heads)


def set_heads(layer: nn.Module, layout: Layout, heads: int, kv_heads: int) -> None:
    """Tell the attention module what it now has; without heads another takes its place."""
    attention: Any = layer.get_submodule(layout.attention)
    if not heads:
        inside = layout.out.startswith(f"{layout.attention}.")
        out: Any = layer.get_submodule(layout.out)
        path = layout.out.removeprefix(f"{layout.attention}.") if inside else ""
        replace(layer, layout.attention, NoAttention(path, out))
        return
    for name, value in (("num_attention_heads", heads), ("n_heads", heads), ("num_heads", heads)):
        if hasattr(attention, name):
            setattr(attention, name, value)
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = heads * head_dim(layer, layout)
    if layout.groups:
        setattr(attention, layout.groups, heads // kv_heads)


def sizes_of(config: Any, model_type: str) -> list[tuple[int, int, int]]:
    """(query heads, KV heads, neurons) of each layer, as config.json has them."""
    layout, count = LAYOUTS[model_type], int(config.num_hidden_layers)
    table = []
    for i in range(count):
        heads = field(config, i, layout.heads)
        kv_heads = field(config, i, layout.kv_heads) if layout.kv_heads else heads
        table.append((heads, kv_heads, field(config, i, layout.width)))
    return table


class PrunedConfig:
    """Mixed into a configuration class of transformers: the model's own sizes may be read beside the layers'."""

    allow_global_per_layer_attribute_access = True


class Pruned(nn.Module):
    """Mixed into a model class of transformers: builds it as the family has it, then shrinks its layers."""

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        sizes = sizes_of(config, config.model_type)
        # The next class in line is transformers', and takes a configuration.
        super().__init__(config, *arguments, **options)
        shrink(self, config.model_type, sizes)


def _resize(layer: nn.Module, path: str, rows: int | None = None, columns: int | None = None) -> None:
    old: Any = layer.get_submodule(path)
    rows = old.out_features if rows is None else rows
    columns = old.in_features if columns is None else columns
    weight: torch.Tensor = old.weight
    if (rows, columns) != tuple(weight.shape):
        new = nn.utils.skip_init(
            nn.Linear, columns, rows, bias=old.bias is not None, device=weight.device, dtype=weight.dtype
        )
        replace(layer, path, new)


def replace(layer: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(layer.get_submodule(parent), name, new)
