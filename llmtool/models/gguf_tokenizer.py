"""The tokenizer inside a GGUF file, as tokenizer.json and tokenizer_config.json.

Byte-level BPE is built here, because a GGUF file names its pre-tokenizer instead of describing it, and
transformers takes GPT-2's for every such file: SmolLM2's splits digits first, so "\\n\\n1" would come out wrong.
SentencePiece vocabularies go through transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llmtool.errors import ModelError

# llama.cpp's token types
CONTROL, USER_DEFINED = 3, 4
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
# Words by case: upper or other letters, then lower or other letters, one of the two at least.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(path: Path, metadata: Mapping[str, Any], directory: Path) -> None:
    """Write the tokenizer of the GGUF file `path` with this metadata. Raises ModelError for a kind not known."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        byte_level_bpe(metadata).save(str(directory / "tokenizer.json"))
        config = {**special_tokens(metadata), "tokenizer_class": "PreTrainedTokenizerFast"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    elif kind == "llama":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        tokenizer.save_pretrained(str(directory))
    else:
        raise ModelError(
            f"The tokenizer kind {kind!r} of {path.name} is not known here; gpt2 and llama are.",
            "Use the model's original Hugging Face directory.",
        )
    template = metadata.get("tokenizer.chat_template")
    if template:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def byte_level_bpe(metadata: Mapping[str, Any]) -> Tokenizer:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    name = metadata.get("tokenizer.ggml.pre", "default")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    # Llama 3 looks a whole piece up before it merges.
    bpe = models.BPE(
        vocab=vocabulary, merges=merges, ignore_merges=name in ("llama-bpe", "llama3", "llama-v3")
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = _pre_tokenizer(name)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        (token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in added if k == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in added if k == USER_DEFINED])
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": "<|im_start|>", ...} of those the file names."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The splitter behind a value of tokenizer.ggml.pre."""
    if name in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("smollm", "refact"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    llama3 = ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe")
    patterns = {**dict.fromkeys(llama3, _LLAMA3), "qwen2": _QWEN2, "tekken": _TEKKEN}
    if name not in patterns:
        known = ", ".join(["gpt-2", "smollm", "refact", *patterns])
        raise ModelError(
            f"The GGUF file's pre-tokenizer {name!r} is not known here; {known} are.",
            "Use the model's original Hugging Face directory.",
        )
    split = pre_tokenizers.Split(Regex(patterns[name]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])
