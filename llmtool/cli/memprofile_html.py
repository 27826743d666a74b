"""The HTML report of `memprofile`: one self-contained file with ledger, comparison and the arena over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmtool.bench.svg import COLOURS
from llmtool.cli.plan_html import STYLE
from llmtool.errors import LLMToolError
from llmtool.memprofile.ledger import size

WIDTH, HEIGHT = 720, 260
_FREE, _TAILS, _CACHED = "#eeeeee", "#777777", "#bbbbbb"


def write_html(path: str, document: Mapping[str, Any]) -> None:
    """Raises LLMToolError where the file cannot be written."""
    try:
        Path(path).write_text(html(document), encoding="utf-8")
    except OSError as e:
        raise LLMToolError(f"Cannot write the report {path}: {e.strerror or e}.") from None


def html(d: Mapping[str, Any]) -> str:
    title = f"{d['model']}: where {size(d['card_bytes'])} go"
    ledger = [
        [r["part"], size(r["bytes"]), f"{r['bytes'] / d['card_bytes']:.1%}", r["note"]] for r in d["ledger"]
    ]
    total = sum(r["bytes"] for r in d["ledger"])
    ledger.append(["sum", f"{total} B", "100.0%", ""])
    rows = [
        [r["allocator"], "refused", r["refused"]]
        if "refused" in r
        else [
            r["allocator"],
            r["fit_at_mean_length"],
            r["p50_batch"],
            r["p95_batch"],
            f"{r['mean_batch']:.1f}",
            r["preemptions"],
            f"{r['hit_rate']:.0%}",
            f"{r['live_share']:.0%}",
        ]
        for r in d["allocators"]
    ]
    w = d["workload"]
    what = "".join(
        f"<li>{escape(x['change'])}: {x['gain']:.2f} times the batch ({x['mean_batch']:.1f})</li>"
        for x in d["what_ifs"]
    )
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
        _card(d["ledger"], d["card_bytes"]),
        _table(["part", "bytes", "of the card", ""], ledger),
        f"<h2>{w['requests']} requests of {escape(w['name'])}, replayed (simulated)</h2>",
        _table(
            ["allocator", "fit", "p50 batch", "p95", "mean", "preemptions", "prefix hits", "KV read"], rows
        ),
        f"<h2>The arena over time (near)</h2>{_area(d['timeline'])}",
        f"<h2>What if</h2><ul>{what}</ul>",
    ]
    if d["explain"]:
        e = d["explain"]
        items = [
            [
                i["type"],
                i["layers"],
                i["small_pages"],
                size(i["live"]),
                size(i["taken"] - i["live"]),
                size(i["taken"]),
            ]
            for i in e["items"]
        ]
        parts.append(f"<h2>One request of {e['tokens']} tokens: {size(e['taken'])}</h2>")
        parts.append(_table(["layer type", "layers", "small pages", "read", "not read", "taken"], items))
    parts.append(f"<h2>Page plan</h2><pre>{escape(chr(10).join(d['plan']))}</pre>")
    return "\n".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _colour(name: str, order: Sequence[str]) -> str:
    for word, colour in (("free", _FREE), ("kept back", _FREE), ("tails", _TAILS), ("cached", _CACHED)):
        if word in name:
            return colour
    return COLOURS[list(order).index(name) % len(COLOURS)]


def _card(ledger: Sequence[Mapping[str, Any]], card: int) -> str:
    """One bar, as long as the card."""
    names, at, parts = [r["part"] for r in ledger], 0.0, []
    for r in ledger:
        wide = WIDTH * r["bytes"] / card
        parts.append(
            f'<rect x="{at:.2f}" y="0" width="{wide:.2f}" height="28" fill="{_colour(r["part"], names)}">'
            f"<title>{escape(r['part'])}: {size(r['bytes'])}</title></rect>"
        )
        at += wide
    return f'<svg viewBox="0 0 {WIDTH} 28" role="img" aria-label="the card">{"".join(parts)}</svg>'


def _area(points: Sequence[Mapping[str, Any]]) -> str:
    """What the arena holds at each of the points, stacked from the bottom."""
    if not points:
        return ""
    names = [name for name in points[0]["bytes"] if "free" not in name]
    wide, parts = WIDTH / len(points), []
    for i, point in enumerate(points):
        total, done = sum(point["bytes"].values()), 0
        for name in names:
            count = point["bytes"][name]
            low, high = HEIGHT * done / total, HEIGHT * (done + count) / total
            parts.append(
                f'<rect x="{i * wide:.2f}" y="{HEIGHT - high:.2f}" width="{wide + 0.3:.2f}" '
                f'height="{high - low:.2f}" fill="{_colour(name, names)}"><title>step {point["step"]}, '
                f"{point['batch']} sequences, {escape(name)}: {size(count)}</title></rect>"
            )
            done += count
    legend = " ".join(f'<span style="color:{_colour(n, names)}">■</span> {escape(n)}' for n in names)
    box = f'<rect x="0" y="0" width="{WIDTH}" height="{HEIGHT}" fill="{_FREE}"/>'
    label = 'role="img" aria-label="the arena over time"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>{box}{"".join(parts)}</svg><p>{legend}</p>'
