"""Chained page hashes: a page's hash names its tokens and everything before them, so equal hash means equal KV.

blake2b with 16 bytes: collisions are out of reach even for an adversary, and Python's salted `hash()` would make
runs differ. About half a microsecond a page.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def root_hash(salt: str) -> bytes:
    """The chain's start. Requests with different salts (tenants, adapters) never share a page."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"llmtool-kv").digest()


def page_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """token_ids: the tokens of one full page, each in [0, 2**32)."""
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


def chain(hashes: list[bytes], root: bytes, token_ids: Sequence[int], size: int, pages: int) -> None:
    """Hash pages of `size` tokens until `hashes`, of the leading ones, has `pages`. Converting all tokens at once
    costs a third of doing it page by page."""
    start = len(hashes)
    if pages <= start:
        return
    raw = array("I", token_ids[start * size : pages * size]).tobytes()
    parent, step = hashes[-1] if hashes else root, 4 * size
    for at in range(0, len(raw), step):
        parent = blake2b(parent + raw[at : at + step], digest_size=16).digest()
        hashes.append(parent)
