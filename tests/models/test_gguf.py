"""GGUF conversion: tiny models written as llama.cpp's converter writes them, and the embedded SmolLM2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors import safe_open

from llmtool.errors import ModelError
from llmtool.models import gguf as converter
from llmtool.models.loader import load
from llmtool.models.resolve import resolve
from llmtool.models.tokenizer import BYTE_OF_CHAR, Tokenizer
from llmtool.modelspec import ModelSpec
from tests.models.paged import PagedSequences

Tiny = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTROL = ["<|end|>", "<|start|>"]
TOKENS = [*CONTROL, *BYTE_OF_CHAR, "Ġt", "he", "Ġthe", "ĊĊ", "<tool>"]
MERGES = ["Ġ t", "h e", "Ġt he", "Ċ Ċ"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁these"]
PIECES = [*dict.fromkeys(PIECES), "th", "the", "▁the"]
TYPES = [3, 3, *[1] * 256, 1, 1, 1, 1, 4]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "cache"))


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.{kind}"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's LlamaModel.permute: row r of the second half of a head comes after row r of the first."""
    order = [
        head * (len(weight) // heads) + half * (len(weight) // heads // 2) + pair
        for head in range(heads)
        for pair in range(len(weight) // heads // 2)
        for half in range(2)
    ]
    return weight[order]


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    arch: str,
    extra: dict[str, Any] | None = None,
    pre: str = "smollm",
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    if pre == "sentencepiece":
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259)])
        writer.add_token_scores([-float(i) for i in range(len(PIECES))])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types(TYPES)
        writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0 if pre != "sentencepiece" else 2)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")
    for key, value in (extra or {}).items():
        {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}[
            type(value)
        ](key, value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and "q_proj" in name:
            weight = permuted(weight, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            weight = permuted(weight, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), weight.numpy())
    if config.rope_parameters.get("rope_type") == "llama3":
        rotary = model.model.rotary_emb
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("family", "arch"),
    [
        ("llama", "llama"),
        ("smollm", "llama"),
        ("llama-biased", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
    ],
)
def test_a_converted_model_is_the_model(tiny: Tiny, tmp_path: Path, family: str, arch: str) -> None:
    reference, original = tiny(family)
    if family == "llama-biased":  # llama.cpp has no place for biases of the MLP
        config = reference.config.to_dict() | {"mlp_bias": False}
        torch.manual_seed(1)
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(config)).eval()
        original = tmp_path / "original"
        reference.save_pretrained(original)
    directory = resolve(str(write(tmp_path / "tiny.gguf", reference, arch)))
    ids = [5, 9, 33, 2, 71, 8]
    (ours,) = PagedSequences(load(directory, torch.bfloat16)).step({"a": ids})
    (same,) = PagedSequences(load(original, torch.bfloat16)).step({"a": ids})
    assert torch.equal(ours, same)
    spec, expected = ModelSpec.from_dir(directory), ModelSpec.from_dir(original)
    assert (spec.ropes, spec.norm_eps, spec.max_positions) == (
        expected.ropes,
        expected.norm_eps,
        expected.max_positions,
    )
    assert (spec.eos_ids, spec.bos_id) == ((0,), 1)


def test_quantised_weights_are_dequantised(tiny: Tiny, tmp_path: Path) -> None:
    reference, _ = tiny("smollm")
    path = write(tmp_path / "a.gguf", reference, "llama")
    weight = torch.randn(8, 64)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    packed = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = converter.GGUFFile(path)
    tensor = next(t for t in gguf.GGUFReader(tmp_path / "b.gguf").tensors)
    read = file.read("model.layers.0.mlp.up_proj.weight", tensor)
    assert read.dtype == torch.bfloat16
    torch.testing.assert_close(read.float(), weight, atol=0.03, rtol=0.02)


def test_llama3_scaling_is_found_again_from_its_divisors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        **sizes, vocab_size=97, max_position_embeddings=131072, rope_parameters=rope
    )
    model = transformers.LlamaForCausalLM(config)
    spec = ModelSpec.from_dir(resolve(str(write(tmp_path / "a.gguf", model, "llama"))))
    assert (
        spec.ropes == ModelSpec.from_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}).ropes
    )
    odd = transformers.LlamaConfig.from_dict(
        config.to_dict() | {"rope_parameters": rope | {"low_freq_factor": 2.0}}
    )
    path = write(tmp_path / "b.gguf", transformers.LlamaForCausalLM(odd), "llama")
    with pytest.raises(ModelError, match="rotary embeddings in a way"):
        resolve(str(path))


def test_tokenizer_of_a_file(tiny: Tiny, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], "llama", {"tokenizer.ggml.add_bos_token": True})
    tokenizer = Tokenizer.from_dir(resolve(str(path)))
    assert tokenizer.vocab_size == len(TOKENS)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (0, 1, None)
    assert tokenizer.special_ids == {0, 1}
    ids = tokenizer.encode("x the<|end|><tool>\n\n1")
    assert [tokenizer.id_to_piece(i) for i in ids] == [
        "<|start|>",
        "x",
        "Ġthe",
        "<|end|>",
        "<tool>",
        "ĊĊ",
        "1",
    ]
    assert tokenizer.decode(ids) == "x the<tool>\n\n1"
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "he"}])
    assert prompt.text == "he<|end|>"
    assert [tokenizer.id_to_piece(i) for i in prompt.token_ids] == ["he", "<|end|>"]


def test_sentencepiece_tokenizer_of_a_file(tiny: Tiny, tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.add_bos_token": True}
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], "llama", extra, pre="sentencepiece")
    tokenizer = Tokenizer.from_dir(resolve(str(path)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("the é</s>")
    assert [tokenizer.id_to_piece(i) for i in ids] == ["<s>", "▁the", "▁", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(ids) == "the é"
    assert tokenizer.has_chat_template


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Ċ", "Ċ", "123"]),
        ("smollm", ["ĊĊ", "1", "2", "3"]),
        ("qwen2", ["ĊĊ", "1", "2", "3"]),
        ("llama-bpe", ["ĊĊ", "123"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_do(
    tiny: Tiny, tmp_path: Path, pre: str, pieces: list[str]
) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], "llama", pre=pre)
    tokenizer = Tokenizer.from_dir(resolve(str(path)))
    assert tokenizer.backend.pre_tokenizer is not None
    assert [p for p, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("\n\n123")] == pieces


@pytest.mark.parametrize(
    ("arch", "extra", "pre", "message"),
    [
        ("gemma2", {}, "smollm", "architecture 'gemma2'"),
        ("llama", {"llama.expert_count": 8}, "smollm", "mixture of experts"),
        ("llama", {"split.count": 3}, "smollm", "one of 3 parts"),
        (
            "llama",
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
            "smollm",
            "rotary embeddings by yarn",
        ),
        ("llama", {"llama.rope.dimension_count": 4}, "smollm", "turns 4 of a head's 8"),
        ("llama", {}, "klingon", "pre-tokenizer 'klingon'"),
    ],
)
def test_refusals(
    tiny: Tiny, tmp_path: Path, arch: str, extra: dict[str, Any], pre: str, message: str
) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], arch, extra, pre)
    with pytest.raises(ModelError, match=message):
        resolve(str(path))
    assert not list((tmp_path / "cache").rglob("*.json"))  # nothing half-built is left


def test_damaged_files(tiny: Tiny, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", tiny("smollm")[0], "llama")
    whole = path.read_bytes()
    for size in (4, 30, 4000, len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match="not a readable GGUF file"):
            resolve(str(path))
    path.write_text("hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve(str(path))


def test_large_models_are_written_in_shards(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.gguf", tiny("qwen3")[0], "qwen3")
    whole = load(resolve(str(path)), torch.bfloat16)
    monkeypatch.setattr(converter, "SHARD_BYTES", 30_000)
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "other"))
    reports: list[tuple[int, int]] = []
    sharded = resolve(str(path), progress=lambda done, total: reports.append((done, total)))
    assert len(list(sharded.glob("*.safetensors"))) > 2
    ids = [4, 5, 6]
    assert torch.equal(
        PagedSequences(load(sharded, torch.bfloat16)).step({"a": ids})[0],
        PagedSequences(whole).step({"a": ids})[0],
    )
    assert reports[0] == (0, whole.spec.weight_bytes("bfloat16"))
    assert reports[-1][0] == reports[-1][1]


def test_smollm2_as_converted(smollm2: Path) -> None:
    spec = ModelSpec.from_dir(smollm2)
    assert spec.num_parameters == 134_515_008
    assert spec.eos_ids == (2,)
    assert (spec.norm_eps, spec.ropes[0].theta, spec.tied_embeddings) == (1e-5, 100000.0, True)
    assert json.loads((smollm2 / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with safe_open(smollm2 / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = Tokenizer.from_dir(smollm2)
    assert (tokenizer.id_to_piece(2), tokenizer.eos_id) == ("<|im_end|>", 2)
    # SmolLM2 was trained with digits split off first: two newlines before one stay a single token.
    assert [tokenizer.id_to_piece(i) for i in tokenizer.encode("a\n\n12")] == ["a", "ĊĊ", "1", "2"]
