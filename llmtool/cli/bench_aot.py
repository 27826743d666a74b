"""`llmtool bench --aot`: what it was asked for, what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtool.cli.output import Output, size
from llmtool.errors import UsageError

if TYPE_CHECKING:
    from llmtool.bench.aot import Row

ALLOWED = {
    "aot",
    "aot_batch",
    "aot_seconds",
    "aot_peers",
    "output_file",
    "html",
    "device",
    "num_threads",
    "as_json",
    "quiet",
    "seed",
}


def bench_aot(flags: Mapping[str, Any], output: Output) -> None:
    """Measures, shows, writes."""
    given = [n for n, v in sorted(flags.items()) if v not in (None, False, (), []) and n not in ALLOWED]
    if given:
        names = ", ".join(f"--{n.replace('_', '-')}" if n not in ("model", "files") else n for n in given)
        raise UsageError(f"{names} has no meaning with --aot.", "Leave it out.")
    name, batches = str(flags["aot"]), parse_batches(flags["aot_batch"] or "1")
    seconds = 3.0 if flags["aot_seconds"] is None else float(flags["aot_seconds"])
    if seconds <= 0:
        raise UsageError(f"--aot-seconds must be above 0, not {seconds:g}.")
    import torch

    from llmtool.bench.aot import AotBenchConfig, measure
    from llmtool.bench.environment import hardware, versions
    from llmtool.bench.result import write_json
    from llmtool.runtime.device import pick_device, set_threads

    device = pick_device(flags["device"] or "auto")
    threads = set_threads(flags["num_threads"])
    torch.manual_seed(flags["seed"] or 0)
    config = AotBenchConfig(batches, seconds, flags["aot_peers"] is not False)
    with output.progress() as bar:
        rows = measure(name, config, device, bar)
    document = {
        "net": name,
        "device": str(device),
        "threads": threads,
        "rows": [as_dict(row) for row in rows],
        "versions": versions(),
        "hardware": hardware(torch.cuda.get_device_name(device) if device.type == "cuda" else None),
    }
    output.document(document)
    show(name, rows, output)
    if flags["output_file"] is not None:
        write_json(document, flags["output_file"])
        output.hint(f"Result written to {flags['output_file']}")
    if flags["html"] is not None:
        Path(flags["html"]).write_text(page(name, rows))
        output.hint(f"Report written to {flags['html']}")


def parse_batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(int(part) for part in text.split(","))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise UsageError(f"--aot-batch takes batch sizes, as 1,8, not {text!r}.")
    return batches


def as_dict(row: Row) -> dict[str, Any]:
    return {
        "batch": row.batch,
        "seconds": row.seconds,
        "times_faster_than": {n: row.ratio(n) for n in row.seconds if n != "aot"},
        "prepare_seconds": row.prepare,
        "failed": row.failed,
        "plan": row.plan,
    }


def show(name: str, rows: Sequence[Row], output: Output) -> None:
    table = [
        (str(row.batch), what, f"{1e3 * s:.3f}", _ratio(row, what), f"{row.prepare.get(what, 0.0):.2f}")
        for row in rows
        for what, s in row.seconds.items()
    ]
    output.table(name, ("batch", "run", "ms a step", "AoT is faster by", "prepared in s"), table)
    for row in rows:
        for what, why in row.failed.items():
            output.line(f"batch {row.batch}, {what}: {why}")
    plans = [row for row in rows if row.plan]
    if not plans:
        return
    columns = (
        "batch",
        "tasks",
        "at once",
        "schedule",
        "streams",
        "waits",
        "the paper's",
        "its code's",
        "arena",
        "no reuse",
    )
    output.table("task graph", columns, [_graph_row(row) for row in plans])


def _graph_row(row: Row) -> tuple[str, ...]:
    made = row.plan["assignments"]
    ours = made["ours"]
    return (
        str(row.batch),
        str(made["graph"]["tasks"]),
        str(made["graph"]["concurrency"]),
        str(row.plan["schedule"]),
        f"{ours['streams']} (paper {made['paper']['streams']})",
        str(ours["synchronisations"]),
        str(made["paper"]["synchronisations"]),
        str(made["code"]["synchronisations"]),
        f"{size(ours['arena_bytes'])} (one stream {size(made['serial']['arena_bytes'])})",
        size(ours["no_reuse_bytes"]),
    )


def _ratio(row: Row, what: str) -> str:
    ratio = None if what == "aot" else row.ratio(what)
    return "" if ratio is None else f"{ratio:.2f}x"


def page(name: str, rows: Sequence[Row]) -> str:
    """A page with the figures as a chart over batch sizes and as a table; nothing to fetch."""
    from html import escape

    from llmtool.bench.svg import Chart, Series, render

    kinds = list(dict.fromkeys(what for row in rows for what in row.seconds))
    series = tuple(
        Series(
            what,
            [float(row.batch) for row in sorted(rows, key=lambda r: r.batch) if what in row.seconds],
            [1e3 * row.seconds[what] for row in sorted(rows, key=lambda r: r.batch) if what in row.seconds],
            dots=True,
        )
        for what in kinds
    )
    chart = render(Chart(f"{name}: a step", "batch", "ms", series))
    cells = "".join(
        f"<tr><td>{row.batch}</td>"
        + "".join(f"<td>{1e3 * row.seconds[k]:.3f}</td>" if k in row.seconds else "<td></td>" for k in kinds)
        + "</tr>"
        for row in rows
    )
    heads = "".join(f"<th>{escape(k)}, ms</th>" for k in kinds)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)}</title>"
        "<style>body{font:15px sans-serif;max-width:46em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}"
        f"</style><h1>{escape(name)}</h1>{chart}<table><tr><th>batch</th>{heads}</tr>{cells}</table></html>\n"
    )
