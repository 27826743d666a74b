"""Grammars checked before a request reaches the engine, with the tokenizer they will run on."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from llmtool.core.request import Grammar
from llmtool.errors import ModelError, RequestError
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.structured import (
    GrammarCompiler,
    allowed_words,
    grammar_tokenizer,
    validate_grammar,
    why_stopped,
)

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class GrammarChecker:
    """Raises RequestError for a grammar that cannot be compiled, or a choice that the model has no tokens for.
    Safe to call from several threads.

    llguidance's view of the tokenizer takes a moment to build: `prepare` does so ahead, or the first constrained
    request waits for it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._view: LLTokenizer | None = None
        self._building = threading.Lock()

    def prepare(self) -> None:
        with suppress(ModelError):  # a tokenizer that llguidance cannot read: for who asks for a grammar
            self._tokens()

    def __call__(self, grammar: Grammar) -> None:
        view = self._tokens()
        validate_grammar(grammar, view)
        check_startable(grammar, view)
        if grammar.kind == "choice":
            check_writable(json.loads(grammar.text), view)

    def _tokens(self) -> LLTokenizer:
        with self._building:
            if self._view is None:
                source = self._tokenizer.backend.to_str()
                self._view = grammar_tokenizer(source, self._vocab_size, self._eos_token_ids)
            return self._view


def check_startable(grammar: Grammar, view: LLTokenizer) -> None:
    """Some grammars compile and fail at the first token, as a schema that only refers to itself does."""
    matcher = GrammarCompiler(view).matcher(grammar)
    allowed_words([matcher], view.vocab_size)
    if matcher.is_error():
        raise RequestError(
            f"The {grammar.kind.replace('_', ' ')} grammar cannot be used: {why_stopped(matcher)}.",
            param="response_format" if grammar.kind.startswith("json") else "structured_outputs",
        )


def check_writable(choices: Sequence[str], view: LLTokenizer) -> None:
    """Some vocabularies lack some bytes, of rare planes of Unicode or control characters. llguidance leaves such a
    byte out and then contradicts its own mask, in the middle of the answer.
    """
    for choice in choices:
        text = choice.encode()
        if view.decode_bytes(view.tokenize_bytes(text)) != text:
            raise RequestError(
                f"The choice {choice[:50]!r} has characters that this model's tokenizer cannot write.",
                param="structured_outputs",
            )
