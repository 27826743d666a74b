"""Models by name: the config.json of published models, without what decides nothing here, and where each is
from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmtool.errors import ModelError


@cache
def _entries() -> dict[str, dict[str, Any]]:
    text = (files("llmtool.modelspec") / "catalogue.json").read_text(encoding="utf-8")
    entries: dict[str, dict[str, Any]] = json.loads(text)
    return entries


def names() -> list[str]:
    return list(_entries())


def hub_name(model: str) -> str:
    """The hub id of a model in the catalogue; any other name is given back."""
    for own, entry in _entries().items():
        if model.lower() in (own, *entry.get("aliases", ())):
            return str(entry["source"])
    return model


def published(name: str) -> Mapping[str, Any] | None:
    """The config.json of a model in the catalogue, by its name, an alias or its hub id; None where it is in
    none."""
    wanted = name.lower()
    for own, entry in _entries().items():
        source = entry["source"].lower()
        if wanted in (own, source, source.split("/")[-1], *entry.get("aliases", ())):
            config: Mapping[str, Any] = entry["config"]
            return config
    return None


def read_config(model: str) -> Mapping[str, Any]:
    """The config.json of `model`: a name in the catalogue, a directory or a config.json.

    Raises ModelError where it is none of these, or no JSON object.
    """
    path = Path(model).expanduser()
    if not path.exists():
        found = published(model)
        if found is None:
            raise ModelError(
                f"{model!r} is neither in the catalogue nor a file or directory here.",
                f"The catalogue has {', '.join(names())}.",
            )
        return found
    file = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"Cannot read {file}: {e.strerror or e}.") from None
    except ValueError as e:
        raise ModelError(f"{file} cannot be read as JSON: {e}.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{file} must hold a JSON object.")
    return data
