"""Architectures that are planned for though they do not run natively: gated delta nets, Mamba, short convolutions
beside attention, and mixtures without a family of their own.

Sources: the configuration classes of transformers 5; parameter counts agree with the published ones within 2 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
        max_positions=c.count("max_position_embeddings"),
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
    state = v * k_dim * v_dim + width * (c.count("linear_conv_kernel_dim", 4) - 1)
    net = Recurrent(width + out + 2 * v, out, v, state)
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
    mamba = Recurrent(columns, inner, 1, inner * (state + conv - 1), 2)
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
    conv = Recurrent(3 * hidden, hidden, 1, hidden * (c.count("conv_L_cache", 3) - 1), 2)
    inner = c.count("intermediate_size")
    if c.flag("block_auto_adjust_ff_dim", True):
        step = c.count("block_multiple_of", 256)
        inner = int(c.number("block_ffn_dim_multiplier", 1.0) * (2 * inner // 3))
        inner = step * (-(-inner // step))
    return [Block(_attention(c) if i in full else conv, Dense(inner)) for i in range(layers)]


_READERS: dict[str, _Reader] = {
    "Qwen3NextForCausalLM": _delta_nets,
    "Qwen3_5MoeForConditionalGeneration": _delta_nets,
    "Qwen3_5ForConditionalGeneration": _delta_nets,
    "MiniMaxM2ForCausalLM": _plain_mixture,
    "JambaForCausalLM": _jamba,
    "Lfm2ForCausalLM": _short_convolutions,
}
