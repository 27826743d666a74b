"""A tokenizer for making prompts: from a directory's or hub id's tokenizer.json, or the server's own /tokenize.

Neither needs transformers or torch. Both satisfy llmtool.workload.requests.Tokenizer.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtool.bench.client import base_url
from llmtool.errors import UsageError


class JsonTokenizer:
    """A Hugging Face tokenizer.json. path: the file, a directory that holds it, or a hub id."""

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer

        place = Path(path)
        file = place / "tokenizer.json" if place.is_dir() else place
        try:
            self._tokenizer = (
                Tokenizer.from_file(str(file)) if file.exists() else Tokenizer.from_pretrained(path)
            )
        # The library raises bare Exception for every bad file and network failure.
        except Exception as e:
            raise UsageError(
                f"Cannot load a tokenizer from {path!r}: {e}.", "It needs a tokenizer.json."
            ) from None
        special = [i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]
        self.all_special_ids = tuple(special)

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> Sequence[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class ServerTokenizer:
    """The server's /tokenize and /detokenize, as vLLM and `llmtool serve` have them. Blocks: use before a run.

    No server says how large its vocabulary is. Random prompts take ids below the largest that English text uses,
    which every model that reads English has.
    """

    def __init__(
        self, url: str, model: str | None = None, api_key: str | None = None, timeout: float = 60.0
    ) -> None:
        self._url = base_url(url)
        self._model = model
        self._key = api_key or os.environ.get("OPENAI_API_KEY")
        self._timeout = timeout
        self._vocab_size = 0

    @property
    def vocab_size(self) -> int:
        if not self._vocab_size:
            self._vocab_size = max(self.encode(_SAMPLE), default=0) + 1
        return self._vocab_size

    def encode(self, text: str) -> Sequence[int]:
        tokens = self._post("/tokenize", {"prompt": text, "add_special_tokens": False}).get("tokens")
        if not isinstance(tokens, list):
            raise UsageError(f"{self._url}/tokenize answers without tokens.", "Give --tokenizer DIR.")
        ids: list[int] = tokens
        # A longer text may bring larger ids, and every id seen is one the model has.
        self._vocab_size = max(self._vocab_size, max(ids, default=0) + 1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._post("/detokenize", {"tokens": list(ids)}).get("prompt", ""))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if self._model:
            body["model"] = self._model
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                answer = json.load(response)
        except (urllib.error.URLError, OSError, ValueError) as e:
            raise UsageError(
                f"{self._url}{path} cannot be used as a tokenizer: {e}.", "Give --tokenizer DIR or a hub id."
            ) from None
        return answer if isinstance(answer, dict) else {}


# Words over many scripts and rare endings, so that the largest id is near the vocabulary's end.
_SAMPLE = (
    "The quick brown fox jumps over the lazy dog; antidisestablishmentarianism, deoxyribonucleic, "
    "Straßenbahnhaltestelle, çalışmak, Вселенная, ελευθερία, 東京都, שלום, مرحبا, 안녕하세요, naïve café 0123456789"
)
