"""KV between processes: what arrives is what was sent, and what goes wrong is said, in bounded time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Client

import pytest

from llmtool.runtime.kv_link import Address, SocketLink

KEY = b"between friends"


@contextmanager
def pair(there: bytes = KEY) -> Iterator[tuple[SocketLink, SocketLink]]:
    with closing(SocketLink(KEY)) as here, closing(SocketLink(there)) as other:
        yield here, other


def send(link: SocketLink, address: Address, name: str, kv: bytes) -> tuple[int, str]:
    """What the link says of it."""
    done = threading.Event()
    said: list[tuple[int, str]] = []

    def sent(nbytes: int, why_not: str) -> None:
        said.append((nbytes, why_not))
        done.set()

    link.send(address, name, kv, sent)
    assert done.wait(20)
    return said[0]


def test_what_arrives_is_what_was_sent() -> None:
    with pair() as (here, there):
        for size in (0, 1, 1 << 24):
            kv = os.urandom(size)
            assert send(here, there.address, f"r{size}", kv) == (size, "")
            assert there.take(f"r{size}") == kv
            assert there.take(f"r{size}") is None, "once"
        assert send(there, here.address, "back", b"x") == (1, "") and here.take("back") == b"x"


def test_many_at_once() -> None:
    with pair() as (here, there):
        left = threading.Semaphore(0)
        blobs = {f"r{i}": os.urandom(1000 + i) for i in range(40)}
        for name, kv in blobs.items():
            here.send(there.address, name, kv, lambda nbytes, why_not: left.release())
        for _ in blobs:
            assert left.acquire(timeout=20)
        assert {name: there.take(name) for name in blobs} == blobs


def test_nobody_there() -> None:
    with pair() as (here, there):
        address = there.address
        there.close()
        nbytes, why_not = send(here, address, "r", b"kv")
        assert nbytes == 0 and "refused" in why_not.lower()


def test_a_receiver_that_goes_away_is_found_again() -> None:
    with pair() as (here, there):
        assert send(here, there.address, "a", b"1")[0] == 1
        for connections in here._idle.values():
            for connection in connections:
                connection.close()  # as when the other process has died and its place is taken
        assert send(here, there.address, "b", b"2")[0] == 0
        assert send(here, there.address, "c", b"3")[0] == 1
        assert there.take("c") == b"3"


def test_strangers_are_refused_and_do_no_harm() -> None:
    with pair(there=b"another key") as (here, there):
        nbytes, why_not = send(here, there.address, "r", b"kv")
        assert nbytes == 0 and why_not
        assert there.take("r") is None
        with pytest.raises((OSError, EOFError)):
            stranger = Client(there.address, "AF_INET")
            stranger.send_bytes(b"hello")
            while True:  # a challenge, a refusal, the end
                stranger.recv_bytes()
    with pair() as (here, there):
        assert send(here, there.address, "r", b"kv") == (2, "")


def test_what_nobody_asks_for_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtool.runtime.kv_link.KEPT", 0.05)
    with pair() as (here, there):
        send(here, there.address, "old", b"1")
        time.sleep(0.1)
        send(here, there.address, "new", b"2")
        assert there.take("old") is None and there.take("new") == b"2"
