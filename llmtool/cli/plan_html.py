"""The HTML report of a search: one self-contained file with the Pareto set and the timeline of the best plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from llmtool.bench.svg import Chart, Series, render
from llmtool.errors import LLMToolError
from llmtool.sim.simulate import SimResult

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse}td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ccc}
td:first-child,th:first-child{text-align:left}svg{max-width:36em;display:block}pre{background:#f4f4f4;padding:.7em;overflow:auto}
"""


def pareto_chart(plans: Sequence[Mapping[str, Any]]) -> Chart:
    def series(name: str, wanted: bool) -> Series:
        chosen = sorted(
            (p["mean_tpot_ms"], p["output_tokens_per_s_per_device"]) for p in plans if p["pareto"] == wanted
        )
        return Series(name, [x for x, _ in chosen], [y for _, y in chosen], dots=True)

    parts = tuple(s for s in (series("Pareto set", True), series("other plans", False)) if s.x)
    return Chart("Throughput against latency", "mean TPOT (ms)", "output tokens/s per device", parts)


def timeline_chart(result: SimResult) -> Chart:
    """Sequences in each engine's steps over time; the first four engines."""
    parts = []
    for i, totals in enumerate(result.totals[:4]):
        x = [start for start, *_ in totals.timeline]
        y = [float(decodes + (prompt > 0)) for _, _, decodes, prompt, _ in totals.timeline]
        if x:
            parts.append(Series(f"engine {i}", x, y, step=True))
    return Chart("Sequences running in the best plan", "time (s)", "sequences in a step", tuple(parts))


def write_html(path: str, model: str, document: Mapping[str, Any], result: SimResult) -> None:
    """Raises LLMToolError where the file cannot be written."""
    try:
        Path(path).write_text(html(model, document, result), encoding="utf-8")
    except OSError as e:
        raise LLMToolError(f"Cannot write the report {path}: {e.strerror or e}.") from None


def html(model: str, document: Mapping[str, Any], result: SimResult) -> str:
    plans = document["plans"]
    columns = ("plan", "max_num_batched_tokens", "max_num_seqs", "output_tokens_per_s_per_device", "mean_ttft_ms",
               "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "usd_per_million_tokens", "joules_per_million_tokens",
               "bound", "tie", "pareto")  # fmt: skip
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(p[c])}</td>" for c in columns) + "</tr>" for p in plans)
    counts = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in document["counts"].items())
    lines = [*document["launch"]["vllm"], *document["launch"]["sglang"], document["launch"]["bench"]]
    why = document.get("heuristic", {}).get("why", "")
    title = f"{model} on {document['num_devices']} x {document['device']}"
    charts = "".join(
        f"<h2>{escape(c.title)}</h2>{render(c)}" for c in (pareto_chart(plans), timeline_chart(result))
    )
    rejected = "".join(
        f"<li>{x['count']} plans: {escape(x['reason'])}, as {escape(x['example'])}</li>"
        for x in document["rejected"]
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1><p>Objective: {escape(document['objective'])}; {escape(counts)}. Figures are "
        f"±{document['error_band']:.0%} ({escape(document['tier'])}: {escape(document['source'])}).</p>"
        f"<p>{escape(why)}</p>{charts}<h2>Plans</h2><table><tr>{head}</tr>{body}</table>"
        f"<h2>Rejected</h2><ul>{rejected}</ul><h2>Run it</h2><pre>{escape(chr(10).join(lines))}</pre>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else escape(str(value))
