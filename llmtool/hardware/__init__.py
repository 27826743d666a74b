"""Device and cluster facts, their prices, and where they come from. TOML tables, read without any device."""

from llmtool.hardware.cluster import Cluster
from llmtool.hardware.device import DeviceSpec, find_device, load_devices

__all__ = ["Cluster", "DeviceSpec", "find_device", "load_devices"]
