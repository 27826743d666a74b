"""The machine underneath: which device, how much memory is really free, which dtype runs fast, how many threads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from llmtool.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# OCP's 8-bit floating point, under vLLM's names: fp8 has the more digits of the two, not the wider range.
KV_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper and later
# Processors that multiply bf16 in hardware: x86 (AVX-512 BF16, AMX) and Arm.
_CPU_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_UNLIMITED = 2**60  # cgroup v1 writes about 2^63 for "no limit"


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. total: of the device (CPU: what this process may ever take). free: what it may still take."""

    total: int
    free: int


def pick_device(name: str) -> torch.device:
    """auto: the first CUDA device, else the CPU. Raises UsageError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"There is no device {name!r}.", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"The device {name!r} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(
            f"There is no device {name!r}: {count} CUDA devices were found.", "Use --device cpu."
        )
    return torch.device("cuda", device.index or 0)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = not _CPU_BF16_FLAGS.isdisjoint(cpu_flags())
    return torch.bfloat16 if fast else torch.float32


def pick_kv_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """Of keys and values; auto, the model's own, is None. Raises UsageError where the device has no such type."""
    if name == "auto":
        return None
    remedy = "Leave out --kv-cache-dtype."
    if device.type != "cuda":
        raise UsageError(
            f"kv_cache_dtype is {name}, and on a CPU keys and values are kept in the model's dtype.", remedy
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise UsageError(
            f"kv_cache_dtype is {name}, which takes a GPU of compute capability 8.9 or more, and {device} has "
            f"{capability[0]}.{capability[1]}.",
            remedy,
        )
    return KV_DTYPES[name]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's feature flags; empty where the system does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def set_threads(num_threads: int | None) -> int:
    """Threads of torch's operators; None: the CPUs this process may use. Returns their number."""
    if num_threads is not None and num_threads < 1:
        raise UsageError(f"num_threads must be at least 1, not {num_threads}.")
    allowed = min(len(os.sched_getaffinity(0)), cpu_quota())
    # torch counts physical cores, which is right unless the process may use fewer.
    torch.set_num_threads(num_threads or min(allowed, torch.get_num_threads()))
    return torch.get_num_threads()


def device_memory(device: torch.device) -> DeviceMemory:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free)
    return host_memory()


def host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> DeviceMemory:
    """Of the machine, or of the tightest control group this process is in."""
    meminfo = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    total, free = (int(meminfo[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    for directory, names in _memory_groups(proc, cgroup):
        limit, used = (_read_int(directory / name) for name in names[:2])
        if limit is None or used is None or limit >= _UNLIMITED:
            continue
        # Cached file pages count as used, and go when they are in the way.
        reclaimable = _stat(directory / "memory.stat", names[2])
        total = min(total, limit)
        free = min(free, max(0, limit - used + reclaimable))
    return DeviceMemory(total, free)


def cpu_quota(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs' worth of time the control groups grant, rounded up; a large number without a limit."""
    quota = 2**16
    for directory in _lineage(cgroup, _group_path(proc, "")):
        try:
            given, period = (directory / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if given != "max":
            quota = min(quota, max(1, -(-int(given) // int(period))))
    return quota


_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _memory_groups(proc: Path, cgroup: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """Directories of this process's control group and its ancestors, with the names of limit, usage and cache."""
    v2 = [(directory, _V2) for directory in _lineage(cgroup, _group_path(proc, ""))]
    v1 = [(directory, _V1) for directory in _lineage(cgroup / "memory", _group_path(proc, "memory"))]
    return v2 + v1


def _group_path(proc: Path, controller: str) -> str:
    """The path of this process's group from its line "id:controllers:path"; v2's controllers are ""."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return "/"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def _lineage(root: Path, path: str) -> list[Path]:
    """root/a/b, root/a, root for path /a/b. In a container the path may name what is mounted as the root."""
    directory = root / path.strip("/")
    return [directory, *(parent for parent in directory.parents if parent == root or root in parent.parents)]


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [key]), 0)
