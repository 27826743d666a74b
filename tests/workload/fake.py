"""A tokenizer that needs no file, and where the real data lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest


class ByteTokenizer:
    """One token per byte, so every length can be counted by hand."""

    vocab_size = 256
    all_special_ids = (0, 255)

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("latin-1")


def data_file(*parts: str) -> Path:
    """A file of the test data, or a skip with the reason."""
    repository = Path(__file__).resolve().parents[2]
    root = Path(os.environ.get("LLMTOOL_DATA", repository.parent / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {Path(*parts)} under LLMTOOL_DATA ({root} has none)")
    return path
