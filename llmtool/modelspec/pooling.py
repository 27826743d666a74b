"""PoolingSpec: how an encoder's token vectors become one, read from what sentence-transformers writes beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtool.errors import ModelError
from llmtool.modelspec.config import read_json


@dataclass(frozen=True, slots=True)
class PoolingSpec:
    """How token vectors become one, as sentence-transformers writes it down beside a model.

    modes: cls | mean | max | mean_sqrt_len | last, several are joined. normalize: to length 1. max_length: tokens
    it was trained on, or None. prompt: text put before every input. lowercase: texts are lowered first.
    """

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_length: int | None = None
    prompt: str = ""
    lowercase: bool = False

    @classmethod
    def from_dir(cls, path: str | Path) -> PoolingSpec:
        """Read from modules.json and what it names; without it the mean, not normalised, as sentence-transformers
        does. Raises ModelError for modules that do not run here."""
        directory = Path(path)
        file = directory / "modules.json"
        if not file.is_file():
            return cls()
        modes: tuple[str, ...] = ("mean",)
        normalize = False
        settings: dict[str, Any] = {}
        for module in read_json(file, list) or []:
            kind = str(module.get("type", "")).rpartition(".")[2]
            folder = directory / str(module.get("path", ""))
            if kind == "Transformer":
                settings = read_json(folder / "sentence_bert_config.json", dict) or {}
            elif kind == "Pooling":
                modes = _modes(read_json(folder / "config.json", dict) or {})
            elif kind == "Normalize":
                normalize = True
            else:
                raise ModelError(
                    f"modules.json names a module {kind}, which does not run here.",
                    "Transformer, Pooling and Normalize do.",
                )
        whole = read_json(directory / "config_sentence_transformers.json", dict) or {}
        prompt = (whole.get("prompts") or {}).get(whole.get("default_prompt_name")) or ""
        length = settings.get("max_seq_length")
        lowercase = bool(settings.get("do_lower_case"))
        return cls(modes, normalize, length if isinstance(length, int) else None, str(prompt), lowercase)


_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_lasttoken": "last",
}
_MODE_NAMES = {"cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len",
               "lasttoken": "last"}  # fmt: skip


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """In the order in which sentence-transformers joins them."""
    named = config.get("pooling_mode")
    if named is not None:  # the newer spelling: a name or a list of them
        names = [named] if isinstance(named, str) else list(named)
    else:
        names = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
    table = _MODES if named is None else _MODE_NAMES
    unknown = [name for name in names if name not in table]
    if unknown or not names:
        what = f"in the mode {', '.join(map(str, unknown))}" if unknown else "in no mode"
        raise ModelError(f"Pooling {what} does not run here.", f"These do: {', '.join(sorted(table))}.")
    if config.get("include_prompt") is False:
        raise ModelError("Pooling without the tokens of the prompt (include_prompt) does not run here.")
    order = list(table)
    return tuple(table[name] for name in sorted(names, key=order.index))
