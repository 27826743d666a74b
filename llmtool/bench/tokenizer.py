"""A tokenizer for making prompts: a model's own, or the server's through /tokenize. Neither imports torch.

Both satisfy llmtool.workload.requests.Tokenizer; the model's own also tokenizes for an engine in this process.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtool.bench.client import authorization, base_url
from llmtool.errors import ModelError, UsageError
from llmtool.models.resolve import ALIASES, resolve
from llmtool.models.tokenizer import Tokenizer
from llmtool.workload.requests import ChatMessage

_TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "*.jinja"]


class ModelTokenizer:
    """A model's tokenizer (llmtool.models.tokenizer), both for making prompts and for running them in process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.all_special_ids = tuple(sorted(tokenizer.special_ids))

    def encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def encode_prompt(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> Sequence[int]:
        return self._tokenizer.apply_chat_template(messages).token_ids


def load_tokenizer(model: str) -> ModelTokenizer:
    """Of a Hugging Face directory, GGUF file, alias or hub id; of the last only the tokenizer is fetched.

    Raises ModelError when it cannot be found or read.
    """
    if Path(model).expanduser().exists() or model in ALIASES:
        return ModelTokenizer(Tokenizer.from_dir(resolve(model)))
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(model, allow_patterns=_TOKENIZER_FILES)
    except (OSError, ValueError) as e:  # the hub's own errors are of these two kinds
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError(
            f"Cannot get the tokenizer of {model!r}: {reason}", "Give --tokenizer DIR."
        ) from None
    return ModelTokenizer(Tokenizer.from_dir(directory))


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
        self._headers = {"Content-Type": "application/json"} | authorization(api_key)
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
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), self._headers)
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
