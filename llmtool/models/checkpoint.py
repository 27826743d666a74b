"""Which tensor of a Hugging Face checkpoint fills which part of the fused weights, and how."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtool.errors import ModelError
from llmtool.models.weights import (
    AttentionWeights,
    DecoderWeights,
    DenseWeights,
    ExpertWeights,
    LatentAttentionWeights,
    LayerWeights,
    Mamba2Weights,
    MixerWeights,
    ShortConvWeights,
    as_tensor,
)
from llmtool.modelspec import AttentionSpec, LatentSpec, Mamba2Spec, MixerSpec, ModelSpec

Convert = Callable[[Tensor], Tensor]
Cut = tuple[
    tuple[int, tuple[range, ...]], ...
]  # dimensions of a tensor, and the ranges of each that are read
# Buffers that old exporters saved beside the weights; rotary frequencies are computed here.
_BUFFERS = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.masked_bias")
_IMAGE_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")


@dataclass(frozen=True, slots=True)
class Slot:
    """A view of the weights that a tensor fills, or views of one shape that lie behind each other in the file.

    shape: of the tensor in the file, where it is not the views'; convert: makes a view from it, or from its part.
    cut: what of the tensor is read, where it is not all; shape is then that part's.
    """

    target: Tensor | Sequence[Tensor]
    convert: Convert | None = None
    shape: tuple[int, ...] | None = None
    cut: Cut = ()

    @property
    def file_shape(self) -> tuple[int, ...]:
        if self.shape is not None:
            return self.shape
        target = self.target
        return tuple(target.shape) if isinstance(target, Tensor) else (len(target), *target[0].shape)

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in self._views)

    def fill(self, tensor: Tensor) -> None:
        parts = [tensor] if isinstance(self.target, Tensor) else tensor
        for view, part in zip(self._views, parts, strict=True):
            view.copy_(part if self.convert is None else self.convert(part))

    @property
    def _views(self) -> Sequence[Tensor]:
        return [self.target] if isinstance(self.target, Tensor) else self.target


def cut_shape(shape: Sequence[int], cut: Cut) -> tuple[int, ...]:
    """Of what a cut leaves of a tensor."""
    out = list(shape)
    for dim, ranges in cut:
        assert all(0 <= r.start <= r.stop <= shape[dim] for r in ranges), (shape, cut)
        out[dim] = sum(len(r) for r in ranges)
    return tuple(out)


def apply_cut(tensor: Tensor, cut: Cut) -> Tensor:
    for dim, ranges in cut:
        parts = [tensor.narrow(dim, r.start, len(r)) for r in ranges]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return tensor


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a family calls the parts of its mixtures."""

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"


_EXPERT_NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ExpertNames(shared="shared_expert"),
}


# LFM2 and Falcon-H1 have names of their own for what others call alike.
_RENAMED = (
    ("model.embedding_norm.", "model.norm."),
    ("model.final_layernorm.", "model.norm."),
    (".operator_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".pre_ff_layernorm.", ".post_attention_layernorm."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
    (".feed_forward.", ".mlp."),
    (".self_attn.out_proj.", ".self_attn.o_proj."),
    (".self_attn.q_layernorm.", ".self_attn.q_norm."),
    (".self_attn.k_layernorm.", ".self_attn.k_norm."),
)


def canonical_name(name: str) -> str:
    """The name that a model of text only gives this tensor."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    name = name.removeprefix("language_model.")
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


def is_ignored(name: str, spec: ModelSpec) -> bool:
    """Whether a tensor without a slot may be left out: it is no weight of the decoder."""
    if name == "lm_head.weight":
        return spec.tied_embeddings  # some exporters write the tied one too
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer is not None and int(layer[1]) < spec.num_layers and name.startswith("self_attn.", layer.end()):
        own = spec.attention_of(spec.layers[int(layer[1])])
        if not own.num_heads:
            return True
    extra = layer is not None and int(layer[1]) >= spec.num_layers  # DeepSeek-V3's multi-token prediction
    return bool(_BUFFERS.fullmatch(name) or _IMAGE_PARTS.fullmatch(name)) or (
        extra and spec.attention.latent is not None
    )


def slots(spec: ModelSpec, weights: DecoderWeights) -> dict[str, Slot]:
    """Hugging Face's tensor names -> what they fill. Every byte of the weights is in exactly one slot."""
    norm = _norm_convert(spec)
    table = {
        "model.embed_tokens.weight": Slot(as_tensor(weights.embedding)),
        "model.norm.weight": Slot(weights.norm, norm),
    }
    if not spec.tied_embeddings:
        table["lm_head.weight"] = Slot(as_tensor(weights.lm_head))
    for i, layer in enumerate(weights.layers):
        parts = {**_norms(spec, layer), **_mlp(spec, layer.mlp)}
        heads = spec.attention_of(spec.layers[i])
        if isinstance(layer.attention, AttentionWeights):
            # Of an attention without heads a file may hold empty matrices or none.
            parts |= _attention(spec, heads, layer.attention) if heads.num_heads else {}
        else:
            assert spec.attention.latent is not None
            parts |= _latent(spec.attention, spec.attention.latent, layer.attention)
        if layer.mixer is not None:
            parts |= _mixer(spec.layers[i].mixer, layer.mixer)
        for ending, factor in spec.folded:
            if ending in parts and factor != 1.0:
                assert parts[ending].convert is None
                parts[ending] = Slot(parts[ending].target, _times(factor))
        table |= {f"model.layers.{i}.{name}": slot for name, slot in parts.items()}
    return table


def _times(factor: float | Tensor) -> Convert:
    return lambda t: t.float() * factor


def _mixer(mixer: MixerSpec | None, w: MixerWeights) -> dict[str, Slot]:
    block = "conv" if isinstance(w, ShortConvWeights) else "mamba"
    conv = "conv" if isinstance(w, ShortConvWeights) else "conv1d"
    table = _present(
        {
            "in_proj.weight": as_tensor(w.into),
            "in_proj.bias": w.into_bias,
            "out_proj.weight": as_tensor(w.out),
            "out_proj.bias": w.out_bias,
            f"{conv}.bias": w.conv_bias,
        }
    )
    channels, kernel = w.conv.shape
    table[f"{conv}.weight"] = Slot(w.conv, lambda t: t.squeeze(1), (channels, 1, kernel))
    if isinstance(w, Mamba2Weights):
        assert isinstance(mixer, Mamba2Spec)
        table |= _present({"dt_bias": w.steps, "A_log": w.decay, "D": w.skip, "norm.weight": w.norm})
        if set(mixer.scales) != {1.0}:
            rows = torch.cat([torch.full((n,), s) for n, s in zip(mixer.parts, mixer.scales, strict=True)])
            table["in_proj.weight"] = Slot(as_tensor(w.into), _times(rows[:, None]))
            if (
                w.into_bias is not None
            ):  # what comes in is scaled before the bias joins it, what goes out after
                raise ModelError("A Mamba-2 layer has both multipliers and a bias, which does not run here.")
    return {f"{block}.{name}": slot for name, slot in table.items()}


def _norm_convert(spec: ModelSpec) -> Convert | None:
    offset = spec.norms.offset
    return (lambda t: t.float() + offset) if offset else None


def _norms(spec: ModelSpec, layer: LayerWeights) -> dict[str, Slot]:
    """input, post_attention, pre_feedforward, post_feedforward: what these mean depends on where norms stand."""
    before, after = spec.norms.before, spec.norms.after
    named = {
        "input_layernorm": layer.attention_norm,
        "post_attention_layernorm": layer.attention_out_norm if after else layer.mlp_norm,
        "pre_feedforward_layernorm": layer.mlp_norm if before and after else None,
        "post_feedforward_layernorm": layer.mlp_out_norm,
    }
    return {f"{name}.weight": Slot(t, _norm_convert(spec)) for name, t in named.items() if t is not None}


def _attention(spec: ModelSpec, a: AttentionSpec, w: AttentionWeights) -> dict[str, Slot]:
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    table: dict[str, Slot] = {}
    for kind, tensor in (("weight", as_tensor(w.qkv)), ("bias", w.qkv_bias)):
        if tensor is not None and spec.family == "phi3":
            table[f"qkv_proj.{kind}"] = Slot(tensor)
        elif tensor is not None:
            parts = zip(("q_proj", "k_proj", "v_proj"), tensor.split((q, kv, kv)), strict=True)
            table |= {f"{name}.{kind}": Slot(part) for name, part in parts}
    table |= _present({"o_proj.weight": as_tensor(w.o), "o_proj.bias": w.o_bias, "sinks": w.sinks})
    norms = _present({"q_norm.weight": w.q_norm, "k_norm.weight": w.k_norm})
    table |= {name: Slot(slot.target, _norm_convert(spec)) for name, slot in norms.items()}
    return {f"self_attn.{name}": slot for name, slot in table.items()}


def _latent(a: AttentionSpec, latent: LatentSpec, w: LatentAttentionWeights) -> dict[str, Slot]:
    unpaired_q = unpaired_kv = None
    if latent.interleaved:
        unpaired_q = _unpair(a.num_heads, latent.nope_dim, latent.rope_dim)
        unpaired_kv = _unpair(1, latent.kv_rank, latent.rope_dim)
    table = _present(
        {
            "q_a_proj.weight": None if w.q_down is None else as_tensor(w.q_down),
            "q_a_proj.bias": w.q_down_bias,
            "q_a_layernorm.weight": w.q_norm,
            "kv_a_layernorm.weight": w.kv_norm,
            "kv_b_proj.weight": w.kv_up.flatten(0, 1),
            "o_proj.weight": as_tensor(w.o),
            "o_proj.bias": w.o_bias,
        }
    )
    table["q_proj.weight" if w.q_down is None else "q_b_proj.weight"] = Slot(as_tensor(w.q), unpaired_q)
    table["kv_a_proj_with_mqa.weight"] = Slot(as_tensor(w.kv_down), unpaired_kv)
    if w.kv_down_bias is not None:
        table["kv_a_proj_with_mqa.bias"] = Slot(w.kv_down_bias, unpaired_kv)
    return {f"self_attn.{name}": slot for name, slot in table.items()}


def _mlp(spec: ModelSpec, w: DenseWeights | ExpertWeights) -> dict[str, Slot]:
    if isinstance(w, DenseWeights):
        return _dense(w, "mlp", ExpertNames(), fused=spec.family == "phi3")
    if spec.family == "gpt_oss":
        return _gpt_oss(w)
    names = _EXPERT_NAMES.get(spec.family, ExpertNames())
    table = _present(
        {
            f"{names.block}.gate.weight": w.router,
            f"{names.block}.gate.e_score_correction_bias": w.correction,
            f"{names.block}.shared_expert_gate.weight": w.shared_gate,
        }
    )
    for e in range(len(w.gate_up)):
        table |= _dense(DenseWeights(w.gate_up[e], w.down[e]), f"{names.block}.experts.{e}", names)
    if w.shared is not None:
        table |= _dense(w.shared, f"{names.block}.{names.shared}", ExpertNames())
    return table


def _dense(w: DenseWeights, prefix: str, names: ExpertNames, fused: bool = False) -> dict[str, Slot]:
    table = _present(
        {f"{prefix}.{names.down}.weight": as_tensor(w.down), f"{prefix}.{names.down}.bias": w.down_bias}
    )
    for kind, tensor in (("weight", as_tensor(w.gate_up)), ("bias", w.gate_up_bias)):
        if tensor is not None and fused:
            table[f"{prefix}.gate_up_proj.{kind}"] = Slot(tensor)
        elif tensor is not None:
            gate, up = tensor.chunk(2)
            table[f"{prefix}.{names.gate}.{kind}"] = Slot(gate)
            table[f"{prefix}.{names.up}.{kind}"] = Slot(up)
    return table


def _gpt_oss(w: ExpertWeights) -> dict[str, Slot]:
    """All experts in one tensor, [in, out], the columns of gate and up alternating."""
    gate_up, down = ([as_tensor(expert) for expert in matrices] for matrices in (w.gate_up, w.down))
    experts, (rows, hidden) = len(gate_up), gate_up[0].shape
    assert w.router_bias is not None and w.gate_up_bias is not None and w.down_bias is not None
    return {
        "mlp.router.weight": Slot(w.router),
        "mlp.router.bias": Slot(w.router_bias),
        "mlp.experts.gate_up_proj": Slot(
            gate_up,
            lambda t: torch.cat((t[:, ::2], t[:, 1::2]), 1).T,
            (experts, hidden, rows),
        ),
        "mlp.experts.gate_up_proj_bias": Slot(
            w.gate_up_bias, lambda t: torch.cat((t[:, ::2], t[:, 1::2]), -1)
        ),
        "mlp.experts.down_proj": Slot(down, lambda t: t.T, (experts, rows // 2, hidden)),
        "mlp.experts.down_proj_bias": Slot(w.down_bias),
    }


def _unpair(heads: int, plain: int, rotary: int) -> Convert:
    """Rows of each head: `plain` ones stay, rotary ones go from pairs (0, 1), (2, 3), ... to halves."""
    order = [*range(plain), *range(plain, plain + rotary, 2), *range(plain + 1, plain + rotary, 2)]
    return lambda rows: rows.unflatten(0, (heads, -1))[:, order].flatten(0, 1)


def _present(table: dict[str, Tensor | None]) -> dict[str, Slot]:
    return {name: Slot(tensor) for name, tensor in table.items() if tensor is not None}
