"""Weights from safetensors into the decoder's fused matrices, one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtool.errors import ModelError
from llmtool.models.decoder import Decoder, DecoderWeights, LayerWeights
from llmtool.modelspec import ModelSpec

Progress = Callable[[int, int], None]  # bytes done, bytes in all

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Buffers that old exporters saved beside the weights; rotary frequencies are computed here.
_IGNORED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|.*\.masked_bias$")


def load(
    directory: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """The decoder of a Hugging Face directory, its weights cast to dtype on device.

    load_format: auto reads *.safetensors; dummy draws random weights from `seed` and needs config.json only.
    Peak memory is the fused weights plus the one tensor being copied. Raises ModelError naming every tensor
    that is missing, unexpected or of the wrong shape.
    """
    directory = Path(directory)
    spec = ModelSpec.from_dir(directory)
    weights = allocate(spec, dtype, torch.device(device))
    if load_format == "dummy":
        fill_random(weights, seed)
    else:
        _fill(spec, weights, directory, progress or (lambda done, total: None))
    return Decoder(spec, weights)


def allocate(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> DecoderWeights:
    """Uninitialised weights of the right shapes."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    qkv_rows = (spec.num_heads + 2 * spec.num_kv_heads) * dim
    layers = [
        LayerWeights(
            attention_norm=new(hidden),
            qkv=new(qkv_rows, hidden),
            o=new(hidden, spec.num_heads * dim),
            mlp_norm=new(hidden),
            gate_up=new(2 * inner, hidden),
            down=new(hidden, inner),
            qkv_bias=new(qkv_rows) if spec.qkv_bias else None,
            o_bias=new(hidden) if spec.o_bias else None,
            gate_up_bias=new(2 * inner) if spec.mlp_bias else None,
            down_bias=new(hidden) if spec.mlp_bias else None,
            q_norm=new(dim) if spec.qk_norm else None,
            k_norm=new(dim) if spec.qk_norm else None,
        )
        for _ in range(spec.num_layers)
    ]
    embedding = new(spec.vocab_size, hidden)
    lm_head = embedding if spec.tied_embeddings else new(spec.vocab_size, hidden)
    return DecoderWeights(embedding, layers, new(hidden), lm_head)


def targets(spec: ModelSpec, weights: DecoderWeights) -> dict[str, Tensor]:
    """Hugging Face's tensor names -> the views of the fused weights they fill."""
    table = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.norm}
    if not spec.tied_embeddings:
        table["lm_head.weight"] = weights.lm_head
    q, kv, inner = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
    for i, layer in enumerate(weights.layers):
        fused = {
            "self_attn": (("q_proj", "k_proj", "v_proj"), (q, kv, kv), layer.qkv, layer.qkv_bias),
            "mlp": (("gate_proj", "up_proj"), (inner, inner), layer.gate_up, layer.gate_up_bias),
        }
        for block, (names, rows, weight, bias) in fused.items():
            for kind, tensor in (("weight", weight), ("bias", bias)):
                if tensor is not None:
                    parts = zip(names, tensor.split(rows), strict=True)
                    table |= {f"model.layers.{i}.{block}.{name}.{kind}": part for name, part in parts}
        plain = {
            "input_layernorm.weight": layer.attention_norm,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "self_attn.o_proj.weight": layer.o,
            "self_attn.o_proj.bias": layer.o_bias,
            "self_attn.q_norm.weight": layer.q_norm,
            "self_attn.k_norm.weight": layer.k_norm,
            "mlp.down_proj.weight": layer.down,
            "mlp.down_proj.bias": layer.down_bias,
        }
        table |= {f"model.layers.{i}.{name}": t for name, t in plain.items() if t is not None}
    return table


def fill_random(weights: DecoderWeights, seed: int) -> None:
    """Random weights of a trained model's scale, the same for a seed on every run of one device."""
    device = weights.embedding.device
    generator = torch.Generator(device).manual_seed(seed)
    for layer in weights.layers:
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            matrix.normal_(0.0, matrix.shape[1] ** -0.5, generator=generator)
        for bias in (layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias):
            if bias is not None:
                bias.normal_(0.0, 0.02, generator=generator)
        for norm in (layer.attention_norm, layer.mlp_norm, layer.q_norm, layer.k_norm):
            if norm is not None:
                norm.fill_(1.0)
    weights.norm.fill_(1.0)
    weights.embedding.normal_(0.0, 0.02, generator=generator)
    if weights.lm_head is not weights.embedding:
        weights.lm_head.normal_(0.0, 0.02, generator=generator)


def weight_files(directory: Path) -> list[Path]:
    """A model's safetensors files: those its index names, else all. Raises ModelError when there are none."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as e:
            raise ModelError(f"{index} is not a safetensors index: {e!r}.") from None
        files = [directory / name for name in names]
        absent = [f.name for f in files if not f.is_file()]
        if absent:
            raise ModelError(
                f"{directory} lacks {', '.join(absent)}, which its index names.", "Download it again."
            )
        return files
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{directory} holds no *.safetensors weights.",
            "Convert them (transformers' save_pretrained writes safetensors), or use --load-format dummy.",
        )
    return files


def _fill(spec: ModelSpec, weights: DecoderWeights, directory: Path, progress: Progress) -> None:
    wanted = targets(spec, weights)
    total = sum(t.numel() * t.element_size() for t in wanted.values())
    unexpected, wrong, done = [], [], 0
    progress(0, total)
    for name, tensor in _tensors(weight_files(directory)):
        target = wanted.pop(name, None)
        if target is None:
            redundant = (
                name == "lm_head.weight" and spec.tied_embeddings
            )  # some exporters write the tied one too
            if not redundant and not _IGNORED.fullmatch(name):
                unexpected.append(name)
        elif target.shape != tensor.shape:
            wrong.append(f"{name} is {list(tensor.shape)}, config.json asks for {list(target.shape)}")
        else:
            target.copy_(tensor)
            done += target.numel() * target.element_size()
            progress(done, total)
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", list(wanted)), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ModelError(
            f"The weights in {directory} do not fit its config.json: {'; '.join(problems)}.",
            "Check that config.json and the safetensors files come from the same model.",
        )


def _tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) on CPU, memory-mapped: a tensor is read when it is copied, and dropped then."""
    with ExitStack() as stack:
        for path in files:
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as e:
                raise ModelError(
                    f"{path} is not a readable safetensors file: {e}.", "Download it again."
                ) from None
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, file.get_tensor(name)
