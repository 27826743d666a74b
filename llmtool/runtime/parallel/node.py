"""The processes of an engine on a machine that is not node 0."""

from __future__ import annotations

import time
from contextlib import suppress

from llmtool.config import EngineConfig
from llmtool.errors import EngineDead
from llmtool.models.resolve import resolve
from llmtool.runtime.parallel.rank import mesh_of
from llmtool.runtime.parallel.rendezvous import join, reach
from llmtool.runtime.parallel.watch import Order, Workers


def work_for(config: EngineConfig) -> None:
    """Run this node's ranks until the server on node 0 ends. Raises UsageError where their settings differ, and
    EngineDead where one of the ranks, or node 0, is lost."""
    mesh = mesh_of(config)
    store = reach(config.master_addr, config.master_port, config)
    join(store, config)
    directory = resolve(config.model, config.revision)
    order = Order(config, 0, directory, config.master_addr, config.master_port, 0)
    workers = Workers(mesh.node_ranks(config.node_rank), order)
    try:
        while (ended := workers.ended()) is None:
            time.sleep(0.1)
        rank, code = ended
        if code == 0:  # it was told to stop, and so were the others
            workers.join(config.distributed_timeout_seconds)
            return
        raise EngineDead(
            f"Rank {rank} on this node ended with exit code {code}, and the others with it.",
            "See node 0's log; start all nodes again.",
        )
    finally:
        with suppress(OSError):
            workers.kill()
