"""A rank other than 0, in a process of its own: `python -m llmtool.runtime.parallel.worker`, its order on stdin."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import traceback

import torch.distributed as dist

from llmtool.errors import EngineDead, LLMToolError
from llmtool.runtime.engine_process import STOP_SIGNALS
from llmtool.runtime.lifeline import die_with
from llmtool.runtime.parallel.rank import agree, prepare
from llmtool.runtime.parallel.rendezvous import reach
from llmtool.runtime.parallel.stage import Follower, StageRun
from llmtool.runtime.parallel.watch import Order, beat, publish
from llmtool.runtime.parallel.wire import STEP, decode, localise


def main() -> None:
    for number in STOP_SIGNALS:  # rank 0's business, also when the whole group gets them
        signal.signal(number, signal.SIG_IGN)
    order = pickle.load(sys.stdin.buffer)
    assert isinstance(order, Order)
    die_with(order.parent)
    config = order.config
    try:
        store = reach(order.address, order.port, config)
        beat(order.rank, order.address, order.port, config)
    except LLMToolError as error:
        sys.exit(str(error))
    try:
        follow(order, store)
    except LLMToolError as error:
        publish(store, order.rank, error)
        _exit(1)
    except Exception as error:
        # What is wrong with the others is theirs to say; what is wrong here must not be lost.
        trace = traceback.format_exc()
        if not lost_peer(error):
            sys.stderr.write(trace)
            publish(store, order.rank, EngineDead(f"Rank {order.rank} failed: {error!r}."))
        _exit(1)
    _exit(0)


def follow(order: Order, store: dist.TCPStore) -> None:
    """Load, and do what rank 0 says until it says stop."""
    config = order.config
    rank = prepare(config, order.directory, order.rank, store)
    budget = agree(config, rank, store)
    pages = rank.store(budget)
    run = StageRun(rank.model, rank.shard, pages, rank.links)
    follower = Follower(run, pages, config.max_num_seqs, budget.max_model_len)
    while True:
        words = rank.links.hear()
        if words[1] != STEP:
            return
        out, wanted = decode(words)
        follower.step(localise(out, rank.pages), wanted)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or late."""
    text = str(error).lower()
    signs = ("connection", "timed out", "timeout", "peer", "nccl", "gloo", "socket", "broken pipe")
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in signs)


def _exit(code: int) -> None:
    """At once: process groups whose other ends are gone need not be taken down in order."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
