"""A GGUF file as a Hugging Face directory, converted once to bfloat16 safetensors.

Read directly: transformers' own GGUF loading needs `accelerate`, holds the whole model in memory and keeps the
weights packed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf.gguf_reader import ReaderTensor
from safetensors.torch import save_file

from llmtool.errors import ModelError
from llmtool.models.cache import Progress
from llmtool.models.gguf_families import ROPE_TENSORS, TOP, GGUFFamily, family_of, rope_parameters
from llmtool.models.gguf_file import GGUFFile, dequantised
from llmtool.models.gguf_tokenizer import write_tokenizer
from llmtool.modelspec import ModelSpec

SHARD_BYTES = 2 * 2**30  # what is held in memory at a time


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight to write. name: Hugging Face's. index: of the matrix among those stacked in the tensor."""

    name: str
    tensor: ReaderTensor
    index: int | None = None

    @property
    def nbytes(self) -> int:
        """In bfloat16."""
        stacked = 1 if self.index is None else int(self.tensor.shape[-1])
        return int(self.tensor.n_elements) // stacked * 2


def convert(path: Path, directory: Path, progress: Progress | None = None) -> None:
    """Write the GGUF file `path` into `directory` as a Hugging Face model.

    progress: called with bytes written and in all. Raises ModelError for a file that is no GGUF or does not run.
    """
    file = GGUFFile(path)
    family = family_of(file)
    config = read_config(file, family)
    ModelSpec.from_config(config)  # refuses what would not run before the long part
    _write_json(directory / "config.json", config)
    ends = end_tokens(file)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends[0] if len(ends) == 1 else ends}
    _write_json(directory / "generation_config.json", generation)
    write_tokenizer(path, file.metadata, directory)
    _write_weights(file, family, directory, progress or (lambda done, total: None))


def read_config(file: GGUFFile, family: GGUFFamily) -> dict[str, Any]:
    """What config.json would say."""
    hidden, heads = file.get("embedding_length"), file.get("attention.head_count")
    head_dim = file.get("attention.key_length", hidden // heads)
    rotary = file.get("rope.dimension_count", head_dim)
    if rotary != head_dim and family.paired:
        raise ModelError(
            f"{file.path.name} turns {rotary} of a head's {head_dim} dimensions, which does not run here."
        )
    return {
        "architectures": [family.architecture],
        "model_type": file.architecture,
        "hidden_size": hidden,
        "num_hidden_layers": file.get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": file.get("feed_forward_length"),
        "vocab_size": int(
            file.tensor("token_embd.weight").shape[1]
        ),  # GGUF gives the innermost dimension first
        "max_position_embeddings": file.get("context_length"),
        "rms_norm_eps": file.decimal("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "rope_parameters": rope_parameters(file, rotary),
        "partial_rotary_factor": None if rotary == head_dim else rotary / head_dim,
        "dtype": "bfloat16",
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
        **family.fields(file),
    }


def end_tokens(file: GGUFFile) -> list[int]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [file.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def weights(file: GGUFFile, family: GGUFFamily) -> Iterator[Weight]:
    """Every weight to write. Raises ModelError for a tensor that has no place."""
    unknown = []
    for name, tensor in file.tensors.items():
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        layer, stem, kind = match.groups() if match else (None, None, None)
        table = TOP if layer is None else family.blocks
        if name in ROPE_TENSORS:
            continue
        if stem is None or stem not in table:
            unknown.append(name)
            continue
        full = f"{'' if layer is None else f'model.layers.{layer}.'}{table[stem]}.{kind}"
        if "{}" in full:
            yield from (Weight(full.format(i), tensor, i) for i in range(int(tensor.shape[-1])))
        else:
            yield Weight(full, tensor)
    if unknown:
        raise ModelError(
            f"{file.path.name} has tensors that do not run here: {', '.join(unknown[:8])}"
            f"{f' and {len(unknown) - 8} more' if len(unknown) > 8 else ''}."
        )


def read(file: GGUFFile, family: GGUFFamily, weight: Weight) -> torch.Tensor:
    """One weight in bfloat16, as Hugging Face has it."""
    data = dequantised(weight.tensor, weight.index)
    # llama.cpp turns neighbouring rows of a head, Hugging Face rows half a head apart: undo its permutation.
    if family.paired and ".q_proj." in weight.name:
        data = half_split_rows(data, file.get("attention.head_count"))
    elif family.paired and ".k_proj." in weight.name:
        data = half_split_rows(data, file.get("attention.head_count_kv", file.get("attention.head_count")))
    elif weight.name.endswith("norm.weight"):
        data = data - family.norm_offset
    elif weight.name.endswith("shared_expert_gate.weight"):
        data = data.view(1, -1)  # stored as a vector
    return data.to(torch.bfloat16).contiguous()


def half_split_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from pairs (0, 1), (2, 3), ... to halves (0, 2, ...), (1, 3, ...)."""
    pairs = rows.unflatten(0, (heads, -1, 2))  # [heads, D/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)


def _write_weights(file: GGUFFile, family: GGUFFamily, directory: Path, progress: Progress) -> None:
    """Safetensors shards of at most SHARD_BYTES (a larger tensor gets its own), and their index if several."""
    shards: list[list[Weight]] = [[]]
    room = SHARD_BYTES
    for weight in weights(file, family):
        if shards[-1] and weight.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(weight)
        room -= weight.nbytes
    total, done, where = sum(weight.nbytes for shard in shards for weight in shard), 0, {}
    progress(0, total)
    for i, shard in enumerate(shards, start=1):
        filename = (
            "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        )
        tensors = {}
        for weight in shard:
            tensors[weight.name] = read(file, family, weight)
            where[weight.name] = filename
            done += weight.nbytes
            progress(done, total)
        save_file(tensors, str(directory / filename), metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}, indent=2), encoding="utf-8")
