"""DeviceSpec: what a device can do at best, from a table of facts that users can extend."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmtool.errors import UsageError

DTYPES = ("bf16", "fp8", "int8", "fp4")
REQUIRED = ("flops", "memory", "bandwidth", "link", "power")


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """One device. flops: dense peak operations per second by type. memory: bytes. bandwidth, link, pcie, network:
    bytes per second of device memory, to a neighbour in the node (one way), to the host, between nodes (per
    device). power: watts at full load. efficiency: name of the pack of measured efficiencies; measured: whether
    the pack was measured on this very device. source: of the facts.
    """

    name: str
    title: str
    flops: Mapping[str, float]
    memory: int
    bandwidth: float
    link: float
    power: float
    pcie: float = 32e9
    network: float = 25e9
    devices_per_node: int = 8
    efficiency: str = ""
    measured: bool = True
    aliases: tuple[str, ...] = field(default=())
    source: str = ""

    def peak(self, dtype: str) -> float:
        """Dense peak for operands of `dtype`; without hardware for it they are computed in bf16."""
        dtype = dtype.removesuffix("_block")
        return self.flops.get(dtype, self.flops["bf16"])


def load_devices(extra: str | Path | None = None) -> dict[str, DeviceSpec]:
    """The catalogue by name. extra: a TOML file of the same form, whose entries are added or replace ours.

    Raises UsageError for a file that cannot be read or lacks a field.
    """
    tables = tomllib.loads((files("llmtool.hardware") / "devices.toml").read_text(encoding="utf-8"))
    if extra is not None:
        tables |= _read(extra)
    return {name: _device(name, table) for name, table in tables.items()}


def find_device(name: str, extra: str | Path | None = None) -> DeviceSpec:
    """A device by name or alias, in any case. Raises UsageError with the known names and how to add one."""
    devices = load_devices(extra)
    wanted = name.lower().replace("_", "-")
    for device in devices.values():
        if wanted in {device.name, *(alias.replace("_", "-") for alias in device.aliases)}:
            return device
    raise UsageError(
        f"The device {name!r} is unknown; known are {', '.join(devices)}.",
        "Add it in a TOML file and give that with --devices FILE: a table [NAME] with flops = {bf16 = ...}, memory "
        "(bytes), bandwidth, link (bytes/s) and power (W).",
    )


def _read(path: str | Path) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            return tomllib.load(file)
    except OSError as e:
        raise UsageError(f"Cannot read the device file {path}: {e.strerror or e}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"The device file {path} is not valid TOML: {e}.") from None


def _device(name: str, table: Any) -> DeviceSpec:
    missing = [key for key in REQUIRED if not isinstance(table, dict) or key not in table]
    if missing:
        raise UsageError(f"The device {name!r} lacks {', '.join(missing)}.")
    flops = table["flops"]
    if not isinstance(flops, dict) or "bf16" not in flops or set(flops) - set(DTYPES):
        raise UsageError(
            f"The device {name!r}: flops must be a table with bf16 and any of {', '.join(DTYPES)}."
        )
    unknown = set(table) - set(DeviceSpec.__dataclass_fields__) - {"name"}
    if unknown:
        raise UsageError(f"The device {name!r} has an unknown field {sorted(unknown)[0]!r}.")
    numbers = {
        key: table[key] for key in ("memory", "bandwidth", "link", "power", "pcie", "network") if key in table
    }
    if not all(isinstance(v, int | float) and v > 0 for v in [*numbers.values(), *flops.values()]):
        raise UsageError(f"The device {name!r}: every figure must be a positive number.")
    values = {k: v for k, v in table.items() if k not in ("flops", "aliases", "title", "memory")}
    return DeviceSpec(
        name=name.lower(),
        title=table.get("title", name),
        flops={k: float(v) for k, v in flops.items()},
        memory=int(table["memory"]),
        aliases=tuple(table.get("aliases", ())),
        **values,
    )
