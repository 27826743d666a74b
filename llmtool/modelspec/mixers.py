"""Layers that keep a state instead of every token, or beside it, as the families' config.json describe them."""

from __future__ import annotations

from collections.abc import Sequence

from llmtool.errors import ModelError
from llmtool.modelspec.config import Config, numbers
from llmtool.modelspec.mlps import MlpSpec
from llmtool.modelspec.parts import DenseSpec, Mamba2Spec, MixerSpec, ShortConvSpec
from llmtool.modelspec.rope import FULL

CONV = "conv"  # a layer type without attention


def none(config: Config, types: Sequence[str]) -> Sequence[MixerSpec | None]:
    return [None] * len(types)


# -- LFM2 --------------------------------------------------------------------------------------------------------


def lfm2_types(config: Config, layers: int) -> Sequence[str]:
    types = config.get("layer_types")
    if types is None:
        full = config.integers("full_attn_idxs") or range(layers)
        return [FULL if i in full else CONV for i in range(layers)]
    if len(types) != layers or set(types) - {FULL, CONV}:
        raise ModelError(
            f"config.json: layer_types must name {FULL} or {CONV} for each of {layers} layers, and is {types!r}."
        )
    return list(types)


def lfm2_mixers(config: Config, types: Sequence[str]) -> Sequence[MixerSpec | None]:
    conv = ShortConvSpec(config.count("hidden_size"), config.count("conv_L_cache"), config.flag("conv_bias"))
    return [conv if kind == CONV else None for kind in types]


def lfm2_mlps(config: Config, layers: int) -> Sequence[MlpSpec]:
    """Two thirds of the width that config.json names, rounded up, unless it says otherwise."""
    width = config.count("block_ff_dim", config.count("intermediate_size"))
    if config.flag("block_auto_adjust_ff_dim", True):
        width = int(config.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        multiple = config.count("block_multiple_of", 256)
        width = -(-width // multiple) * multiple
    return [DenseSpec(width)] * layers


# -- Falcon-H1 ---------------------------------------------------------------------------------------------------


def _limits(config: Config) -> tuple[float, float]:
    """JSON has no infinity: transformers writes {"__float__": "Infinity"} for it."""
    given = config.get("time_step_limit")
    if given is None:
        return 0.0, float("inf")
    try:
        low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in given)
    except (TypeError, ValueError, KeyError):
        raise ModelError(f"config.json: time_step_limit must be two numbers, and is {given!r}.") from None
    return low, high


def falcon_mixers(config: Config, types: Sequence[str]) -> Sequence[MixerSpec | None]:
    config.refuse("mlp_bias")
    inner = config.optional_count("mamba_d_ssm")
    if inner is None:
        inner = config.count("mamba_expand") * config.count("hidden_size")
    heads = config.count("mamba_n_heads")
    dim = inner // heads if config.get("mamba_d_head") == "auto" else config.count("mamba_d_head")
    if heads * dim != inner:
        raise ModelError(
            f"config.json: mamba_n_heads ({heads}) heads of {dim} dimensions are not mamba_d_ssm ({inner})."
        )
    whole = config.number("ssm_in_multiplier", 1.0)
    each = numbers(config.fields, "ssm_multipliers", 5) if config.get("ssm_multipliers") else (1.0,) * 5
    z, x, b, c, dt = (whole * scale for scale in each)
    norm = None
    if config.flag("mamba_rms_norm"):
        norm = "before" if config.flag("mamba_norm_before_gate", True) else "after"
    mixer = Mamba2Spec(
        num_heads=heads,
        head_dim=dim,
        num_groups=config.count("mamba_n_groups"),
        state_dim=config.count("mamba_d_state"),
        kernel=config.count("mamba_d_conv"),
        conv_bias=config.flag("mamba_conv_bias", True),
        proj_bias=config.flag("mamba_proj_bias"),
        out_bias=config.flag("projectors_bias"),
        gated_norm=norm,
        step_limits=_limits(config),
        scales=(z, x, b, c, dt),
    )
    return [mixer] * len(types)
