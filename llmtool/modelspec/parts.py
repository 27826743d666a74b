"""The parts a decoder is described by: rotary embedding, attention, MLP, norms, and what differs per layer."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `dim` dimensions of a head.

    kind: default | linear | dynamic | yarn | llama3 | longrope. factor: how much longer the context was made,
    from original_max_positions tokens. attention_factor: cos and sin are multiplied by it (yarn, longrope).
    low_freq_factor, high_freq_factor: llama3's. beta_fast, beta_slow, truncate: yarn's. short_factors,
    long_factors: longrope's divisors, one per frequency, for contexts up to original_max_positions and beyond.
    """

    dim: int
    theta: float = DEFAULT_THETA
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 8192
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class NormSpec:
    """RMS norms. before: of what attention and MLP read; after: of what they return, before it is added.

    offset: added to the stored weight (Gemma keeps w and means 1 + w).
    """

    eps: float
    before: bool = True
    after: bool = False
    offset: float = 0.0


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): a token caches one latent and one rotary key.

    q_rank: None when queries are not compressed. kv_rank: dimensions of the cached latent. nope_dim, rope_dim:
    dimensions of a head's query and key without and with rotary embedding; v_dim: of its value.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    interleaved: bool = True  # rotary pairs lie side by side in the checkpoint's rows


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """num_kv_heads, head_dim: as cached and attended; for latent attention one head of latent + rotary key.

    scale: of the scores. softcap: scores become softcap * tanh(scores / softcap). sinks: a learned score per head
    that takes part in the softmax and adds nothing. qk_norm: "head" norms each head of q and k, "all" all heads
    of a token as one vector.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str | None = None
    softcap: float | None = None
    sinks: bool = False
    latent: LatentSpec | None = None


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How a gated MLP joins gate and up. kind: silu | gelu | gelu_tanh: act(gate) * up. kind clamped: with gate at
    most limit and up within +-limit, gate * sigmoid(alpha * gate) * (up + 1) (gpt-oss)."""

    kind: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class DenseSpec:
    intermediate_size: int
    gate: GateSpec = GateSpec()
    bias: bool = False


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Which top_k experts a token goes to, and with what weights.

    scoring: softmax | sigmoid of the router's logits. normalised: the chosen weights are made to sum to 1. scale:
    they are multiplied by it. groups: experts come in so many equal groups, of which only top_groups are chosen
    from; a group counts as its best expert (group_by "max") or its best two ("top2"). correction: a learned bias
    joins the scores for choosing, not for weighing (DeepSeek-V3, section 2.1.2). bias: the logits have one.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalised: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_by: str = "max"
    correction: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoESpec:
    """A mixture of experts. intermediate_size: of one expert. shared_size: of the expert that every token visits,
    0 for none; shared_gate: a sigmoid of the token weighs it. held: the first expert that is here and the one after
    the last, on a rank that does not hold them all."""

    router: RouterSpec
    intermediate_size: int
    gate: GateSpec = GateSpec()
    bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    held: tuple[int, int] | None = None

    @property
    def experts(self) -> range:
        """Those that are here."""
        return range(self.router.num_experts) if self.held is None else range(*self.held)


@dataclass(frozen=True, slots=True)
class ShortConvSpec:
    """A gated convolution over the last `kernel` tokens, channel by channel (LFM2). A sequence keeps what it needs
    of the last kernel - 1. channels: the model's hidden size."""

    channels: int
    kernel: int
    bias: bool = False

    def state_bytes(self, dtype_bytes: int) -> int:
        return (self.kernel - 1) * self.channels * dtype_bytes


@dataclass(frozen=True, slots=True)
class Mamba2Spec:
    """A state space of `num_heads` heads, each with a state [head_dim, state_dim] (Mamba-2, arXiv 2405.21060,
    section 7), behind a convolution over x, B and C, which `num_groups` groups of heads share.

    gated_norm: None multiplies the output by silu(z); "before" norms it first, "after" norms the product, each over
    the channels of a group. step_limits: of the time step. scales: of the rows of the first matrix that make z, x,
    B, C and the time step (Falcon-H1's multipliers).
    """

    num_heads: int
    head_dim: int
    num_groups: int
    state_dim: int
    kernel: int
    conv_bias: bool = True
    proj_bias: bool = False
    out_bias: bool = False
    gated_norm: str | None = None
    step_limits: tuple[float, float] = (0.0, float("inf"))
    scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.inner + 2 * self.num_groups * self.state_dim

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """Rows of the first matrix that make z, x, B, C and the time step."""
        group = self.num_groups * self.state_dim
        return self.inner, self.inner, group, group, self.num_heads

    def state_bytes(self, dtype_bytes: int) -> int:
        """The convolution's tokens, and the state in float32."""
        return (self.kernel - 1) * self.channels * dtype_bytes + 4 * self.inner * self.state_dim


MixerSpec = ShortConvSpec | Mamba2Spec


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer. window: how many tokens a token sees, itself included; None sees all.
    rope: None adds no positions (NoPE). attention: of a layer whose heads are fewer than the model's (none at all:
    the layer has no attention); None is the model's. mixer: with a state, instead of attention or beside it."""

    window: int | None
    rope: RopeSpec | None
    mlp: DenseSpec | MoESpec
    attention: AttentionSpec | None = None
    mixer: MixerSpec | None = None
