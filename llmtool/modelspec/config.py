"""A config.json being read: typed access, so that a bad file ends in a sentence that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llmtool.errors import ModelError

T = TypeVar("T")


class Config:
    """config.json over a family's defaults. A field that is null counts as given: it does not take the default."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.given = given
        self.fields = {**defaults, **given}

    def get(self, key: str) -> Any:
        return self.fields.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; default where it is absent or null."""
        value = self.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json: {key} must be a positive integer, and is {_found(value)}.")
        return value

    def optional_count(self, key: str) -> int | None:
        return None if self.get(key) is None else self.count(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        return default if value is None else bool(value)

    def number(self, key: str, default: float | None = None) -> float:
        return number(self.fields, key, default)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def choice(self, key: str, choices: Mapping[str, str], what: str, default: str | None = None) -> str:
        """The meaning of a field that has one of several names. Raises ModelError for any other."""
        value = self.get(key)
        meaning = choices.get(default if value is None and default is not None else value)
        if meaning is None:
            raise ModelError(f"The {what} {value!r} does not run here; {', '.join(sorted(choices))} do.")
        return meaning

    def integers(self, key: str, length: int | None = None) -> list[int] | None:
        """A list of integers, or None where it is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        ok = isinstance(value, list) and all(isinstance(i, int) for i in value)
        if not ok or length not in (None, len(value)):
            size = "" if length is None else f" of {length}"
            raise ModelError(f"config.json: {key} must be a list{size} integers, and is {value!r}.")
        return list(value)

    def layer_types(self, layers: int) -> list[str] | None:
        """The attention of each layer, full_attention or sliding_attention; None where config.json is silent."""
        types = self.get("layer_types")
        if types is None:
            return None
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != layers:
            found = f"{len(types)} entries" + (f" with {', '.join(sorted(unknown))}" if unknown else "")
            raise ModelError(
                f"config.json: layer_types must name full_attention or sliding_attention for each of the "
                f"{layers} layers, and has {found}."
            )
        return list(types)

    def refuse(self, *keys: str) -> None:
        """Raises ModelError when one of these fields asks for something that does not run here."""
        for key in keys:
            if self.get(key):
                raise ModelError(f"config.json: {key} is {self.get(key)!r}, which does not run here.")


def number(table: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A field of a table as a float; default where it is absent or null."""
    value = table.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"config.json: {key} must be a number, and is {_found(value)}.")
    return float(value)


def numbers(table: Mapping[str, Any], key: str, length: int) -> tuple[float, ...]:
    value = table.get(key)
    ok = isinstance(value, Sequence) and len(value) == length
    if not ok or not all(isinstance(x, int | float) for x in value or ()):
        raise ModelError(f"config.json: {key} must be a list of {length} numbers.")
    return tuple(float(x) for x in value or ())


def token_ids(*sources: Any) -> tuple[int, ...]:
    """Token ids of fields that hold an id, a list of them or nothing; each once, in order."""
    found: dict[int, None] = {}
    for source in sources:
        for token in source if isinstance(source, list) else [source]:
            if isinstance(token, int) and not isinstance(token, bool):
                found[token] = None
    return tuple(found)


def _found(value: Any) -> str:
    return "missing" if value is None else f"{value!r}"


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face directory. Raises ModelError when it has none that can be read."""
    config: dict[str, Any] | None = read_json(directory / "config.json", dict)
    if config is None:
        raise ModelError(
            f"{directory} has no config.json, so it is not a Hugging Face model directory.",
            "Give a directory with config.json and safetensors, a GGUF file, or a hub id.",
        )
    return config


def read_json(path: Path, kind: type[T]) -> T | None:
    """What a JSON file holds, which must be a `kind` (dict or list); None where there is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise ModelError(f"{path} cannot be read as JSON: {e}.") from None
    if not isinstance(data, kind):
        raise ModelError(f"{path} must hold a JSON {'object' if kind is dict else 'list'}.")
    return data
