"""A GGUF file of the Llama family as a Hugging Face directory, converted once to bfloat16 safetensors.

Read directly: transformers' own GGUF loading needs `accelerate`, holds the whole model in memory and keeps the
weights packed. Names and the order of rotary rows follow llama.cpp's convert_hf_to_gguf.py, inverted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize
from safetensors.torch import save_file

from llmtool.errors import ModelError
from llmtool.models.cache import Progress
from llmtool.models.gguf_tokenizer import write_tokenizer
from llmtool.models.rope import inverse_frequencies
from llmtool.modelspec import ModelSpec, RopeSpec

SHARD_BYTES = 2 * 2**30  # what is held in memory at a time
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling, as a divisor per frequency


def convert(path: Path, directory: Path, progress: Progress | None = None) -> None:
    """Write the GGUF file `path` into `directory` as a Hugging Face model.

    progress: called with bytes written and in all. Raises ModelError for a file that is no GGUF or does not run.
    """
    file = GGUFFile(path)
    config = file.config()
    ModelSpec.from_config(config)  # refuses what would not run before the long part
    _write_json(directory / "config.json", config)
    ends = file.end_tokens()
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends[0] if len(ends) == 1 else ends}
    _write_json(directory / "generation_config.json", generation)
    write_tokenizer(path, file.metadata, directory)
    _write_weights(file, directory, progress or (lambda done, total: None))


class GGUFFile:
    """One GGUF file: its metadata, and its tensors under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as e:
            raise ModelError(f"{path} is not a readable GGUF file: {e}.", "Download it again.") from e
        self.path = path
        self.tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ModelError(
                f"The GGUF architecture {self.architecture!r} of {path.name} does not run here.",
                f"These do: {', '.join(sorted(ARCHITECTURES))}.",
            )
        if self.metadata.get("split.count", 1) > 1:
            raise ModelError(
                f"{path.name} is one of {self.metadata['split.count']} parts.",
                "Join them with llama.cpp's `llama-gguf-split --merge` first.",
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The value of the architecture's own key, such as attention.head_count."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(
                f"{self.path.name} lacks the GGUF key {self.architecture}.{key}.", "Download it again."
            )
        return value

    def config(self) -> dict[str, Any]:
        """What config.json would say."""
        hidden, heads = self.get("embedding_length"), self.get("attention.head_count")
        if self.get("expert_count", 0):
            raise ModelError(f"{self.path.name} is a mixture of experts, which does not run here.")
        embedding = self._tensor("token_embd.weight")
        head_dim = self.get("attention.key_length", hidden // heads)
        rotary = self.get("rope.dimension_count", head_dim)
        if rotary != head_dim:
            raise ModelError(
                f"{self.path.name} turns {rotary} of a head's {head_dim} dimensions, which does not run here."
            )
        return {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "hidden_size": hidden,
            "num_hidden_layers": self.get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self.get("feed_forward_length"),
            "vocab_size": int(embedding.shape[1]),  # GGUF gives the innermost dimension first
            "max_position_embeddings": self.get("context_length"),
            # Stored as float32: the shortest decimal that gives it back is what the author wrote.
            "rms_norm_eps": float(str(np.float32(self.get("attention.layer_norm_rms_epsilon")))),
            "hidden_act": "silu",
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": self.architecture != "qwen2" and "blk.0.attn_q.bias" in self.tensors,
            "rope_parameters": self._rope(head_dim),
            "dtype": "bfloat16",
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
        }

    def end_tokens(self) -> list[int]:
        keys = ("eos_token_id", "eot_token_id", "eom_token_id")
        ids = [self.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        return list(dict.fromkeys(int(i) for i in ids if i is not None))

    def weights(self) -> Iterator[tuple[str, ReaderTensor]]:
        """(Hugging Face's name, tensor) of every weight. Raises ModelError for one that has no place."""
        unknown = []
        for name, tensor in self.tensors.items():
            match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
            layer, stem, kind = match.groups() if match else (None, None, None)
            table = _TOP if layer is None else _BLOCK
            if name == _ROPE_FACTORS:
                continue
            if stem in table:
                prefix = "" if layer is None else f"model.layers.{layer}."
                yield f"{prefix}{table[stem]}.{kind}", tensor
            else:
                unknown.append(name)
        if unknown:
            raise ModelError(
                f"{self.path.name} has tensors that do not run here: {', '.join(unknown[:8])}"
                f"{f' and {len(unknown) - 8} more' if len(unknown) > 8 else ''}."
            )

    def read(self, name: str, tensor: ReaderTensor) -> torch.Tensor:
        """One weight in bfloat16, its rows in Hugging Face's order."""
        data = _dequantized(tensor)
        # llama.cpp turns neighbouring rows of a head, Hugging Face rows half a head apart: undo its permutation.
        if self.architecture == "llama" and ".q_proj." in name:
            data = half_split_rows(data, self.get("attention.head_count"))
        elif self.architecture == "llama" and ".k_proj." in name:
            data = half_split_rows(
                data, self.get("attention.head_count_kv", self.get("attention.head_count"))
            )
        return data.to(torch.bfloat16).contiguous()

    def _tensor(self, name: str) -> ReaderTensor:
        if name not in self.tensors:
            raise ModelError(f"{self.path.name} lacks the tensor {name}.", "Download it again.")
        return self.tensors[name]

    def _rope(self, head_dim: int) -> dict[str, Any]:
        theta = float(self.get("rope.freq_base", 10000.0))
        kind = self.get("rope.scaling.type", "none")
        if _ROPE_FACTORS in self.tensors:
            return {"rope_theta": theta, **self._llama3(theta, head_dim)}
        if kind == "none":
            return {"rope_theta": theta, "rope_type": "default"}
        if kind != "linear":
            raise ModelError(
                f"{self.path.name} scales its rotary embeddings by {kind}, which does not run here."
            )
        return {"rope_theta": theta, "rope_type": kind, "factor": float(self.get("rope.scaling.factor"))}

    def _llama3(self, theta: float, head_dim: int) -> dict[str, Any]:
        """The file stores divisors, not the rule behind them: find the rule, and see that it gives them."""
        divisors = _dequantized(self.tensors[_ROPE_FACTORS]).flatten()
        rule = RopeSpec(head_dim, theta, "llama3", round(float(divisors.max()), 4))  # stored as float32
        plain = inverse_frequencies(RopeSpec(head_dim, theta))
        expected = plain / inverse_frequencies(rule)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-4):
            raise ModelError(
                f"{self.path.name} scales its rotary embeddings in a way that does not run here."
            )
        return {
            "rope_type": "llama3",
            "factor": rule.factor,
            "low_freq_factor": rule.low_freq_factor,
            "high_freq_factor": rule.high_freq_factor,
            "original_max_position_embeddings": rule.original_max_positions,
        }


def _dequantized(tensor: ReaderTensor) -> torch.Tensor:
    # An unquantised tensor comes as a view of the mapped file, and torch wants memory it may write.
    return torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))


def half_split_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from pairs (0, 1), (2, 3), ... to halves (0, 2, ...), (1, 3, ...)."""
    pairs = rows.unflatten(0, (heads, -1, 2))  # [heads, D/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)


def _write_weights(file: GGUFFile, directory: Path, progress: Progress) -> None:
    """Safetensors shards of at most SHARD_BYTES (a larger tensor gets its own), and their index if several."""
    weights = list(file.weights())
    sizes = {name: int(tensor.n_elements) * 2 for name, tensor in weights}
    shards: list[list[tuple[str, ReaderTensor]]] = [[]]
    room = SHARD_BYTES
    for name, tensor in weights:
        if shards[-1] and sizes[name] > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append((name, tensor))
        room -= sizes[name]
    total, done, where = sum(sizes.values()), 0, {}
    progress(0, total)
    for i, shard in enumerate(shards, start=1):
        filename = (
            "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        )
        tensors = {}
        for name, tensor in shard:
            tensors[name] = file.read(name, tensor)
            where[name] = filename
            done += sizes[name]
            progress(done, total)
        save_file(tensors, str(directory / filename), metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}, indent=2), encoding="utf-8")
