"""Where the ranks of an engine meet: a store on node 0 that every process reaches, what is agreed there before
anything is loaded, and how errors get from one rank to another."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llmtool import errors
from llmtool.config import EngineConfig
from llmtool.errors import EngineDead, LLMToolError, UsageError
from llmtool.version import __version__

POLL = 0.02  # seconds between looks at the store
_SIOCGIFADDR = 0x8915
_IFNAME = "GLOO_SOCKET_IFNAME"
# Settings that nodes may have of their own.
_OWN = {
    "node_rank",
    "num_threads",
    "step_log",
    "served_model_name",
    "tokenizer",
    "spec",
    "proposer",
    "master_port",
}

Health = Callable[[], None]


def host(config: EngineConfig) -> tuple[dist.TCPStore, int]:
    """The store, for rank 0 to keep, and its port. Raises UsageError where the address cannot be listened at."""
    address = config.master_addr
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, config.master_port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"The ranks cannot meet at {address}:{config.master_port}: {error.strerror or error}.",
            "Give --master-addr an address of this machine and --master-port a port that is free on it.",
        ) from None
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_limit(config),
        master_listen_fd=listener.detach(),
    )
    return store, port


def reach(address: str, port: int, config: EngineConfig) -> dist.TCPStore:
    """The same, from any other process. Raises EngineDead where nobody answers in time."""
    try:
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_limit(config))
    except (RuntimeError, OSError) as error:
        raise EngineDead(
            f"Node 0 does not answer at {address}:{port} within {config.distributed_timeout_seconds:g} s "
            f"({type(error).__name__}).",
            "Start it, and check --master-addr, --master-port and the network between the nodes.",
        ) from None


def settings(config: EngineConfig) -> dict[str, Any]:
    """What all nodes must agree on."""
    given = {k: v for k, v in asdict(config).items() if k not in _OWN}
    return json.loads(json.dumps(given | {"llmtool": __version__, "torch": torch.__version__}))


def gather_nodes(store: dist.TCPStore, config: EngineConfig) -> None:
    """On node 0: wait for all others and tell them whether they fit. Raises UsageError where one does not,
    EngineDead where one does not come in time."""
    ours, seen, heard = settings(config), {0}, 0
    deadline = time.monotonic() + config.distributed_timeout_seconds
    problem: LLMToolError | None = None
    while len(seen) < config.nnodes and problem is None:
        if store.add("nodes", 0) > heard:
            wait_for(store, [f"node/{heard}"], config.distributed_timeout_seconds)
            theirs = json.loads(store.get(f"node/{heard}"))
            heard += 1
            problem = _why_unfit(ours, theirs, seen)
            seen.add(theirs["node_rank"])
        elif time.monotonic() > deadline:
            missing = sorted(set(range(config.nnodes)) - seen)
            problem = EngineDead(
                f"Of {config.nnodes} nodes, {', '.join(map(str, missing))} did not come to {config.master_addr}:"
                f"{config.master_port} within {config.distributed_timeout_seconds:g} s.",
                "Start the same command on each, with --node-rank.",
            )
        else:
            time.sleep(POLL)
    store.set("verdict", "" if problem is None else dump_error(problem))
    if problem is not None:
        time.sleep(
            2 * POLL if heard == 0 else 1.0
        )  # the store goes with this process: let the others read it
        raise problem


def join(store: dist.TCPStore, config: EngineConfig) -> None:
    """On another node: say who is here, and wait to hear whether that fits. Raises what node 0 says."""
    number = store.add("nodes", 1) - 1
    store.set(f"node/{number}", json.dumps({**settings(config), "node_rank": config.node_rank}))
    wait_for(store, ["verdict"], config.distributed_timeout_seconds)
    verdict = store.get("verdict")
    if verdict:
        raise load_error(verdict)


def _why_unfit(ours: Mapping[str, Any], theirs: Mapping[str, Any], seen: set[int]) -> LLMToolError | None:
    node = theirs["node_rank"]
    different = [key for key in ours if ours[key] != theirs.get(key)]
    if different:
        told = "; ".join(f"{key} {theirs.get(key)!r} there and {ours[key]!r} on node 0" for key in different)
        return UsageError(
            f"Node {node} was started with other settings: {told}.", "Start the same command on each node."
        )
    if node in seen:
        return UsageError(f"Two nodes say that they are node {node}.", "Give each a --node-rank of its own.")
    return None


def wait_for(
    store: dist.TCPStore, keys: Sequence[str], seconds: float | None, health: Health | None = None
) -> None:
    """Until the store has all keys; `health` raises where they will not come. Raises EngineDead after `seconds`."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not store.check(list(keys)):
        if health is not None:
            health()
        if deadline is not None and time.monotonic() > deadline:
            raise EngineDead(f"Nothing was heard of {', '.join(keys)} within {seconds:g} s.")
        time.sleep(POLL)


def dump_error(error: LLMToolError) -> str:
    return json.dumps([type(error).__name__, error.message, error.remedy])


def load_error(text: bytes | str) -> LLMToolError:
    name, message, remedy = json.loads(text)
    kind = getattr(errors, name, EngineDead)
    error = (kind if issubclass(kind, LLMToolError) else EngineDead)(message, remedy)
    assert isinstance(error, LLMToolError)
    return error


@contextmanager
def interface(config: EngineConfig) -> Iterator[None]:
    """In the block, gloo listens where the other nodes reach this one: at the address that its way to node 0 starts
    from. Afterwards the environment is as it was: processes started later choose for themselves."""
    name = None if _IFNAME in os.environ else _interface(config)
    if name is None:
        yield
        return
    os.environ[_IFNAME] = name
    try:
        yield
    finally:
        os.environ.pop(_IFNAME, None)


def _interface(config: EngineConfig) -> str | None:
    """Its name; None where no interface has the address."""
    address = config.master_addr
    with suppress(OSError):
        if config.node_rank:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((address, config.master_port or 9))
                address = probe.getsockname()[0]
        address = socket.gethostbyname(address)
        for _, name in socket.if_nameindex():
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None


def _limit(config: EngineConfig) -> timedelta:
    return timedelta(seconds=config.distributed_timeout_seconds)
