"""Which part of which tensor of a checkpoint fills a rank's weights.

A rank's slots are those of its own ModelSpec (llmtool/models/checkpoint.py), under the checkpoint's numbers of
layers and experts; a cut says which ranges of a tensor's dimensions are read for one.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from llmtool.models.checkpoint import Cut, Slot, slots
from llmtool.models.weights import DecoderWeights, ExpertWeights, allocate, as_tensor
from llmtool.modelspec import DenseSpec, LayerSpec, Mamba2Spec, ModelSpec, MoESpec, ShortConvSpec
from llmtool.parallel.shard import LayerShard, Shard

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def whole_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's checkpoint, by its canonical name."""
    everything = allocate(spec, torch.bfloat16, torch.device("meta"))
    return {name: slot.file_shape for name, slot in slots(spec, everything).items()}


def shard_slots(shard: Shard, weights: DecoderWeights) -> dict[str, Slot]:
    """Canonical names of the whole model's tensors -> what parts of them fill here."""
    table: dict[str, Slot] = {}
    for name, slot in slots(shard.spec, weights).items():
        if name in (EMBEDDING, HEAD):
            continue
        layer = _LAYER.fullmatch(name)
        if layer is None:
            if shard.last:  # the norm of the last stage
                table[name] = slot
            continue
        i, rest = int(layer[1]), layer[2]
        number, part = shard.layers[i], shard.parts[i]
        cut = _cut(shard.whole, shard.whole.layers[number], part, rest)
        expert = _EXPERT.fullmatch(rest)
        if expert is not None:
            rest = f"{expert[1]}.{part.experts[int(expert[2])]}.{expert[3]}"
        table[f"model.layers.{number}.{rest}"] = replace(slot, cut=cut)
    if shard.first:
        table[EMBEDDING] = Slot(as_tensor(weights.embedding), cut=_rows(shard.embedding))
    if shard.last and not shard.spec.tied_embeddings:
        name = EMBEDDING if shard.whole.tied_embeddings else HEAD
        assert name not in table, "the first stage is the last: a tied head is the embedding"
        table[name] = Slot(as_tensor(weights.lm_head), cut=_rows(shard.head))
    return table


def drop_added_twice(shard: Shard, weights: DecoderWeights) -> None:
    """Forget the biases of what the stage's ranks sum, on all but one of them."""
    for layer in weights.layers:
        if shard.place.expert_part if isinstance(layer.mlp, ExpertWeights) else not shard.leads:
            layer.mlp.down_bias = None
        if not shard.leads:
            layer.attention.o_bias = None
            if layer.mixer is not None:
                layer.mixer.out_bias = None


def _rows(rows: range) -> Cut:
    return ((0, (rows,)),)


def _columns(columns: range) -> Cut:
    return ((1, (columns,)),)


def _scaled(part: range, by: int, offset: int = 0) -> range:
    """Of heads or groups, the rows that are theirs."""
    return range(offset + part.start * by, offset + part.stop * by)


def _cut(whole: ModelSpec, layer: LayerSpec, part: LayerShard, name: str) -> Cut:
    """Of a layer's tensor, `name` without the layer's number."""
    block, _, rest = name.partition(".")
    if block == "self_attn":
        return _attention(whole, layer, part, rest)
    if block in ("conv", "mamba"):
        return _mixer(layer, part, rest)
    if block in ("mlp", "block_sparse_moe"):
        return _mlp(whole, layer, part, rest)
    return ()


def _attention(whole: ModelSpec, layer: LayerSpec, part: LayerShard, name: str) -> Cut:
    a = whole.attention_of(layer)
    matrix, _, kind = name.rpartition(".")
    if a.latent is not None:
        latent = a.latent
        by = {
            "q_proj": latent.nope_dim + latent.rope_dim,
            "q_b_proj": latent.nope_dim + latent.rope_dim,
            "kv_b_proj": latent.nope_dim + latent.v_dim,
        }
        if matrix in by:
            return _rows(_scaled(part.heads, by[matrix]))
        if matrix == "o_proj" and kind == "weight":
            return _columns(_scaled(part.heads, latent.v_dim))
        return ()
    dim = a.head_dim
    if name == "sinks":
        return _rows(part.heads)
    if matrix == "q_proj" or (matrix == "q_norm" and a.qk_norm == "all"):
        return _rows(_scaled(part.heads, dim))
    if matrix in ("k_proj", "v_proj") or (matrix == "k_norm" and a.qk_norm == "all"):
        return _rows(_scaled(part.kv_heads, dim))
    if matrix == "qkv_proj":
        q, kv = a.num_heads * dim, a.num_kv_heads * dim
        keys = _scaled(part.kv_heads, dim, q)
        return ((0, (_scaled(part.heads, dim), keys, _scaled(part.kv_heads, dim, q + kv))),)
    if matrix == "o_proj" and kind == "weight":
        return _columns(_scaled(part.heads, dim))
    return ()


def _mlp(whole: ModelSpec, layer: LayerSpec, part: LayerShard, name: str) -> Cut:
    matrix, _, kind = name.rpartition(".")
    matrix = matrix.rpartition(".")[2]
    if isinstance(layer.mlp, DenseSpec):
        if matrix == "gate_up_proj":
            up = _scaled(part.neurons, 1, layer.mlp.intermediate_size)
            return ((0, (part.neurons, up)),)
        return _projection(matrix, kind, part.neurons)
    assert isinstance(layer.mlp, MoESpec)
    if whole.family == "gpt_oss":
        return _gpt_oss(part, name)
    if ".experts." in f".{name}":
        return _projection(matrix, kind, part.neurons)
    if ".shared_expert" in f".{name}" and matrix != "shared_expert_gate":
        return _projection(matrix, kind, part.shared)
    return ()


def _projection(matrix: str, kind: str, neurons: range) -> Cut:
    if matrix in ("gate_proj", "up_proj", "w1", "w3"):
        return _rows(neurons)
    if matrix in ("down_proj", "w2") and kind == "weight":
        return _columns(neurons)
    return ()


def _gpt_oss(part: LayerShard, name: str) -> Cut:
    """All experts in one tensor; columns of gate and up alternate."""
    mine: tuple[int, tuple[range, ...]] = (0, (part.experts,))
    both = _scaled(part.neurons, 2)
    return {
        "experts.gate_up_proj": (mine, (2, (both,))),
        "experts.gate_up_proj_bias": (mine, (1, (both,))),
        "experts.down_proj": (mine, (1, (part.neurons,))),
        "experts.down_proj_bias": (mine,),
    }.get(name, ())


def _mixer(layer: LayerSpec, part: LayerShard, name: str) -> Cut:
    mixer, heads = layer.mixer, part.mixer_heads
    matrix, _, kind = name.rpartition(".")
    if isinstance(mixer, ShortConvSpec):
        if matrix == "in_proj":
            return ((0, tuple(_scaled(heads, 1, i * mixer.channels) for i in range(3))),)
        if matrix == "out_proj":
            return _columns(heads) if kind == "weight" else ()
        return _rows(heads)
    assert isinstance(mixer, Mamba2Spec)
    inner, group = mixer.inner, mixer.num_groups * mixer.state_dim
    rows = _scaled(heads, mixer.head_dim)
    shared = [_scaled(part.mixer_groups, mixer.state_dim, i * group) for i in range(2)]
    if matrix == "in_proj":
        ranges = (
            rows,
            _scaled(rows, 1, inner),
            *(_scaled(r, 1, 2 * inner) for r in shared),
            _scaled(heads, 1, 2 * inner + 2 * group),
        )
        return ((0, ranges),)
    if matrix == "conv1d":
        return ((0, (rows, *(_scaled(r, 1, inner) for r in shared))),)
    if matrix == "out_proj":
        return _columns(rows) if kind == "weight" else ()
    return _rows(rows if matrix == "norm" else heads)  # else dt_bias, A_log, D
