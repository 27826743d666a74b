"""Structured output: which tokens a grammar allows next, by llguidance.

Torch-free, so that the API process can refuse a bad grammar before admission (`validate_grammar`) while the engine
holds the matchers. A matcher moves by accepted tokens only, and is rebuilt by replaying the output of a
sequence that is resumed.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llmtool.core.request import Grammar
from llmtool.errors import ModelError, RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# JSON as json.dumps writes it. Free whitespace between tokens invites small models to emit blanks without end.
JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,  # oneOf as anyOf: exactly-one cannot be held while generating
}
MAX_MESSAGE = 300  # characters of llguidance's explanation that a user gets to see
MAX_COMPILED = 64  # grammars kept compiled
MAX_SOURCE = 128 * 1024  # characters; beyond it compiling alone takes seconds


def grammar_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """llguidance's view of a tokenizer. tokenizer_json: the text of tokenizer.json; vocab_size: the model's.

    Takes about 0.15 s for 50k tokens. Raises ModelError when llguidance cannot read the tokenizer.
    """
    from llguidance import LLTokenizer

    eos = list(eos_token_ids) or None
    try:
        try:
            return LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos)
        except ValueError as e:
            if "vocab size too small" not in str(e):
                raise
            # More tokens than logits: the rest can never be sampled.
            return LLTokenizer(tokenizer_json, eos_token=eos)
    except ValueError as e:
        raise ModelError(f"The tokenizer cannot be used for structured output: {_shorten(str(e))}") from None


def validate_grammar(grammar: Grammar, tokenizer: LLTokenizer | None = None) -> None:
    """Raise RequestError with a sentence when `grammar` cannot be compiled.

    Complex grammars take up to a second: call it off the event loop.
    """
    from llguidance import LLMatcher

    problem = LLMatcher.validate_grammar(grammar_source(grammar), tokenizer)
    if problem:
        raise _refusal(grammar, _shorten(problem))


def grammar_source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form. Raises RequestError: unknown kind, too long, not JSON."""
    from llguidance import LLMatcher

    if len(grammar.text) > MAX_SOURCE:
        raise _refusal(grammar, f"it has {len(grammar.text)} characters, more than {MAX_SOURCE}")
    if grammar.kind == "regex":
        return str(LLMatcher.grammar_from_regex(grammar.text))
    if grammar.kind == "lark":
        return str(LLMatcher.grammar_from_lark(grammar.text))
    if grammar.kind == "json_object":
        return str(LLMatcher.grammar_from_json_schema('{"type": "object"}', JSON_OPTIONS))
    if grammar.kind not in ("json_schema", "choice"):
        raise _refusal(grammar, f"there is no kind {grammar.kind!r}")
    try:
        value = json.loads(grammar.text)
        if grammar.kind == "json_schema":
            return str(LLMatcher.grammar_from_json_schema(grammar.text, JSON_OPTIONS))
    except (ValueError, RecursionError) as e:
        raise _refusal(grammar, f"it is not valid JSON ({_shorten(str(e))})") from None
    if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
        raise _refusal(grammar, "choices must be a list of one or more non-empty strings")
    return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in value)))


class GrammarCompiler:
    """Matchers for the sequences of one engine; a grammar seen before is copied, not compiled again."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self.tokenizer = tokenizer
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def matcher(self, grammar: Grammar, output: Sequence[int] = ()) -> LLMatcher:
        """A matcher that has accepted `output`. Raises RequestError when grammar and output do not go together."""
        from llguidance import LLMatcher

        fresh = self._compiled.pop(grammar, None)
        if fresh is None:
            fresh = LLMatcher(self.tokenizer, grammar_source(grammar), log_level=0)
            if fresh.is_error():
                raise _refusal(grammar, _shorten(fresh.get_error()))
        self._compiled[grammar] = fresh
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        matcher = fresh.deep_copy()
        problem = accept(matcher, output)
        if problem:
            raise RequestError(problem)
        return matcher

    def words(self, matchers: Sequence[LLMatcher]) -> NDArray[np.int32]:
        """Allowed next tokens, [G, ceil(V / 32)], bit t % 32 of word t // 32."""
        return allowed_words(matchers, self.tokenizer.vocab_size)


def accept(matcher: LLMatcher, tokens: Sequence[int]) -> str:
    """Move the matcher on by `tokens`; returns "" or a sentence. What follows the grammar's end is free."""
    for token in tokens:
        if matcher.is_stopped() and not matcher.is_error():
            return ""
        if not matcher.consume_token(token):
            return f"The grammar does not allow token {token}: {why_stopped(matcher)}."
    return ""


def why_stopped(matcher: LLMatcher) -> str:
    """Why a matcher is in its error state, in a line."""
    return _shorten(matcher.get_error())


def allowed_words(matchers: Sequence[LLMatcher], vocab_size: int) -> NDArray[np.int32]:
    words = np.zeros((len(matchers), -(-vocab_size // 32)), np.int32)
    for row, matcher in zip(words, matchers, strict=True):
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    return words


def _refusal(grammar: Grammar, why: str) -> RequestError:
    param = "response_format" if grammar.kind.startswith("json") else "structured_outputs"
    return RequestError(f"The {grammar.kind.replace('_', ' ')} grammar cannot be used: {why}.", param=param)


def _shorten(message: str) -> str:
    """llguidance's first paragraph on one line; what follows it are dumps of its state."""
    line = " ".join(message.split("\n<state>")[0].split()).rstrip(".")
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"
