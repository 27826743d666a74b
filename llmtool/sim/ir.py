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
    """Softmax attention. window: tokens that a token sees, None for all; chunk: it sees those of its own chunk.
    latent: (q_rank or 0, kv_rank, nope, rope, v) of multi-head latent attention, whose cache is one row of
    kv_rank + rope per token. v_head_dim: of the values, where it is not head_dim. cross: over image tokens; a
    prompt without images skips it. shared: reads the KV of a layer before it, and has no projections for it."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    latent: tuple[int, int, int, int, int] | None = None
    gated: bool = False  # an output gate as wide as the queries (Qwen3-Next)
    chunk: int | None = None
    v_head_dim: int = 0
    cross: bool = False
    shared: bool = False

    @property
    def v_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of the query (with its gate) and key-value projections, rows of the output projection."""
        kv = 0 if self.shared else self.kv_heads * (self.head_dim + self.v_dim)
        return self.heads * self.head_dim * (2 if self.gated else 1), kv, self.heads * self.v_dim

    def seen(self, context: float) -> float:
        """Tokens that the newest of `context` reads."""
        if self.chunk is not None and context > 0:
            return (context - 1) % self.chunk + 1
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A layer with a state of fixed size: gated delta net, Mamba, short convolution. in_width: columns of its input
    projection; out_width: rows of its output projection. A sequence's state has `state` numbers in float32 and
    `conv` inputs of the convolution in the model's type.
    """

    in_width: int
    out_width: int
    heads: int
    state: int
    conv: int

    def bytes_with(self, element: int) -> int:
        """A sequence's state, where the model's type has `element` bytes."""
        return 4 * self.state + element * self.conv

    @property
    def state_bytes(self) -> int:
        return self.bytes_with(2)

    @property
    def kind(self) -> str:
        """As LayerCacheSpec has it."""
        return "recurrent" if self.state else "short_conv"


@dataclass(frozen=True, slots=True)
class Dense:
    inner: int  # neurons
    matrices: int = 3  # gate, up and down; without a gate two


@dataclass(frozen=True, slots=True)
class MoE:
    experts: int
    top_k: int
    inner: int  # neurons of one expert
    shared: int = 0  # neurons of the expert that every token visits


@dataclass(frozen=True, slots=True)
class Block:
    """One layer. extra: parameters of its norms, biases and the like. beside: a second mixer that reads what the
    first does, and whose output is added to its (Falcon-H1)."""

    mixer: Attention | Recurrent | None
    mlp: Dense | MoE | None
    extra: int = 0
    beside: Recurrent | None = None

    @property
    def mixers(self) -> tuple[Attention | Recurrent, ...]:
        return tuple(m for m in (self.mixer, self.beside) if m is not None)


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
        return self.hidden * sum(mixer.widths)

    def mlp_parameters(self, mlp: Dense | MoE | None, active: bool = False) -> int:
        """active: only those that one token meets."""
        if mlp is None:
            return 0
        if isinstance(mlp, Dense):
            return mlp.matrices * self.hidden * mlp.inner
        experts = mlp.top_k if active else mlp.experts
        return self.hidden * (3 * (experts * mlp.inner + mlp.shared) + mlp.experts)

    @property
    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        blocks = sum(
            sum(self.mixer_parameters(m) for m in b.mixers) + self.mlp_parameters(b.mlp) + b.extra
            for b in self.blocks
        )
        return blocks + self.embedding_parameters * (1 if self.tied else 2) + self.hidden

    @property
    def active_parameters(self) -> int:
        """Multiplied per token: without the embedding, with the head."""
        blocks = sum(
            sum(self.mixer_parameters(m) for m in b.mixers) + self.mlp_parameters(b.mlp, active=True)
            for b in self.blocks
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
    blocks = tuple(
        Block(_mixer(spec.attention_of(layer), layer.window), _mlp(layer.mlp)) for layer in spec.layers
    )
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


def _mixer(a: AttentionSpec, window: int | None) -> Attention | None:
    if not a.num_heads:
        return None  # pruned away
    latent = None
    if a.latent is not None:
        t = a.latent
        latent = (t.q_rank or 0, t.kv_rank, t.nope_dim, t.rope_dim, t.v_dim)
    return Attention(a.num_heads, a.num_kv_heads, a.head_dim, window, latent)


def _mlp(mlp: DenseSpec | MoESpec) -> Dense | MoE:
    if isinstance(mlp, DenseSpec):
        return Dense(mlp.intermediate_size)
    return MoE(mlp.router.num_experts, mlp.router.top_k, mlp.intermediate_size, mlp.shared_size)
