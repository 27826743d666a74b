"""ModelSpec: a decoder's shapes and constants, its size, and what its layers cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtool.core.memory.geometry import LayerCacheSpec
from llmtool.modelspec.config import read_config, read_json
from llmtool.modelspec.parameters import matrices
from llmtool.modelspec.parts import AttentionSpec, DenseSpec, LayerSpec, NormSpec, RopeSpec, ShortConvSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder, resolved: whatever its family, all that runs it or counts its bytes is here.

    family: its model_type. attention: of the layers that have none of their own, and the widest. embedding_scale:
    of the embeddings as the first layer reads them; residual_scale: of what a block adds; logits become
    logits / logits_divisor, then logits_softcap * tanh(logits / logits_softcap). folded: (end of a layer's tensor
    name, factor that it is multiplied by while it is loaded). dtype: the one it was published
    in. eos_ids: tokens that end its output, from config.json and generation_config.json.
    """

    architecture: str
    family: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    attention: AttentionSpec
    norms: NormSpec
    layers: tuple[LayerSpec, ...]
    tied_embeddings: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float | None = None
    folded: tuple[tuple[str, float], ...] = ()
    dtype: str = "bfloat16"
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelSpec:
        """The spec of a Hugging Face directory. Raises ModelError when it has no readable config.json."""
        directory = Path(path)
        return cls.from_config(read_config(directory), read_json(directory / "generation_config.json", dict))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
        """The spec that a parsed config.json describes, in the spelling of transformers 4 or 5.

        generation: a parsed generation_config.json, for its end tokens. Raises ModelError for an architecture
        or feature that does not run, or a field that is missing or makes no sense.
        """
        from llmtool.modelspec.read import read_spec  # it makes ModelSpecs, and so imports this module

        return read_spec(config, generation or {})

    @staticmethod
    def is_native(path: str | Path) -> bool:
        """Whether the architecture of a Hugging Face directory has a family here. Raises ModelError as from_dir."""
        from llmtool.modelspec.read import FAMILIES, TEXT_PARTS, architecture_of

        architecture = architecture_of(read_config(Path(path)))
        return architecture in FAMILIES or architecture in TEXT_PARTS

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        return self.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    @property
    def norm_eps(self) -> float:
        return self.norms.eps

    def attention_of(self, layer: LayerSpec) -> AttentionSpec:
        """The layer's own attention where it has one (a pruned model), else the model's."""
        return self.attention if layer.attention is None else layer.attention

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many tokens a token sees, itself included; None sees all."""
        return tuple(layer.window for layer in self.layers)

    @property
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The different rotary embeddings of the layers, in the order in which they first appear."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def intermediate_size(self) -> int:
        """MLP neurons that one token passes in the widest layer: of a mixture, the chosen and shared experts'."""
        return max(_active_width(layer) for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices().values())

    def weight_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Parameters by kind as (number of vectors, their length), all layers together; tied ones once."""
        return matrices(self)

    def layer_cache_specs(self, dtype_bytes: int, state_bytes: int | None = None) -> list[LayerCacheSpec]:
        """What each layer caches: rows per token, dtype_bytes per element, or a state, state_bytes (the same, if
        None) per element of its convolution. A layer may have both, or, with no heads left, nothing.

        Latent attention caches one row per token, whose leading dimensions are the value: v_head_dim is 0.
        """
        specs = []
        for i, layer in enumerate(self.layers):
            attention = self.attention_of(layer)
            latent = attention.latent is not None
            spec = LayerCacheSpec(
                layer=i,
                num_kv_heads=attention.num_kv_heads,
                k_head_dim=attention.head_dim,
                v_head_dim=0 if latent else attention.head_dim,
                dtype_bytes=dtype_bytes,
                kind="mla" if latent else "full" if layer.window is None else "sliding_window",
                window=None if latent else layer.window,
            )
            if spec.num_kv_heads:
                specs.append(spec)
            if layer.mixer is not None:
                kind = "short_conv" if isinstance(layer.mixer, ShortConvSpec) else "recurrent"
                size = layer.mixer.state_bytes(state_bytes or dtype_bytes)
                specs.append(LayerCacheSpec(i, 0, 0, 0, dtype_bytes, kind, state_bytes=size))
        return specs


def _active_width(layer: LayerSpec) -> int:
    mlp = layer.mlp
    if isinstance(mlp, DenseSpec):
        return mlp.intermediate_size
    return mlp.router.top_k * mlp.intermediate_size + mlp.shared_size
