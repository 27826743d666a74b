"""Each target of the GPU scripts beside its figure: met, missed, or not measured. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NOISE = 0.02
SMALL = ("bert", "distilbert", "mobilenet", "efficientnet", "decoder-0.6b")
CELLS = ("nasnet",)
BRANCHY = ("inception", "nasnet")
PEERS = ("cuda graph", "reduce-overhead", "max-autotune")
# The seed's training table over PyTorch (2012.02732, section 5, V100), batch 32 on CIFAR shapes: beside ours.
PAPER_TRAINING = {"mobilenet": 3.61, "efficientnet": 3.32, "resnet": 1.90}
Row = Mapping[str, Any]


def verdict(target: str, figure: float | None, limit: float, at_least: bool = True) -> dict[str, Any]:
    met = None if figure is None else (figure >= limit if at_least else figure <= limit)
    return {"target": target, "limit": limit, "figure": figure, "met": met}


def _least(values: Sequence[float | None]) -> float | None:
    """None where one is missing: a target over several is met by all of them."""
    return None if not values or any(v is None for v in values) else min(v for v in values if v is not None)


def _most(values: Sequence[float | None]) -> float | None:
    return None if not values or any(v is None for v in values) else max(v for v in values if v is not None)


def of_nets(nets: Sequence[Row], training: Sequence[Row], captures: Sequence[float]) -> list[dict[str, Any]]:
    """nets, training: as gpu/aot.py writes them. captures: seconds of each captured step of the engine."""
    by = {n["net"]: n for n in nets}
    ran = [n for n in nets if "aot_ms" in n]
    out = [
        verdict(f"every net over {peer}", _least([n.get(f"over_{peer}") for n in ran]), 1 - NOISE)
        for peer in PEERS
    ]
    for name, least in (*((n, 3.0) for n in SMALL), *((n, 10.0) for n in CELLS)):
        out.append(verdict(f"{name} over eager", by.get(name, {}).get("over_eager"), least))
    for name in BRANCHY:
        measured = by.get(name, {}).get("plan", {}).get("measured_seconds", {})
        several = [s for n, s in measured.items() if n.split()[-1] in ("gated", "full")]
        ratio = measured["serial"] / min(several) if several and "serial" in measured else None
        out.append(verdict(f"{name}, several streams over one", ratio, 1.3))
    made = [n["plan"]["assignments"] for n in ran if n.get("plan")]
    # The exact assignment is the minimum, as tests show: none of the others may have fewer.
    more = [a["ours"]["synchronisations"] - a["paper"]["synchronisations"] for a in made]
    out.append(verdict("synchronisations beyond the minimum", _most(more), 0, at_least=False))
    arenas = [a["ours"]["arena_bytes"] / a["ours"]["no_reuse_bytes"] for a in made]
    out.append(verdict("arena over no reuse", _most(arenas), 0.2, at_least=False))
    prepared = [n["plan"].get("prepare_seconds") for n in ran if n.get("plan")]
    out.append(verdict("seconds to prepare a net", _most(prepared), 1.0, at_least=False))
    out.append(verdict("seconds to capture a bucket", _most(captures), 1.0, at_least=False))
    ratios = {t["net"]: t.get("ratio") for t in training}
    out += [
        verdict(f"training {n} over eager; the paper has {x}x", ratios.get(n), 1.0)
        for n, x in PAPER_TRAINING.items()
    ]
    return out


def of_attention(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """rows: as gpu/attention.py writes them."""
    by = {r["case"]: r for r in rows}

    def us(case: str) -> float | None:
        return by.get(case, {}).get("us")

    def over(case: str, base: str) -> float | None:
        a, b = us(case), us(base)
        return None if a is None or b is None else a / b

    decode = [r for r in rows if re.fullmatch(r"\d+ x \d+, pages of \d+", r["case"])]
    large = [r["of_copy"] for r in decode if r["kv_mb"] >= 256]
    middle = [r["of_copy"] for r in decode if 64 <= r["kv_mb"] < 256]
    base = "32 x 4096, pages of 16"
    out = [
        verdict("decode, 256 MB of KV and more: part of a copy", _least(large), 0.90),
        verdict("decode, 64 to 256 MB of KV: part of a copy", _least(middle), 0.85),
        verdict("decode, one sequence of 1,024: us", us("1 x 1024, pages of 16"), 10.0, at_least=False),
    ]
    for q in (2, 4, 8):
        ratio = over(f"32 x 4096, {q} queries", base)
        out.append(verdict(f"{q} queries over one", ratio, 1.15, at_least=False))
    for s in (3, 32):
        ratio = over(f"32 x 4096, stride {s}", base)
        out.append(verdict(f"pages {s} times as far apart over contiguous", ratio, 1.03, at_least=False))
    # Ideal: its bytes at the rate that the same bytes of equal sequences reach.
    mixed, equal = by.get("1 x 65536 + 31 x 512"), by.get(base)
    ideal = equal["us"] * mixed["kv_mb"] / equal["kv_mb"] if mixed and equal else None
    ratio = mixed["us"] / ideal if mixed and ideal else None
    out.append(verdict("one long and 31 short over ideal", ratio, 1.2, at_least=False))
    return out
