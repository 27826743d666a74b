"""Checkpoints in MXFP4 and block-wise FP8: the formats by their definition, and whole models stored in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmtool.errors import ModelError
from llmtool.models.dequantise import dequantise_fp8, dequantise_mxfp4, plain_tensors
from llmtool.models.loader import load
from tests.models.paged import PagedSequences

Tiny = Callable[[str], tuple[transformers.PreTrainedModel, Path]]


def test_every_mxfp4_code() -> None:
    """OCP Microscaling Formats 1.0: E2M1 is sign, two bits of exponent (bias 1), one of mantissa; E8M0 scales."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)  # one row of 16 groups, all pairs of codes
    scales = torch.tensor([[127, 128, 120, 140] * 4], dtype=torch.uint8)
    expected = []
    for byte in range(256):
        scale = 2.0 ** (int(scales[0, byte // 16]) - 127)
        for code in (byte & 15, byte >> 4):
            exponent, mantissa = (code >> 1) & 3, code & 1
            size = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            expected.append((-1) ** (code >> 3) * size * scale)
    got = dequantise_mxfp4(blocks[None], scales[None])
    assert got.dtype == torch.bfloat16 and got.shape == (1, 1, 512)
    assert got.flatten().tolist() == expected


def test_fp8_blocks_at_the_edges() -> None:
    weight = torch.randn(130, 260).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3)
    got = dequantise_fp8(weight, scale)
    for row, column in ((0, 0), (127, 128), (128, 127), (129, 259)):
        expected = weight[row, column].float() * scale[row // 128, column // 128]
        assert got[row, column] == expected.to(torch.bfloat16)


def test_halves_may_come_in_any_order_and_must_come() -> None:
    parts = {
        "a_blocks": torch.zeros(1, 2, 1, 16, dtype=torch.uint8),
        "a_scales": torch.zeros(1, 2, 1, dtype=torch.uint8),
    }
    for order in (("a_blocks", "a_scales"), ("a_scales", "a_blocks")):
        names = [
            name for name, _ in plain_tensors((name, parts[name]) for name in ("b", *order) if name in parts)
        ]
        assert names == ["a"]
    with pytest.raises(ModelError, match="a_scales without the other half"):
        list(plain_tensors(iter([("a_scales", parts["a_scales"])])))


def rewrite(
    source: Path,
    directory: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    method: dict[str, object],
) -> Path:
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    return directory


def same_logits(a: Path, b: Path) -> bool:
    ids = [5, 9, 33, 2, 71, 8]
    first, second = (PagedSequences(load(d, torch.float32)).step({"a": ids})[0] for d in (a, b))
    return torch.equal(first, second)


def test_gpt_oss_in_mxfp4_is_the_model_it_encodes(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = transformers.GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=3,
        num_experts_per_tok=2,
        vocab_size=97,
        sliding_window=6,
    )
    model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(tmp_path / "plain")
    packed: dict[str, torch.Tensor] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, inner, rows = tensors.pop(name).shape
            packed[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, inner // 32, 16)).to(torch.uint8)
            packed[f"{name}_scales"] = torch.randint(118, 126, (experts, rows, inner // 32)).to(torch.uint8)
        tensors.update(packed)

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            blocks, scales = packed[f"{name}_blocks"], packed[f"{name}_scales"]
            tensors[name] = oracle(blocks, scales).transpose(1, 2).contiguous()

    quantised = rewrite(tmp_path / "plain", tmp_path / "mxfp4", pack, {"quant_method": "mxfp4"})
    plain = rewrite(tmp_path / "plain", tmp_path / "unpacked", unpack, {})
    assert same_logits(quantised, plain)


def oracle(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """transformers' own unpacking: [E, rows, in]."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)


def test_deepseek_in_fp8_is_the_model_it_encodes(tiny: Tiny, tmp_path: Path) -> None:
    chosen = ".experts."

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if chosen in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.full((1, 1), 0.5)
        tensors["model.layers.3.enorm.weight"] = torch.zeros(4)  # of multi-token prediction: left out

    def unpack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if chosen in n]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn).float() * 0.5

    source, method = tiny("deepseek-v3")[1], {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert same_logits(
        rewrite(source, tmp_path / "fp8", pack, method), rewrite(source, tmp_path / "plain", unpack, {})
    )
