from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llmtool.errors import UsageError
from llmtool.runtime.device import (
    DeviceMemory,
    cpu_flags,
    cpu_quota,
    device_memory,
    host_memory,
    pick_device,
    pick_dtype,
    pick_kv_dtype,
    set_threads,
)

GB = 2**30


def machine(root: Path, groups: dict[str, dict[str, object]], self_cgroup: str) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup as files. groups: directory -> file -> contents."""
    proc, cgroup = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    (proc / "meminfo").write_text(
        f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {12 * 2**20} kB\n"
    )
    (proc / "self" / "cgroup").write_text(self_cgroup)
    for directory, files in groups.items():
        (cgroup / directory).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (cgroup / directory / name).write_text(f"{content}\n")
    return proc, cgroup


def v2(limit: object, used: int, cache: int = 0) -> dict[str, object]:
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cache}"}


def v1(limit: int, used: int, cache: int = 0) -> dict[str, object]:
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used,
        "memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}",
    }


@pytest.mark.parametrize(
    ("groups", "self_cgroup", "expected"),
    [
        ({}, "", DeviceMemory(16 * GB, 12 * GB)),
        ({".": v2("max", GB)}, "0::/", DeviceMemory(16 * GB, 12 * GB)),
        ({".": v2(4 * GB, GB)}, "0::/", DeviceMemory(4 * GB, 3 * GB)),
        ({".": v2(4 * GB, 3 * GB, cache=GB)}, "0::/", DeviceMemory(4 * GB, 2 * GB)),
        ({"a/b": v2(8 * GB, GB), "a": v2(6 * GB, GB), ".": {}}, "0::/a/b", DeviceMemory(6 * GB, 5 * GB)),
        ({".": v2(4 * GB, GB)}, "0::/not/mounted/here", DeviceMemory(4 * GB, 3 * GB)),
        ({"memory/box": v1(2 * GB, GB, GB // 2)}, "4:memory:/box\n3:cpu:/x", DeviceMemory(2 * GB, 3 * GB // 2)),
        ({"memory": v1(2**63 - 4096, GB)}, "4:memory:/", DeviceMemory(16 * GB, 12 * GB)),
        ({".": v2(2 * GB, 3 * GB)}, "0::/", DeviceMemory(2 * GB, 0)),
        ({".": v2(32 * GB, GB)}, "0::/", DeviceMemory(16 * GB, 12 * GB)),
    ],
)  # fmt: skip
def test_free_memory_is_the_tightest_limit(
    tmp_path: Path, groups: dict[str, dict[str, object]], self_cgroup: str, expected: DeviceMemory
) -> None:
    assert host_memory(*machine(tmp_path, groups, self_cgroup)) == expected


def test_this_machine_has_memory() -> None:
    memory = device_memory(torch.device("cpu"))
    assert 0 < memory.free <= memory.total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("content", "cpus"), [("150000 100000", 2), ("max 100000", 2**16), ("1000 100000", 1)]
)
def test_cpu_quota(tmp_path: Path, content: str, cpus: int) -> None:
    assert cpu_quota(*machine(tmp_path, {".": {"cpu.max": content}}, "0::/")) == cpus


@pytest.mark.parametrize(("capability", "there"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_keys_and_values_in_eight_bits_take_a_device_that_has_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpu = torch.device("cuda", 0)
    assert pick_kv_dtype("auto", gpu) is None
    if there:
        assert pick_kv_dtype("fp8", gpu) == pick_kv_dtype("fp8_e4m3", gpu) == torch.float8_e4m3fn
        assert pick_kv_dtype("fp8_e5m2", gpu) == torch.float8_e5m2
    else:
        with pytest.raises(UsageError, match=r"8\.9 or more, and cuda:0 has 8\.0"):
            pick_kv_dtype("fp8", gpu)


def test_a_cpu_keeps_keys_and_values_in_the_model_s_dtype() -> None:
    cpu = torch.device("cpu")
    assert pick_kv_dtype("auto", cpu) is None
    with pytest.raises(UsageError, match="on a CPU") as error:
        pick_kv_dtype("fp8", cpu)
    assert "--kv-cache-dtype" in error.value.remedy


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [
        ("model name\t: x\nflags\t\t: fpu avx512f avx512_bf16\n", torch.bfloat16),
        ("flags\t\t: fpu avx2\n", torch.float32),
        ("Features\t: fp asimd bf16\n", torch.bfloat16),
        ("", torch.float32),
    ],
)
def test_bf16_where_the_cpu_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpuinfo: str, dtype: torch.dtype
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    flags = cpu_flags(tmp_path / "cpuinfo")
    monkeypatch.setattr("llmtool.runtime.device.cpu_flags", lambda: flags)
    assert pick_dtype("auto", torch.device("cpu")) == dtype
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "quantum", "meta"):
        with pytest.raises(UsageError):
            pick_device(name)


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        assert set_threads(1) == torch.get_num_threads() == 1
        with pytest.raises(UsageError):
            set_threads(0)
        assert 1 <= set_threads(None) <= len(os.sched_getaffinity(0))
    finally:
        torch.set_num_threads(before)
