"""Architectures that are planned for though they do not run natively: gated delta nets, Mamba, short convolutions
beside attention, chunks, cross-attention, shared KV, and mixtures without a family of their own. Of models that
read images or sound too, the text part.

Sources: the configuration classes of transformers 5; parameter counts agree with its models' within 0.5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from llmtool.errors import ModelError
from llmtool.modelspec.config import Config
from llmtool.sim.ir import Attention, Block, Dense, ModelIR, MoE, Recurrent, native_dtype

_Reader = Callable[[Config, int], list[Block]]


def is_hybrid(config: Mapping[str, Any]) -> bool:
    return _architecture(config) in _READERS


def read_hybrid(config: Mapping[str, Any], name: str) -> ModelIR:
    """Raises ModelError for a field that is missing or makes no sense."""
    text = config.get("text_config") or config
    c = Config(text, {})
    blocks = _READERS[_architecture(config)](c, c.count("num_hidden_layers"))
    return ModelIR(
        name=name,
        hidden=c.count("hidden_size"),
        vocab=c.count("vocab_size"),
        blocks=tuple(blocks),
        tied=c.flag("tie_word_embeddings"),
        max_positions=c.count("max_position_embeddings", c.get("model_max_length")),
        native=native_dtype(config),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else ""


def _attention(c: Config, gated: bool = False) -> Attention:
    heads = c.count("num_attention_heads")
    return Attention(
        heads,
        c.count("num_key_value_heads", heads),
        c.count("head_dim", c.count("hidden_size") // heads),
        gated=gated,
    )


def _delta_nets(c: Config, layers: int) -> list[Block]:
    """Qwen3-Next, Qwen3.5: three gated delta nets, then one gated attention."""
    every = c.count("full_attention_interval", 4)
    attention = _attention(c, gated=True)
    k, v = c.count("linear_num_key_heads"), c.count("linear_num_value_heads")
    k_dim, v_dim = c.count("linear_key_head_dim"), c.count("linear_value_head_dim")
    width, out = 2 * k * k_dim + v * v_dim, v * v_dim
    state = v * k_dim * v_dim
    net = Recurrent(width + out + 2 * v, out, v, state, width * (c.count("linear_conv_kernel_dim", 4) - 1))
    if c.get("num_experts"):
        mlp: Dense | MoE = MoE(
            c.count("num_experts"),
            c.count("num_experts_per_tok"),
            c.count("moe_intermediate_size"),
            c.count("shared_expert_intermediate_size") if c.get("shared_expert_intermediate_size") else 0,
        )
    else:
        mlp = Dense(c.count("intermediate_size"))
    return [Block(attention if (i + 1) % every == 0 else net, mlp) for i in range(layers)]


def _plain_mixture(c: Config, layers: int) -> list[Block]:
    """MiniMax-M2: full attention and experts in every layer."""
    moe = MoE(c.count("num_local_experts"), c.count("num_experts_per_tok"), c.count("intermediate_size"))
    return [Block(_attention(c), moe)] * layers


def _jamba(c: Config, layers: int) -> list[Block]:
    hidden = c.count("hidden_size")
    inner = c.count("mamba_expand", 2) * hidden
    rank = c.count("mamba_dt_rank", -(-hidden // 16))
    state, conv = c.count("mamba_d_state", 16), c.count("mamba_d_conv", 4)
    # The second projection, inner -> rank + 2 states, and dt's are counted as columns of the input's.
    columns = 2 * inner + (inner * (rank + 2 * state) + rank * inner) // hidden
    mamba = Recurrent(columns, inner, 1, inner * state, inner * (conv - 1))
    moe = MoE(c.count("num_experts"), c.count("num_experts_per_tok"), c.count("intermediate_size"))
    dense = Dense(c.count("intermediate_size"))
    a_every, a_first = c.count("attn_layer_period"), int(c.number("attn_layer_offset"))
    e_every, e_first = c.count("expert_layer_period"), int(c.number("expert_layer_offset"))
    return [
        Block(_attention(c) if i % a_every == a_first else mamba, moe if i % e_every == e_first else dense)
        for i in range(layers)
    ]


def _short_convolutions(c: Config, layers: int) -> list[Block]:
    """LFM2: a gated convolution over three tokens in most layers."""
    hidden = c.count("hidden_size")
    full = set(c.integers("full_attn_idxs") or range(layers))
    types = c.get("layer_types") or ["full_attention" if i in full else "conv" for i in range(layers)]
    conv = Recurrent(3 * hidden, hidden, 1, 0, hidden * (c.count("conv_L_cache", 3) - 1))
    inner = c.count("intermediate_size")
    if c.flag("block_auto_adjust_ff_dim", True):
        step = c.count("block_multiple_of", 256)
        inner = int(c.number("block_ffn_dim_multiplier", 1.0) * (2 * inner // 3))
        inner = step * (-(-inner // step))
    mixers: dict[str, Attention | Recurrent] = {"full_attention": _attention(c), "conv": conv}
    return [Block(mixers[kind], Dense(inner)) for kind in _types(types, layers, mixers)]


def _types(types: Any, layers: int, known: Collection[str]) -> list[str]:
    """Each layer's type. Raises ModelError for a list of another length, or a type that is not known."""
    if not isinstance(types, list | tuple | str) or len(types) != layers:
        raise ModelError(f"config.json: the layers' types must be a list of {layers}, and are {types!r}.")
    for i, kind in enumerate(types):
        if kind not in known:
            raise ModelError(
                f"config.json: layer {i} has the type {kind!r}, and what such a layer caches is not known.",
                f"Known types of this architecture: {', '.join(sorted(known))}.",
            )
    return list(types)


def _mamba2(hidden: int, inner: int, heads: int, groups: int, state: int, kernel: int) -> Recurrent:
    """inner: heads x head dimension. The convolution runs over the inputs and both state projections."""
    width = inner + 2 * groups * state
    return Recurrent(inner + width + heads, inner, heads, inner * state, width * (kernel - 1))


def _falcon_h1(c: Config, layers: int) -> list[Block]:
    """Attention and Mamba2 read the same input in every layer, and their outputs are added."""
    hidden = c.count("hidden_size")
    inner = c.count("mamba_d_ssm", c.count("mamba_expand", 2) * hidden)
    groups, state, kernel = c.count("mamba_n_groups", 1), c.count("mamba_d_state"), c.count("mamba_d_conv", 4)
    mamba = _mamba2(hidden, inner, c.count("mamba_n_heads"), groups, state, kernel)
    return [Block(_attention(c), Dense(c.count("intermediate_size")), beside=mamba)] * layers


_NEMOTRON = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def _nemotron_h(c: Config, layers: int) -> list[Block]:
    """One thing a layer: Mamba2, attention, or an MLP of two matrices."""
    pattern = c.get("hybrid_override_pattern")
    if pattern is not None:
        types = [_NEMOTRON[mark] for mark in _types(pattern, layers, _NEMOTRON)]
    else:
        types = ["linear_attention" if t == "mamba" else t for t in c.get("layers_block_type") or ()]
        types = ["full_attention" if t == "attention" else t for t in types]
    hidden, heads = c.count("hidden_size"), c.count("mamba_num_heads")
    inner, groups = heads * c.count("mamba_head_dim"), c.count("n_groups", 8)
    head_dim = c.count("head_dim", c.count("attention_head_dim", 128))
    attention = Attention(c.count("num_attention_heads"), c.count("num_key_value_heads"), head_dim)
    known = {
        "linear_attention": Block(
            _mamba2(hidden, inner, heads, groups, c.count("ssm_state_size"), c.count("conv_kernel", 4)), None
        ),
        "full_attention": Block(attention, None),
        "mlp": Block(None, Dense(c.count("intermediate_size"), matrices=2)),
    }
    return [known[kind] for kind in _types(types, layers, known)]


def _kimi_linear(c: Config, layers: int) -> list[Block]:
    """Kimi delta attention: a gate for every channel, from projections of low rank; latent attention between."""
    table = c.get("linear_attn_config") or {}
    linear = Config(table, {})
    heads, dim = linear.count("num_heads"), linear.count("head_dim")
    wide, hidden = heads * dim, c.count("hidden_size")
    kernel = linear.count("short_conv_kernel_size", 4)
    # The second halves of the two gates of low rank, dim -> wide, are counted as columns of the input's.
    columns = 3 * wide + heads + 2 * dim + 2 * dim * wide // hidden
    net = Recurrent(columns, wide, heads, heads * dim * dim, 3 * wide * (kernel - 1))
    shape = (
        c.count("q_lora_rank") if c.get("q_lora_rank") else 0,
        c.count("kv_lora_rank"),
        c.count("qk_nope_head_dim"),
        c.count("qk_rope_head_dim"),
        c.count("v_head_dim"),
    )
    attention = Attention(c.count("num_attention_heads"), 1, shape[1] + shape[3], latent=shape)
    full = {i - 1 for i in linear.integers("full_attn_layers") or []}  # counted from 1
    inner = c.count("moe_intermediate_size")
    moe = MoE(
        c.count("num_experts"),
        c.count("num_experts_per_token"),
        inner,
        inner * c.count("num_shared_experts", 1),
    )
    dense = Dense(c.count("intermediate_size"))
    first = c.count("first_k_dense_replace", 1)
    return [Block(attention if i in full else net, dense if i < first else moe) for i in range(layers)]


def _mimo(c: Config, layers: int) -> list[Block]:
    """MiMo-V2-Flash: windows of more KV heads than full layers have; values are narrower than keys."""
    heads, k_dim, v_dim = c.count("num_attention_heads"), c.count("head_dim"), c.count("v_head_dim")
    # The window counts the tokens before a token, not itself.
    window = c.count("sliding_window_size") + 1
    mixers = {
        0: Attention(heads, c.count("num_key_value_heads"), k_dim, v_head_dim=v_dim),
        1: Attention(heads, c.count("swa_num_key_value_heads"), k_dim, window, v_head_dim=v_dim),
    }
    moe = MoE(c.count("n_routed_experts"), c.count("num_experts_per_tok"), c.count("moe_intermediate_size"))
    mlps: dict[int, Dense | MoE] = {0: Dense(c.count("intermediate_size")), 1: moe}
    pattern = c.integers("hybrid_layer_pattern", layers) or []
    sparse = c.integers("moe_layer_freq", layers) or []
    return [Block(mixers[p], mlps[m]) for p, m in zip(pattern, sparse, strict=True)]


def _llama4(c: Config, layers: int) -> list[Block]:
    """Three layers see the chunk that a token is in, and the fourth, which has no rotary embedding, everything."""
    full = _attention(c)
    chunked = replace(full, chunk=c.count("attention_chunk_size"))
    turned = c.integers("no_rope_layers") or [
        int((i + 1) % c.count("no_rope_layer_interval", 4) != 0) for i in range(layers)
    ]
    types = c.get("layer_types") or ["chunked_attention" if t else "full_attention" for t in turned]
    mixers = {"chunked_attention": chunked, "full_attention": full}
    step = c.count("interleave_moe_layer_step", 1)
    sparse = set(c.integers("moe_layers") or range(step - 1, layers, step))
    inner = c.count("intermediate_size")
    moe = MoE(c.count("num_local_experts"), c.count("num_experts_per_tok", 1), inner, inner)
    dense = Dense(c.count("intermediate_size_mlp")) if len(sparse) < layers else moe
    return [
        Block(mixers[kind], moe if i in sparse else dense)
        for i, kind in enumerate(_types(types, layers, mixers))
    ]


def _mllama(c: Config, layers: int) -> list[Block]:
    """Llama-3.2-Vision: some layers attend to image tokens instead of text."""
    own = _attention(c)
    cross = set(c.integers("cross_attention_layers") or range(3, layers, 5))
    dense = Dense(c.count("intermediate_size"))
    return [Block(replace(own, cross=True) if i in cross else own, dense) for i in range(layers)]


def _gemma3n(c: Config, layers: int) -> list[Block]:
    """The last layers read the KV of the last layer of their type before them. Every layer has embeddings of its
    own (256 numbers a token), small projections for them, and four residual streams."""
    hidden, side = c.count("hidden_size"), c.count("hidden_size_per_layer_input", 256)
    full = _attention(c)
    mixers = {"full_attention": full, "sliding_attention": replace(full, window=c.count("sliding_window"))}
    types = c.get("layer_types") or [
        "full_attention" if (i + 1) % 5 == 0 else "sliding_attention" for i in range(layers)
    ]
    own = layers - int(c.number("num_kv_shared_layers", 0))
    inner = c.get("intermediate_size")
    inners = inner if isinstance(inner, list) else [inner] * layers
    streams, rank = c.count("altup_num_inputs", 4), c.count("laurel_rank", 64)
    table = layers * side * (c.count("vocab_size_per_layer_input") + hidden)
    outer = table + 2 * (streams - 1) * hidden * hidden
    each = 2 * hidden * (side + rank) + hidden * streams
    return [
        Block(replace(mixers[kind], shared=i >= own), Dense(inners[i]), each + (outer if i == 0 else 0))
        for i, kind in enumerate(_types(types, layers, mixers))
    ]


_READERS: dict[str, _Reader] = {
    "Qwen3NextForCausalLM": _delta_nets,
    "Qwen3_5MoeForConditionalGeneration": _delta_nets,
    "Qwen3_5ForConditionalGeneration": _delta_nets,
    "MiniMaxM2ForCausalLM": _plain_mixture,
    "JambaForCausalLM": _jamba,
    "Lfm2ForCausalLM": _short_convolutions,
    "FalconH1ForCausalLM": _falcon_h1,
    "NemotronHForCausalLM": _nemotron_h,
    "KimiLinearForCausalLM": _kimi_linear,
    "MiMoV2FlashForCausalLM": _mimo,
    "Llama4ForConditionalGeneration": _llama4,
    "Llama4ForCausalLM": _llama4,
    "MllamaForConditionalGeneration": _mllama,
    "Gemma3nForConditionalGeneration": _gemma3n,
    "Gemma3nForCausalLM": _gemma3n,
}
