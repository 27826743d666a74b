"""Grammars checked before a request reaches the engine, with the tokenizer they will run on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmtool.core.request import Grammar
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.structured import grammar_tokenizer, validate_grammar

if TYPE_CHECKING:
    from llguidance import LLTokenizer


class GrammarChecker:
    """Raises RequestError for a grammar that cannot be compiled. Safe to call from several threads.

    llguidance's view of the tokenizer takes a moment to build, so the first constrained request pays for it.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._view: LLTokenizer | None = None
        self._building = threading.Lock()

    def __call__(self, grammar: Grammar) -> None:
        with self._building:
            if self._view is None:
                source = self._tokenizer.backend.to_str()
                self._view = grammar_tokenizer(source, self._vocab_size, self._eos_token_ids)
        validate_grammar(grammar, self._view)
