"""The cache directory: things derived once from a model's files, each complete or absent."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from llmtool.errors import ModelError

Progress = Callable[[int, int], None]  # bytes done, bytes in all


def cache_dir() -> Path:
    """LLMTOOL_CACHE, or ~/.cache/llmtool. Raises ModelError for a user without a home."""
    try:
        return Path(os.environ.get("LLMTOOL_CACHE") or "~/.cache/llmtool").expanduser()
    except RuntimeError:
        raise ModelError(
            "There is no home directory to keep converted models in.",
            "Set LLMTOOL_CACHE to a directory that can be written.",
        ) from None


def entry(kind: str, name: str, files: Iterable[Path], version: int) -> Path:
    """Where what `kind` derives from `files` is kept: a new place when a file or the format's version changes."""
    identity = hashlib.blake2b(f"{kind} {version}".encode(), digest_size=8)
    for path in files:
        stat = path.stat()
        identity.update(f"\0{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
    return cache_dir() / kind / f"{name}-{identity.hexdigest()}"


def ensure(target: Path, fill: Callable[[Path], None]) -> Path:
    """`target`, filled by `fill(directory)` if it is not there yet.

    The directory is built beside its place and renamed, so readers see all of it or nothing. When two processes
    build at once, the first to finish wins and the other drops its copy. Raises ModelError when the cache cannot
    be written.
    """
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            built = Path(scratch) / "entry"
            built.mkdir()
            fill(built)
            _publish(built, target)
    except OSError as e:
        raise ModelError(
            f"The cache entry {target} cannot be written: {e.strerror or e}.",
            "Free some space, or set LLMTOOL_CACHE to a directory that can be written.",
        ) from e
    return target


def _publish(built: Path, target: Path) -> None:
    try:
        built.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(built)  # another process was faster
