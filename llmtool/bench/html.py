"""One self-contained HTML report of a bench result: tables, distributions, timeline, latency against rate.

Nothing in it is fetched: style is inline, charts are inline SVG, so the file can be mailed and kept.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from llmtool.bench.result import BenchResult, RunResult
from llmtool.bench.svg import Chart, Series, render
from llmtool.errors import LLMToolError
from llmtool.workload.metrics import LATENCIES, concurrency_steps, latencies_ms
from llmtool.workload.slo import parse_slos

NAMES = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}
COLUMNS = ("mean", "median", "std", "p90", "p95", "p99")
CDF_POINTS = 400


def html_report(result: BenchResult) -> str:
    """The report as text. The detailed run is the one at the knee, else the last one."""
    main = _main_run(result)
    loader = jinja2.PackageLoader("llmtool.bench", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("report.html.j2").render(
        result=result,
        title=result.label or f"{result.model} on {result.backend}",
        rate=main.arrivals or format_rate(main.request_rate),
        warnings=result.warnings,
        figures=_figures(main.metrics),
        latency_rows=_latency_rows(main.metrics),
        columns=COLUMNS,
        sweep_rows=[_sweep_row(run) for run in result.runs] if len(result.runs) > 1 else [],
        slo_rows=_slo_rows(main.metrics),
        charts=[(chart.title, render(chart)) for chart in charts(result, main)],
        errors=_errors(main.metrics),
        settings=sorted(result.config.items()),
        machine={**result.hardware, **{f"{k} version": v for k, v in result.versions.items()}},
    )


def write_html(result: BenchResult, path: str | Path) -> None:
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(html_report(result), encoding="utf-8")
        partial.replace(path)
    except OSError as e:
        partial.unlink(missing_ok=True)
        raise LLMToolError(f"Cannot write the report {path}: {e.strerror or e}.") from None


def _main_run(result: BenchResult) -> RunResult:
    rate = (result.knee or {}).get("request_rate")
    return next((run for run in result.runs if run.request_rate == rate), result.runs[-1])


def charts(result: BenchResult, run: RunResult) -> list[Chart]:
    records = run.records()
    values = latencies_ms(records)
    out = [_cdf(name, values[name], run.metrics) for name in LATENCIES if values[name]]
    steps = concurrency_steps(records)
    if steps:
        times = [t for t, _ in steps]
        running = Series("running", times, [float(n) for _, n in steps], step=True)
        out.append(Chart("Running requests over time", "seconds", "requests", (running,)))
        out.append(_token_timeline(run))
    finite = sorted((r for r in result.runs if math.isfinite(r.request_rate)), key=lambda r: r.request_rate)
    kinds = dict.fromkeys(spec for run in finite if (spec := _spec(run)))
    if kinds:
        out += _by_speculation(finite, list(kinds))
    elif len(finite) > 1:
        out += _against_rate(finite, result.knee or {})
    return out


def _cdf(name: str, values: Sequence[float], metrics: Mapping[str, Any]) -> Chart:
    shares = np.linspace(0, 1, min(CDF_POINTS, max(2, len(values))))
    at = np.quantile(values, shares)
    # The last percent would squeeze the rest against the axis; the table has its numbers.
    top = float(np.quantile(values, 0.995)) * 1.05 or None
    slos = parse_slos(str(slo["slo"]) for slo in metrics.get("slos") or ())
    marks = tuple((slo.limit_ms, str(slo)) for slo in slos if slo.metric == name)
    series = Series(NAMES[name], at.tolist(), (shares * 100).tolist())
    return Chart(f"{NAMES[name]}: share of values within", "ms", "% of values", (series,), top, 100.0, marks)


def _token_timeline(run: RunResult) -> Chart:
    moments: list[float] = []
    weights: list[float] = []
    for r in run.records():
        if r.success:
            at = r.start + r.ttft + np.concatenate(([0.0], np.cumsum(r.itls)))
            moments += at.tolist()
            weights += [r.output_tokens / len(at)] * len(at)
    end = max(moments, default=0.0)
    bins = int(np.clip(end, 10, 120))
    totals, edges = np.histogram(moments, bins=bins, range=(0.0, end or 1.0), weights=weights)
    rates = totals / (edges[1] - edges[0])
    series = Series("output tokens/s", edges.tolist(), [*rates[:1].tolist(), *rates.tolist()], step=True)
    return Chart("Output tokens per second over time", "seconds", "tokens/s", (series,))


def _against_rate(runs: Sequence[RunResult], knee: Mapping[str, Any]) -> list[Chart]:
    rates = [run.request_rate for run in runs]
    at = knee.get("request_rate")
    marks = ((float(at), "knee"),) if at else ()

    def line(label: str, key: str) -> Series:
        pairs = [(rate, run.metrics.get(key)) for rate, run in zip(rates, runs, strict=True)]
        known = [(rate, value) for rate, value in pairs if value is not None]
        return Series(label, [r for r, _ in known], [v for _, v in known], dots=True)

    out = []
    for name in ("ttft", "tpot", "e2el"):
        lines = tuple(line(word, f"{word}_{name}_ms") for word in ("median", "p99"))
        out.append(
            Chart(f"{NAMES[name]} against request rate", "requests/s offered", "ms", lines, marks=marks)
        )
    throughputs = (line("completed", "request_throughput"), line("within the objectives", "request_goodput"))
    shown = tuple(series for series in throughputs if series.x)
    out.append(
        Chart("Throughput against request rate", "requests/s offered", "requests/s", shown, marks=marks)
    )
    return out


def _by_speculation(runs: Sequence[RunResult], kinds: Sequence[str]) -> list[Chart]:
    """Latency against rate, a line for each kind of speculation."""
    out = []
    for name in ("e2el", "tpot", "ttft"):
        lines = []
        for kind in kinds:
            known = [(r.request_rate, r.metrics.get(f"mean_{name}_ms")) for r in runs if _spec(r) == kind]
            pairs = [(rate, value) for rate, value in known if value is not None]
            lines.append(Series(kind, [rate for rate, _ in pairs], [value for _, value in pairs], dots=True))
        title = f"{NAMES[name]}, mean, against request rate, by speculation"
        out.append(Chart(title, "requests/s offered", "ms", tuple(lines)))
    return out


def _figures(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headline numbers, as (name, text)."""
    rows = [
        ("Requests completed", f"{m['completed']} of {m['completed'] + m['failed']}"),
        ("Duration", f"{m['duration']:.2f} s"),
        ("Request throughput", f"{m['request_throughput']:.2f} /s"),
        ("Output throughput", f"{m['output_throughput']:.1f} tokens/s"),
        ("Total throughput", f"{m['total_token_throughput']:.1f} tokens/s"),
        ("Input tokens", f"{m['total_input_tokens']}"),
        ("Output tokens", f"{m['total_output_tokens']}"),
    ]
    if m.get("request_goodput") is not None:
        rows.append(("SLO goodput", f"{m['request_goodput']:.2f} /s"))
    if m.get("max_concurrent_requests"):
        rows.append(("Peak concurrency", str(m["max_concurrent_requests"])))
    if m.get("cached_tokens") is not None:
        rows.append(("Cached input tokens", str(m["cached_tokens"])))
    if m.get("spec_decode_acceptance_rate") is not None:
        rows.append(("Draft acceptance", f"{m['spec_decode_acceptance_rate']:.1f} %"))
    if m.get("prefix_cache_hit_rate") is not None:
        rows.append(("Prefix cache hits", f"{100 * m['prefix_cache_hit_rate']:.1f} %"))
    return rows


def _latency_rows(m: Mapping[str, Any]) -> list[tuple[str, list[str], str]]:
    """(name, cells of COLUMNS, interval of the mean) for each latency."""
    rows = []
    for name in LATENCIES:
        cells = [_ms(m.get(f"{column}_{name}_ms")) for column in COLUMNS]
        interval = (m.get("confidence_intervals") or {}).get(f"mean_{name}_ms")
        rows.append((NAMES[name], cells, f"{_ms(interval[0])} to {_ms(interval[1])}" if interval else "–"))
    return rows


def _spec(run: RunResult) -> str | None:
    """Which kind of speculation a run of several had."""
    spec = run.server.get("spec", run.metrics.get("spec"))
    return None if spec is None else str(spec)


def _sweep_row(run: RunResult) -> list[str]:
    m = run.metrics
    goodput, spec = m.get("request_goodput"), _spec(run)
    return [
        (run.arrivals or format_rate(run.request_rate)) + (f", {spec}" if spec else ""),
        f"{m['request_throughput']:.2f}",
        "–" if goodput is None else f"{goodput:.2f}",
        f"{m['output_throughput']:.1f}",
        *(_ms(m.get(f"{word}_{name}_ms")) for name in ("ttft", "tpot", "e2el") for word in ("median", "p99")),
        str(m["failed"]),
    ]


def _slo_rows(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for slo in m.get("slos") or ():
        if "met" in slo:
            rows.append((slo["slo"], f"{'met' if slo['met'] else 'missed'}: {_ms(slo['measured_ms'])} ms"))
        else:
            rows.append((slo["slo"], f"{100 * slo['attained']:.1f} % of requests"))
    return rows


def _errors(m: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(count, message) of the failures, most frequent first."""
    counts: dict[str, int] = {}
    for error in m["errors"]:
        if error:
            counts[error] = counts.get(error, 0) + 1
    return sorted(((n, e) for e, n in counts.items()), key=lambda pair: -pair[0])[:20]


def format_rate(rate: float) -> str:
    return "all at once" if math.isinf(rate) else f"{rate:.3g} /s"


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
