"""Grammars are refused before they reach the engine."""

from __future__ import annotations

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmtool.core.request import Grammar
from llmtool.errors import RequestError
from llmtool.models.tokenizer import Tokenizer
from llmtool.serve.structured import GrammarChecker
from tests.serve.fake import tiny_tokenizer

RARE = "\U000a1234"  # in UTF-8: f2 a1 88 b4
BYTE_F2 = "ò"  # how byte-level tokenizers write it


def tokenizer_without(characters: str) -> Tokenizer:
    """Byte-level, and unable to write these bytes, as SmolLM2's is for f1 and f2."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in characters]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(["some words to learn"], trainer)
    return Tokenizer(backend, {"eos_token": "<|im_end|>"}, {})


def checker(tokenizer: Tokenizer) -> GrammarChecker:
    return GrammarChecker(tokenizer, tokenizer.backend.get_vocab_size(), (2,))


def choice(*texts: str) -> Grammar:
    return Grammar("choice", json.dumps(texts))


def test_a_choice_that_has_no_tokens_is_refused() -> None:
    check = checker(tokenizer_without(BYTE_F2))
    check(choice("red", "blau", "\u00e9", "\u00f2", "\U0001f600", "<|im_end|>"))
    with pytest.raises(RequestError, match="cannot write") as caught:
        check(choice("red", RARE))
    assert caught.value.param == "structured_outputs"


def test_a_choice_that_has_tokens_is_taken() -> None:
    checker(tiny_tokenizer())(choice("red", RARE, "\u0004"))
