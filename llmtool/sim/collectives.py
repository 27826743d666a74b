"""Collectives on a hierarchical cluster: ring and pairwise algorithms within a node, two levels across nodes.

Sizes follow NCCL's convention: bytes of the whole vector that every rank ends up with (all_reduce, all_gather) or
starts from (reduce_scatter, all_to_all).
"""

from __future__ import annotations

from llmtool.hardware import Cluster
from llmtool.sim.ops import Cost, Ops

HOP = 2.5e-6  # seconds a message needs at least, within a node
NETWORK_HOP = 10e-6  # and between nodes
LINK_SHARE, NETWORK_SHARE = 0.75, 0.8  # of a link's rate that collectives reach, without a table
_ROUNDS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def wire_seconds(op: str, nbytes: float, group: int, link: float) -> float:
    """What the wire alone needs: each rank sends rounds * (g - 1) / g of the vector; all_to_all a g-th of it to
    each other rank."""
    return max(nbytes, 1.0) * _ROUNDS[op] * (group - 1) / group / link


class Collectives:
    def __init__(self, cluster: Cluster, ops: Ops) -> None:
        self.cluster = cluster
        self._ops = ops

    def cost(self, op: str, nbytes: float, group: int, stride: int = 1) -> Cost:
        """One collective of `group` ranks, `stride` devices apart."""
        if group <= 1 or nbytes <= 0:
            return Cost(0.0, "network")
        if not self.cluster.spans_nodes(group, stride):
            return Cost(self._in_node(op, nbytes, group), "network", 0.0, nbytes)
        local = max(1, self.cluster.per_node // stride)  # ranks of the group in one node
        nodes = -(-group // local)
        share = nbytes / local if op != "all_to_all" else nbytes * (nodes - 1) / nodes
        across = wire_seconds(op, share, nodes, self.cluster.device.network * NETWORK_SHARE)
        hops = _ROUNDS[op] * NETWORK_HOP * max(1.0, nodes**0.5)
        if op == "all_to_all":
            across = share / (self.cluster.device.network * NETWORK_SHARE)
        inside = self._in_node(op, nbytes, local) if local > 1 else 0.0
        return Cost(inside + across + hops, "network", 0.0, nbytes)

    def _in_node(self, op: str, nbytes: float, group: int) -> float:
        wire = wire_seconds(op, nbytes, group, self.cluster.device.link)
        key = f"{op}/{group}"
        if self._ops.knows(key):
            return wire * self._ops._grids[key].ratio(nbytes)
        near = next((g for g in (2, 4, 8) if g >= group and self._ops.knows(f"{op}/{g}")), None)
        if near is not None:
            return wire * self._ops._grids[f"{op}/{near}"].ratio(nbytes)
        return HOP * max(1.0, _ROUNDS[op]) + wire / LINK_SHARE

    def send(self, nbytes: float, stride: int) -> Cost:
        """To the next pipeline stage, `stride` devices on."""
        across = stride >= self.cluster.per_node
        rate = (
            self.cluster.device.network * NETWORK_SHARE if across else self.cluster.device.link * LINK_SHARE
        )
        return Cost((NETWORK_HOP if across else HOP) + nbytes / rate, "network", 0.0, nbytes)
