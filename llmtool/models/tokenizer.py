"""A model's tokenizer: tokenizer.json through the `tokenizers` library, chat templates through Jinja.

Never imports torch, and transformers only once for a directory that has no tokenizer.json: importing it takes
longer than everything a server does before its first token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from llmtool.errors import ModelError, RequestError
from llmtool.models import cache
from llmtool.models.chat_template import ChatTemplate, Message, read_template

_SLOW_FILES = (
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
LONG_TEXT = 4096  # characters, milliseconds of work
_SLOW_FORMAT = 1  # of what is converted from them


class ChatPrompt(NamedTuple):
    """A rendered conversation and its tokens."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """Text to token ids and back, as transformers' AutoTokenizer does it for the same directory.

    Build it with `Tokenizer.from_dir`. Safe to share between threads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        templates: Mapping[str, str],
        source: Path | None = None,
    ) -> None:
        """special_tokens: {"bos_token": text, ...}. templates: chat templates by name. source: tokenizer.json."""
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.special_tokens = dict(special_tokens)
        self.source = source
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        self.byte_level = _is_byte_level(backend)
        self._templates = {name: ChatTemplate(text, self.special_tokens) for name, text in templates.items()}

    @classmethod
    def from_dir(cls, path: str | Path, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face directory. chat_template: Jinja source to use instead of its own.

        Raises ModelError when the directory has no tokenizer or it cannot be read.
        """
        directory = Path(path)
        file = directory / "tokenizer.json"
        if not file.is_file():
            directory = _convert_slow(directory)
            file = directory / "tokenizer.json"
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises nothing narrower
            raise ModelError(f"{file} is not a readable tokenizer: {e}.", "Download it again.") from e
        config = _read_json(directory / "tokenizer_config.json")
        _add_missing(backend, config)
        special = _special_tokens({**_read_json(directory / "special_tokens_map.json"), **config})
        templates = (
            {"default": chat_template} if chat_template is not None else read_template(directory, config)
        )
        return cls(backend, special, templates, file)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens written out in `text` become themselves; add_special_tokens adds BOS or EOS
        where the model's own tokenizer does.
        """
        if len(text) < LONG_TEXT:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        # Unlike `encode` it lets other Python threads run meanwhile, and it keeps no offsets, which are most of
        # the memory.
        return self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The same of many texts, on all cores; other Python threads run meanwhile."""
        return [
            encoding.ids
            for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        ]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int]:
        """Tokens of a pair of texts, and where the second begins as the model is told; 0 if it is not."""
        encoding = self.backend.encode(first, second)
        types: list[int] = encoding.type_ids
        return encoding.ids, types.index(1) if 1 in types else 0

    @cached_property
    def ending(self) -> list[int]:
        """The special tokens that follow every text."""
        framed, bare = self.encode("a"), self.encode("a", add_special_tokens=False)
        starts = [i for i in range(len(framed) - len(bare) + 1) if framed[i : i + len(bare)] == bare]
        return framed[starts[0] + len(bare) :] if starts and bare else []

    @cached_property
    def longest_token(self) -> int:
        """Characters of text that one token can stand for at most (spelled as bytes: at least that many)."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model's chat template writes it. Raises RequestError when it cannot."""
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates.get("default")
        if template is None:
            raise RequestError(
                "This model has no chat template.",
                "Use /v1/completions, or give the server a template with --chat-template.",
                param="messages",
            )
        return template.render(messages, tools, add_generation_prompt, **variables)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> ChatPrompt:
        """Text and tokens of the conversation; the template writes BOS itself, so none is added."""
        text = self.render_chat(messages, tools, add_generation_prompt, **variables)
        return ChatPrompt(text, self.encode(text, add_special_tokens=False))

    def id_to_piece(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token ("Ġthe"), or None for an id it does not have."""
        return self.backend.id_to_token(token_id)

    def piece_to_id(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, also when they are part of a character only; b"" for an unknown id."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self.backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self.byte_level:
            try:
                return bytes(BYTE_OF_CHAR[char] for char in piece)
            except KeyError:
                return piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])  # SentencePiece's byte fallback
        return piece.replace("▁", " ").encode()

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)


def _bytes_of_chars() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for code points from 256 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF_CHAR = _bytes_of_chars()


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether decoding is nothing but joining the tokens' bytes."""
    return isinstance(backend.decoder, tokenizers.decoders.ByteLevel)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """{"bos_token": text, ...} from entries that are strings or added-token objects."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _add_missing(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Tokens that only tokenizer_config.json declares, as transformers adds them when it loads the directory."""
    declared = config.get("added_tokens_decoder") or {}
    known = backend.get_added_tokens_decoder()
    fields = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for token_id, entry in sorted(declared.items(), key=lambda item: int(item[0])):
        if int(token_id) not in known:
            backend.add_tokens(
                [tokenizers.AddedToken(entry["content"], **{k: entry[k] for k in fields if k in entry})]
            )


def _convert_slow(directory: Path) -> Path:
    """A cached directory with the tokenizer.json that transformers makes of older tokenizer files."""
    files = [directory / name for name in _SLOW_FILES if (directory / name).is_file()]
    if not files:
        raise ModelError(
            f"{directory} holds no tokenizer (tokenizer.json, tokenizer.model or vocab.json).",
            "Name a directory that has one with --tokenizer.",
        )
    target = cache.entry("tokenizer", directory.name, files, _SLOW_FORMAT)
    return cache.ensure(target, lambda scratch: _save_fast(directory, scratch))


def _save_fast(directory: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), use_fast=True)
    except (ValueError, ImportError, KeyError) as e:
        raise ModelError(f"The tokenizer in {directory} cannot be read: {str(e).splitlines()[0]}") from e
    tokenizer.save_pretrained(str(target))
    if not (target / "tokenizer.json").is_file():
        raise ModelError(
            f"The tokenizer in {directory} is of a kind that has no tokenizer.json.",
            "Name a directory that has one with --tokenizer.",
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ModelError(f"{path} cannot be read as JSON: {e}.", "Download it again.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object.", "Download it again.")
    return data
