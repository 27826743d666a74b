"""Reading workload files so that a bad one says where: errors name the file, the line and what was
expected.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from llmtool.errors import UsageError


def open_text(path: str | Path) -> TextIO:
    """A UTF-8 text file, gzipped or not. UsageError if it cannot be opened."""
    path = Path(path)
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8", newline="")
        return path.open(encoding="utf-8", newline="")
    except OSError as e:
        raise UsageError(
            f"Cannot open the dataset {path}: {e.strerror or e}.", "Check --dataset-path."
        ) from None


def bad_line(path: str | Path, line: int, expected: str) -> UsageError:
    return UsageError(f"{path}, line {line}: expected {expected}.")


def csv_rows(path: str | Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row) for each row of a CSV file with a header; values and names are stripped."""
    with open_text(path) as f, _decoding(path):
        reader = csv.reader(f)
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise bad_line(path, 1, "a header row, but the file is empty")
        for values in reader:
            if not values:
                continue
            if len(values) != len(header):
                raise bad_line(
                    path, reader.line_num, f"{len(header)} columns ({', '.join(header)}), not {len(values)}"
                )
            yield reader.line_num, dict(zip(header, (v.strip() for v in values), strict=True))


def jsonl_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for each line of a JSONL file; blank lines are skipped."""
    with open_text(path) as f, _decoding(path):
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise bad_line(path, number, f"one JSON object ({e.msg} at column {e.colno})") from None
            if not isinstance(row, dict):
                raise bad_line(path, number, f"one JSON object, not {type(row).__name__}")
            yield number, row


def json_document(path: str | Path) -> Any:
    with open_text(path) as f, _decoding(path):
        try:
            return json.load(f)
        except json.JSONDecodeError as e:
            raise bad_line(path, e.lineno, f"JSON ({e.msg} at column {e.colno})") from None


def number(path: str | Path, line: int, row: Mapping[str, Any], key: str, least: float = 0.0) -> float:
    """row[key] as a finite number of at least `least`."""
    value = row.get(key)
    try:
        parsed = (
            float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        )
    except ValueError:
        parsed = math.nan
    if not least <= parsed < math.inf:
        raise bad_line(path, line, f"{key!r} to be a number of at least {least:g}, not {value!r}")
    return parsed


def integer(path: str | Path, line: int, row: Mapping[str, Any], key: str, least: int = 0) -> int:
    parsed = number(path, line, row, key, least)
    if parsed != int(parsed):
        raise bad_line(path, line, f"{key!r} to be a whole number, not {row[key]!r}")
    return int(parsed)


class _decoding:
    """Turns what a file that is not UTF-8, not gzip or cut short raises while read into a UsageError."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error)):
            raise UsageError(
                f"{self._path} is not readable text: {error}.", "It must be UTF-8, gzipped or not."
            ) from None
