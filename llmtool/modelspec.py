"""ModelSpec: what a model is, read from its raw config.json. The one source for models, memory, sim and plan.

Never AutoConfig: it imports torch, and a laptop that only plans a deployment has no need of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtool.core.memory.geometry import LayerCacheSpec
from llmtool.errors import ModelError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Architecture -> family. What runs; the message for anything else lists these.
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# What each family's configuration class in transformers assumes where config.json is silent.
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_THETA = 10000.0
_DEFAULT_MAX_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_DEFAULT_WINDOW = {"mistral": 4096}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding. kind: default | linear | llama3; the fields after theta belong to the scaled kinds.

    original_max_positions: tokens the unscaled model was trained on.
    """

    theta: float = _DEFAULT_THETA
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shapes and constants.

    windows: per layer, how many tokens a token sees, itself included; None sees all. dtype: the one it was
    published in. eos_ids: tokens that end its output, from config.json and generation_config.json.
    """

    architecture: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rope: RopeSpec
    norm_eps: float
    windows: tuple[int | None, ...]
    tied_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelSpec:
        """The spec of a Hugging Face directory. Raises ModelError when it has no readable config.json."""
        directory = Path(path)
        config = _read_json(directory / "config.json")
        if config is None:
            raise ModelError(
                f"{directory} has no config.json, so it is not a Hugging Face model directory.",
                "Give a directory with config.json and safetensors, a GGUF file, or a hub id.",
            )
        return cls.from_config(config, _read_json(directory / "generation_config.json") or {})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelSpec:
        """The spec that a parsed config.json describes, in the spelling of transformers 4 or 5.

        generation: a parsed generation_config.json, for its end tokens. Raises ModelError for an architecture
        or feature that does not run, or a field that is missing or makes no sense.
        """
        return _Reader(config).spec(generation or {})

    @property
    def num_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices().values())

    def weight_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Parameters by kind as (number of vectors, their length), all layers together; tied ones once."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner, layers = self.hidden_size, self.intermediate_size, self.num_layers
        table = {
            "embedding": (self.vocab_size, hidden),
            "lm_head": (0 if self.tied_embeddings else self.vocab_size, hidden),
            "qkv": (layers * (q + 2 * kv), hidden),
            "o": (layers * hidden, q),
            "gate_up": (layers * 2 * inner, hidden),
            "down": (layers * hidden, inner),
            "norms": (2 * layers + 1, hidden),
            "qk_norm": (2 * layers if self.qk_norm else 0, self.head_dim),
            "qkv_bias": (layers if self.qkv_bias else 0, q + 2 * kv),
            "o_bias": (layers if self.o_bias else 0, hidden),
            "mlp_bias": (layers if self.mlp_bias else 0, 2 * inner + hidden),
        }
        return {name: shape for name, shape in table.items() if shape[0]}

    def layer_cache_specs(self, dtype_bytes: int) -> list[LayerCacheSpec]:
        """What each layer caches per token, dtype_bytes per element."""
        return [
            LayerCacheSpec(
                layer=i,
                num_kv_heads=self.num_kv_heads,
                k_head_dim=self.head_dim,
                v_head_dim=self.head_dim,
                dtype_bytes=dtype_bytes,
                kind="full" if window is None else "sliding_window",
            )
            for i, window in enumerate(self.windows)
        ]


class _Reader:
    """One config.json being read: typed access, so that bad files end in a sentence that names the field."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        architectures = config.get("architectures") or []
        named = architectures[0] if isinstance(architectures, list) and architectures else None
        if named is None:
            by_type = {family: architecture for architecture, family in FAMILIES.items()}
            named = by_type.get(str(config.get("model_type")), str(config.get("model_type")))
        if named not in FAMILIES:
            raise ModelError(
                f"The architecture {named} does not run here.", f"These do: {', '.join(sorted(FAMILIES))}."
            )
        self.architecture = str(named)
        self.family = FAMILIES[self.architecture]

    def spec(self, generation: Mapping[str, Any]) -> ModelSpec:
        hidden, heads = self.count("hidden_size"), self.count("num_attention_heads")
        kv_heads = self.count("num_key_value_heads", _DEFAULT_KV_HEADS.get(self.family, heads))
        if heads % kv_heads:
            raise ModelError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})."
            )
        layers = self.count("num_hidden_layers")
        bias = self.family == "qwen2" or self.flag("attention_bias", False)
        activation = self.config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"The activation {activation!r} does not run here; silu does.")
        return ModelSpec(
            architecture=self.architecture,
            family=self.family,
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=self.count("head_dim", _DEFAULT_HEAD_DIM.get(self.family, hidden // heads)),
            intermediate_size=self.count("intermediate_size"),
            vocab_size=self.count("vocab_size"),
            max_positions=self.count("max_position_embeddings", _DEFAULT_MAX_POSITIONS[self.family]),
            rope=self.rope(),
            norm_eps=self.number(self.config, "rms_norm_eps", _DEFAULT_NORM_EPS),
            windows=self.windows(layers),
            tied_embeddings=self.flag("tie_word_embeddings", False),
            qkv_bias=bias,
            o_bias=bias and self.family != "qwen2",
            mlp_bias=self.family == "llama" and self.flag("mlp_bias", False),
            qk_norm=self.family == "qwen3",
            dtype=self.dtype(),
            eos_ids=_ids(generation.get("eos_token_id"), self.config.get("eos_token_id")),
            bos_id=next(iter(_ids(self.config.get("bos_token_id"))), None),
            pad_id=next(iter(_ids(self.config.get("pad_token_id"))), None),
        )

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            found = "missing" if value is None else f"{value!r}"
            raise ModelError(f"config.json: {key} must be a positive integer, and is {found}.")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        return default if value is None else bool(value)

    def number(self, table: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = table.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "missing" if value is None else f"{value!r}"
            raise ModelError(f"config.json: {key} must be a number, and is {found}.")
        return float(value)

    def dtype(self) -> str:
        # transformers 5 writes `dtype`, 4 wrote `torch_dtype`; old files may have neither and mean float32.
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        name = str(name).removeprefix("torch.")
        return name if name in DTYPE_BYTES else "bfloat16"

    def rope(self) -> RopeSpec:
        """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
        new, old = self.config.get("rope_parameters") or {}, self.config.get("rope_scaling") or {}
        table: Mapping[str, Any] = {**old, **new}
        kind = str(table.get("rope_type") or table.get("type") or "default")
        theta = self.number({**self.config, **table}, "rope_theta", _DEFAULT_THETA)
        partial = self.number({**self.config, **table}, "partial_rotary_factor", 1.0)
        if partial != 1.0:
            raise ModelError(f"Rotary embeddings on part of a head ({partial:g} of it) do not run here.")
        if kind == "default":
            return RopeSpec(theta)
        if kind == "linear":
            return RopeSpec(theta, kind, self.number(table, "factor"))
        if kind == "llama3":
            return RopeSpec(
                theta,
                kind,
                self.number(table, "factor"),
                self.number(table, "low_freq_factor"),
                self.number(table, "high_freq_factor"),
                int(self.number(table, "original_max_position_embeddings")),
            )
        raise ModelError(
            f"The rope type {kind!r} does not run here; default, linear and llama3 do.",
            "Take rope_scaling out of config.json to run the model at its original context length.",
        )

    def windows(self, layers: int) -> tuple[int | None, ...]:
        """Per layer, as the family's class in transformers decides it."""
        if self.family == "llama":
            return (None,) * layers
        qwen = self.family in ("qwen2", "qwen3")
        window = self.config.get("sliding_window", _DEFAULT_WINDOW.get(self.family))
        if window is None or (qwen and not self.flag("use_sliding_window", False)):
            return (None,) * layers
        size = self.count("sliding_window", _DEFAULT_WINDOW.get(self.family))
        types = self.config.get("layer_types")
        if types is None:
            full = self.config.get("max_window_layers", 28) if qwen else 0
            return tuple(None if i < full else size for i in range(layers))
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            found = f"{len(types)} entries" + (f" with {', '.join(sorted(unknown))}" if unknown else "")
            raise ModelError(
                f"config.json: layer_types must name full_attention or sliding_attention for each of the "
                f"{layers} layers, and has {found}."
            )
        return tuple(size if kind == "sliding_attention" else None for kind in types)


def _ids(*sources: Any) -> tuple[int, ...]:
    """Token ids of fields that hold an id, a list of them or nothing; each once, in order."""
    found: dict[int, None] = {}
    for source in sources:
        for token in source if isinstance(source, list) else [source]:
            if isinstance(token, int) and not isinstance(token, bool):
                found[token] = None
    return tuple(found)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ModelError(f"{path} cannot be read as JSON: {e}.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return data
