"""The transformer as the planner sees it (APEX, section 3.1): a chain of blocks, each a token mixer and an MLP
cell.

Read from the raw config.json. Families that run natively come through ModelSpec, so that both count the same bytes;
hybrids that only a simulator meets are read by `hybrids`. Equal blocks are one object, counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmtool.modelspec import AttentionSpec, DenseSpec, ModelSpec, MoESpec


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention. window: tokens that a token sees, None for all. latent: (q_rank or 0, kv_rank, nope, rope,
    v) of multi-head latent attention, whose cache is one row of kv_rank + rope per token."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    latent: tuple[int, int, int, int, int] | None = None
    gated: bool = False  # an output gate as wide as the queries (Qwen3-Next)


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A layer with a state of fixed size: gated delta net, Mamba, short convolution. in_width: columns of its input
    projection; out_width: rows of its output projection; state: elements of a sequence's state, in state_bytes
    each.
    """

    in_width: int
    out_width: int
    heads: int
    state: int
    state_bytes: int = 4


@dataclass(frozen=True, slots=True)
class Dense:
    inner: int  # neurons; gate, up and down are three matrices of it


@dataclass(frozen=True, slots=True)
class MoE:
    experts: int
    top_k: int
    inner: int  # neurons of one expert
    shared: int = 0  # neurons of the expert that every token visits


@dataclass(frozen=True, slots=True)
class Block:
    """One layer. extra: parameters of its norms, biases and the like."""

    mixer: Attention | Recurrent | None
    mlp: Dense | MoE | None
    extra: int = 0


@dataclass(frozen=True, slots=True)
class ModelIR:
    """name: for reports. native: type of the published weights (bf16, fp8, fp4, int4), if not told otherwise."""

    name: str
    hidden: int
    vocab: int
    blocks: tuple[Block, ...]
    tied: bool
    max_positions: int
    native: str = "bf16"
    spec: ModelSpec | None = None

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def mixer_parameters(self, mixer: Attention | Recurrent | None) -> int:
        if mixer is None:
            return 0
        if isinstance(mixer, Recurrent):
            return self.hidden * (mixer.in_width + mixer.out_width)
        if mixer.latent is not None:
            q_rank, rank, nope, rope, v = mixer.latent
            q = mixer.heads * (nope + rope)
            queries = self.hidden * q_rank + q_rank * q if q_rank else self.hidden * q
            return queries + self.hidden * (rank + rope) + mixer.heads * ((nope + v) * rank + v * self.hidden)
        q = mixer.heads * mixer.head_dim
        return self.hidden * (q * (3 if mixer.gated else 2) + 2 * mixer.kv_heads * mixer.head_dim)

    def mlp_parameters(self, mlp: Dense | MoE | None, active: bool = False) -> int:
        """active: only those that one token meets."""
        if mlp is None:
            return 0
        if isinstance(mlp, Dense):
            return 3 * self.hidden * mlp.inner
        experts = mlp.top_k if active else mlp.experts
        return self.hidden * (3 * (experts * mlp.inner + mlp.shared) + mlp.experts)

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        blocks = sum(
            self.mixer_parameters(b.mixer) + self.mlp_parameters(b.mlp) + b.extra for b in self.blocks
        )
        return blocks + self.embedding_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def active_parameters(self) -> int:
        """Multiplied per token: without the embedding, with the head."""
        blocks = sum(
            self.mixer_parameters(b.mixer) + self.mlp_parameters(b.mlp, active=True) for b in self.blocks
        )
        return blocks + self.embedding_parameters

    @property
    def is_moe(self) -> bool:
        return any(isinstance(b.mlp, MoE) for b in self.blocks)


def read_ir(config: Mapping[str, Any], name: str = "model") -> ModelIR:
    """Raises ModelError for an architecture that neither ModelSpec nor `hybrids` knows."""
    from llmtool.sim.hybrids import is_hybrid, read_hybrid  # it makes ModelIRs, and so imports this module

    if is_hybrid(config):
        return read_hybrid(config, name)
    return from_spec(ModelSpec.from_config(config), name, native_dtype(config))


def native_dtype(config: Mapping[str, Any]) -> str:
    """The type of the published weights: that of a quantised checkpoint, else bf16."""
    settings = config.get("quantization_config") or {}
    method = str(settings.get("quant_method") or "")
    if method == "fp8":
        return "fp8"
    if method == "mxfp4":
        return "fp4"
    return "bf16"


def from_spec(spec: ModelSpec, name: str, native: str = "bf16") -> ModelIR:
    blocks = tuple(Block(_mixer(spec.attention, layer.window), _mlp(layer.mlp)) for layer in spec.layers)
    bare = ModelIR(
        name,
        spec.hidden_size,
        spec.vocab_size,
        blocks,
        spec.tied_embeddings,
        spec.max_positions,
        native,
        spec,
    )
    # What is left of the exact count is norms, biases and routers' corrections: spread evenly.
    rest, layers = spec.num_parameters - bare.num_parameters, len(blocks)
    whole = tuple(
        Block(b.mixer, b.mlp, rest // layers + (1 if i < rest % layers else 0)) for i, b in enumerate(blocks)
    )
    return ModelIR(
        name, spec.hidden_size, spec.vocab_size, whole, spec.tied_embeddings, spec.max_positions, native, spec
    )


def _mixer(a: AttentionSpec, window: int | None) -> Attention:
    latent = None
    if a.latent is not None:
        t = a.latent
        latent = (t.q_rank or 0, t.kv_rank, t.nope_dim, t.rope_dim, t.v_dim)
    return Attention(a.num_heads, a.num_kv_heads, a.head_dim, window, latent)


def _mlp(mlp: DenseSpec | MoESpec) -> Dense | MoE:
    if isinstance(mlp, DenseSpec):
        return Dense(mlp.intermediate_size)
    return MoE(mlp.router.num_experts, mlp.router.top_k, mlp.intermediate_size, mlp.shared_size)
