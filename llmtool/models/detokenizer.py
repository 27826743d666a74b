"""Text from tokens as they come: what is certain now, and no half characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llmtool.models.tokenizer import Tokenizer

# A character is at most four tokens long; text still undecided after more of them is not UTF-8 at all.
MAX_PENDING = 16
REPLACEMENT = "�"


class Detokenizer:
    """One sequence's stream of text. The pieces of `push` and `finish` join to `Tokenizer.decode` of the tokens.

    Work per token does not grow with the sequence. prompt_ids: the tokens before the first, which tell
    SentencePiece whether its leading space belongs to the text.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        # Byte-level vocabularies: tokens are bytes, and a UTF-8 decoder keeps the started character.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Others: decode a short window twice, and what the second adds is new. Both offsets are into _ids.
        self._ids = [i for i in prompt_ids[-MAX_PENDING:] if i not in self._skip]
        self._prefix = 0
        self._read = len(self._ids)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these further tokens complete; "" while a character is unfinished."""
        kept = [i for i in token_ids if i not in self._skip]
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, kept)))
        text = ""
        for token_id in kept:
            self._ids.append(token_id)
            text += self._advance(force=len(self._ids) - self._read > MAX_PENDING)
        return text

    def finish(self) -> str:
        """What is left at the end: an unfinished character as U+FFFD, or ""."""
        if self._tokenizer.byte_level:
            return self._utf8.decode(b"", final=True)
        return self._advance(force=True)

    def _advance(self, force: bool) -> str:
        """The window's text past what has been given out, unless it ends in the middle of a character."""
        known = self._decode(self._ids[self._prefix : self._read])
        text = self._decode(self._ids[self._prefix :])
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not force):
            return ""
        del self._ids[: self._prefix]  # keep the last tokens given out: they decide the space before the next
        self._prefix, self._read = self._read - self._prefix, len(self._ids)
        return text[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
