"""Cluster: equal devices in equal nodes, and which link a group of devices talks over."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.errors import UsageError
from llmtool.hardware.device import DeviceSpec


@dataclass(frozen=True, slots=True)
class Cluster:
    """num_devices devices, per_node in a node. Groups are laid out densely: ranks of a group are neighbours."""

    device: DeviceSpec
    num_devices: int
    per_node: int = 0

    def __post_init__(self) -> None:
        if self.num_devices < 1:
            raise UsageError(f"The number of devices must be at least 1, not {self.num_devices}.")
        if self.per_node < 0:
            raise UsageError(f"The number of devices per node must be at least 1, not {self.per_node}.")
        if self.per_node == 0:
            object.__setattr__(self, "per_node", self.device.devices_per_node)
        if self.num_devices > self.per_node and self.num_devices % self.per_node:
            raise UsageError(
                f"{self.num_devices} devices are no whole number of nodes of {self.per_node}.",
                "Set --devices-per-node.",
            )

    @property
    def num_nodes(self) -> int:
        return -(-self.num_devices // self.per_node)

    def spans_nodes(self, group: int, stride: int = 1) -> bool:
        """Whether a group of `group` ranks, `stride` apart, reaches over the edge of a node."""
        return group * stride > self.per_node

    def link(self, group: int, stride: int = 1) -> float:
        """Bytes per second, one way and per device, of the slowest link within a group."""
        return self.device.network if self.spans_nodes(group, stride) else self.device.link
