"""Each layer's MLP, dense or a mixture of experts, as the families' config.json describe it."""

from __future__ import annotations

from collections.abc import Sequence

from llmtool.errors import ModelError
from llmtool.modelspec.config import Config
from llmtool.modelspec.parts import DenseSpec, GateSpec, MoESpec, RouterSpec

MlpSpec = DenseSpec | MoESpec
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def dense(config: Config, layers: int) -> Sequence[MlpSpec]:
    return [_dense(config)] * layers


def mixtral_mlps(config: Config, layers: int) -> Sequence[MlpSpec]:
    router = RouterSpec(_experts(config), _top_k(config), normalised=True)
    return [MoESpec(router, config.count("intermediate_size"), _gate(config))] * layers


def qwen_mlps(config: Config, layers: int) -> Sequence[MlpSpec]:
    """Qwen2-MoE and Qwen3-MoE: every decoder_sparse_step-th layer, except mlp_only_layers."""
    shared = (
        config.count("shared_expert_intermediate_size")
        if config.get("shared_expert_intermediate_size")
        else 0
    )
    router = RouterSpec(_experts(config), _top_k(config), normalised=config.flag("norm_topk_prob"))
    moe = MoESpec(
        router,
        config.count("moe_intermediate_size"),
        _gate(config),
        shared_size=shared,
        shared_gate=shared > 0,
    )
    step, plain = config.count("decoder_sparse_step", 1), config.integers("mlp_only_layers") or []
    return [_dense(config) if i in plain or (i + 1) % step else moe for i in range(layers)]


def gpt_oss_mlps(config: Config, layers: int) -> Sequence[MlpSpec]:
    """A softmax over the chosen experts' logits is the softmax over all, made to sum to 1 again."""
    router = RouterSpec(_experts(config), _top_k(config), normalised=True, bias=True)
    gate = GateSpec("clamped", config.number("swiglu_alpha", 1.702), config.number("swiglu_limit", 7.0))
    return [MoESpec(router, config.count("intermediate_size"), gate, bias=True)] * layers


def deepseek_v2_mlps(config: Config, layers: int) -> Sequence[MlpSpec]:
    config.refuse("norm_topk_prob")
    _only(config, "scoring_func", "softmax")
    methods = {"greedy": "", "group_limited_greedy": "grouped"}
    grouped = bool(config.choice("topk_method", methods, "expert choice (topk_method)"))
    router = RouterSpec(
        _experts(config),
        _top_k(config),
        scale=config.number("routed_scaling_factor", 1.0),
        groups=config.count("n_group") if grouped else 1,
        top_groups=config.count("topk_group") if grouped else 1,
    )
    return _deepseek_mlps(config, layers, router)


def deepseek_v3_mlps(config: Config, layers: int) -> Sequence[MlpSpec]:
    _only(config, "scoring_func", "sigmoid")
    _only(config, "topk_method", "noaux_tc")
    router = RouterSpec(
        _experts(config),
        _top_k(config),
        scoring="sigmoid",
        normalised=config.flag("norm_topk_prob"),
        scale=config.number("routed_scaling_factor", 1.0),
        groups=config.count("n_group"),
        top_groups=config.count("topk_group"),
        group_by="top2",
        correction=True,
    )
    return _deepseek_mlps(config, layers, router)


def _deepseek_mlps(config: Config, layers: int, router: RouterSpec) -> Sequence[MlpSpec]:
    if router.num_experts % router.groups or router.top_groups > router.groups:
        raise ModelError(
            f"config.json: {router.num_experts} experts cannot come in {router.groups} equal groups of which "
            f"{router.top_groups} are chosen."
        )
    size = config.count("moe_intermediate_size")
    shared = size * int(config.number("n_shared_experts", 0))
    moe = MoESpec(router, size, _gate(config), shared_size=shared)
    first, every = int(config.number("first_k_dense_replace", 0)), config.count("moe_layer_freq", 1)
    return [moe if i >= first and i % every == 0 else _dense(config) for i in range(layers)]


def _only(config: Config, key: str, value: str) -> None:
    config.choice(key, {value: value}, f"expert choice ({key})", value)


def _dense(config: Config) -> DenseSpec:
    return DenseSpec(config.count("intermediate_size"), _gate(config), config.flag("mlp_bias"))


def _gate(config: Config) -> GateSpec:
    key = "hidden_activation" if config.get("hidden_activation") is not None else "hidden_act"
    if config.get(key) is None:
        return GateSpec()
    return GateSpec(config.choice(key, _ACTIVATIONS, "activation"))


def _experts(config: Config) -> int:
    """The number of experts, which transformers 5 renames when it saves."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    given = [name for name in names if config.given.get(name) is not None]
    assumed = [name for name in names if config.get(name) is not None]
    return config.count((given or assumed or [*names])[0])


def _top_k(config: Config) -> int:
    top_k, experts = config.count("num_experts_per_tok"), _experts(config)
    if top_k > experts:
        raise ModelError(f"config.json: num_experts_per_tok is {top_k}, of {experts} experts.")
    return top_k
