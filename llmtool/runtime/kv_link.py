"""How KV pages get from one engine's process to another's: over a socket, with an acknowledgement.

One message per request: its id, then the bytes. The receiver keeps them until the request itself comes. A receiver
that is gone, refuses the key or hangs is the sender's error, never its end.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Protocol

Address = tuple[str, int]
Sent = Callable[[int, str], None]
"""Called with the bytes that arrived, and why they did not, or ""; from a thread of the link's."""

KEPT = 120.0  # seconds that KV waits for its request
STREAMS = 2  # transfers at a time from one engine


class KVLink(Protocol):
    """What an engine's process needs to move KV; `SocketLink` is the one there is, between processes that reach
    each other by TCP."""

    @property
    def address(self) -> Address:
        """Where others send to."""
        ...

    def send(self, address: Address, request_id: str, kv: bytes, sent: Sent) -> None:
        """Returns at once."""
        ...

    def take(self, request_id: str) -> bytes | None:
        """What has come for a request; None where nothing has. It is forgotten here."""
        ...

    def close(self) -> None: ...


class SocketLink:
    """key: that both sides must have. host: the address to listen on, at a port that the system chooses."""

    def __init__(self, key: bytes, host: str = "127.0.0.1") -> None:
        self._key = key
        self._listener = socket.create_server((host, 0), backlog=64)
        self._arrived: dict[str, tuple[float, bytes]] = {}  # oldest first
        self._lock = threading.Lock()
        self._idle: dict[Address, list[Connection]] = {}  # open connections nobody uses now
        self._senders = ThreadPoolExecutor(STREAMS, "kv-send")
        threading.Thread(target=self._accept, name="kv-accept", daemon=True).start()

    @property
    def address(self) -> Address:
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    # -- sending -------------------------------------------------------------------------------------------

    def send(self, address: Address, request_id: str, kv: bytes, sent: Sent) -> None:
        self._senders.submit(self._send, address, request_id, kv, sent)

    def _send(self, address: Address, request_id: str, kv: bytes, sent: Sent) -> None:
        connection = None
        try:
            with self._lock:
                known = self._idle.get(address)
                connection = known.pop() if known else None
            connection = connection or Client(address, "AF_INET", authkey=self._key)
            connection.send_bytes(request_id.encode())
            connection.send_bytes(kv)
            if connection.recv_bytes() != request_id.encode():
                raise OSError("the receiver acknowledged another request")
        except (OSError, EOFError, AuthenticationError) as error:
            if connection is not None:
                connection.close()
            sent(0, str(error) or type(error).__name__)
            return
        with self._lock:
            self._idle.setdefault(address, []).append(connection)
        sent(len(kv), "")

    # -- receiving -----------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return  # closed
            connection = Connection(caller.detach())
            threading.Thread(target=self._receive, args=(connection,), name="kv-receive", daemon=True).start()

    def _receive(self, connection: Connection) -> None:
        with suppress(OSError, EOFError, AuthenticationError), connection:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            while True:
                name = connection.recv_bytes()
                kv = connection.recv_bytes()
                with self._lock:
                    self._arrived[name.decode()] = (time.monotonic(), kv)
                    self._forget_old()
                connection.send_bytes(name)

    def _forget_old(self) -> None:
        """What was sent for requests that never came."""
        while self._arrived:
            name, (since, _) = next(iter(self._arrived.items()))
            if time.monotonic() - since < KEPT:
                return
            del self._arrived[name]

    def take(self, request_id: str) -> bytes | None:
        with self._lock:
            return self._arrived.pop(request_id, (0.0, None))[1]

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        self._senders.shutdown(wait=False, cancel_futures=True)
