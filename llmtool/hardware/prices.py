"""What a device costs per hour: a dated table that users can replace. A price that is not known is never made
up."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per device and hour. note: date and source, for whoever reads the figure."""

    usd_per_hour: float
    note: str


def price_of(device: str, given: float | None = None, path: str | Path | None = None) -> Price | None:
    """The price of a device: given by the user, or the lowest in the table; None where it has none."""
    if given is not None:
        if not 0 < given < float("inf"):
            raise UsageError(f"The price must be a positive number of dollars per hour, not {given:g}.")
        return Price(given, "given")
    table = _table(path)
    seen = table["usd_per_hour"].get(device)
    if seen is None:
        return None
    return Price(float(seen[0]), f"{table['date']}, {seen[0]:g} to {seen[1]:g}")


def need_price(device: str, given: float | None = None, path: str | Path | None = None) -> Price:
    """As price_of; UsageError where there is none."""
    price = price_of(device, given, path)
    if price is None:
        raise UsageError(
            f"The price of {device} is not known, and cost is the objective.",
            "Give it in dollars per device and hour: --price 2.50.",
        )
    return price


def _table(path: str | Path | None) -> dict[str, Any]:
    name = str(path) if path else "prices.toml"
    try:
        text = (Path(path) if path else files("llmtool.hardware") / "prices.toml").read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except OSError as e:
        raise UsageError(f"Cannot read the price table {name}: {e.strerror or e}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"The price table {name} is not valid TOML: {e}.") from None
    prices = table.get("usd_per_hour")
    if (
        not isinstance(prices, dict)
        or not isinstance(table.get("date"), str)
        or not all(
            isinstance(v, list) and len(v) == 2 and all(isinstance(x, int | float) and x > 0 for x in v)
            for v in prices.values()
        )
    ):
        raise UsageError(
            f"The price table {name} needs `date` and, under usd_per_hour, NAME = [lowest, highest]."
        )
    return table
