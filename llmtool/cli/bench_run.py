"""What `llmtool bench` does once its flags are understood. No torch here: the engine runs in its own process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmtool.bench.compare import CompareResult, compare
from llmtool.bench.config import BenchConfig
from llmtool.bench.html import write_html
from llmtool.bench.inprocess import EngineBackend, EngineOptions
from llmtool.bench.load import Progress, ProgressCallback
from llmtool.bench.result import BenchResult, RunResult, read_result, write_json
from llmtool.bench.run import connect, run_bench, run_blocking
from llmtool.bench.tokenizer import ModelTokenizer, ServerTokenizer, load_tokenizer
from llmtool.cli.output import Output, size
from llmtool.config import EngineConfig
from llmtool.errors import LLMToolError, ThresholdMissed, UsageError

Bar = Callable[[str, float | None], None]
_LATENCIES = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "End to end"))


def measure(config: BenchConfig, engine: EngineConfig, api_key: str | None, output: Output) -> BenchResult:
    with output.progress() as bar:
        if config.url:
            return run_blocking(_over_http(config, api_key, bar))
        specs = engine.spec.split(",")
        results = [run_blocking(_in_process(config, replace(engine, spec=s), bar)) for s in specs]
        return results[0] if len(specs) == 1 else _side_by_side(dict(zip(specs, results, strict=True)))


def _side_by_side(results: Mapping[str, BenchResult]) -> BenchResult:
    """One sweep of several kinds of speculation, by rate: each run says which it had. Each had an engine of its
    own, and the same prompts at the same moments."""
    first = next(iter(results.values()))
    runs = [
        replace(run, server={**run.server, "spec": spec})
        for spec, result in results.items()
        for run in result.runs
    ]
    runs.sort(key=lambda run: run.request_rate)
    return replace(first, kind="sweep", runs=tuple(runs), knee=None)


async def _over_http(config: BenchConfig, api_key: str | None, bar: Bar) -> BenchResult:
    url = config.url
    assert url is not None
    config, backend = await connect(config, api_key)
    try:
        tokenizer: ModelTokenizer | ServerTokenizer
        if config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
        else:
            tokenizer = ServerTokenizer(url, config.model, api_key)
        return await run_bench(config, backend, tokenizer, _on(bar))
    finally:
        await backend.close()


async def _in_process(config: BenchConfig, engine_config: EngineConfig, bar: Bar) -> BenchResult:
    from llmtool.models.tokenizer import Tokenizer
    from llmtool.runtime.fleet import start_engine

    engine = await start_engine(engine_config, progress=bar)
    try:
        info = engine.info
        tokenizer = ModelTokenizer(Tokenizer.from_dir(info.tokenizer_dir))
        if info.pooling is not None and config.endpoint == "auto":
            config = replace(config, endpoint="embeddings")
        embeddings = config.endpoint == "embeddings"
        fields = {} if embeddings else config.body_fields()
        options = EngineOptions(fields=fields, keep_text=config.save_text, embeddings=embeddings)
        backend = EngineBackend(engine, tokenizer, options)
        config = replace(config, model=info.served_model_name)
        gpu = info.device if info.device != "cpu" else None
        return await run_bench(config, backend, tokenizer, _on(bar), gpu)
    finally:
        await engine.close()


def _on(bar: Bar) -> ProgressCallback:
    def show(progress: Progress) -> None:
        failed = f", {progress.failed} failed" if progress.failed else ""
        text = f"{progress.phase}: {progress.done} of {progress.total} requests{failed}"
        bar(text, progress.done / max(1, progress.total))

    return show


# -- what is shown -----------------------------------------------------------------------------------------


def report(result: BenchResult, output: Output, json_file: str | None, html_file: str | None) -> None:
    """Shows the result, then writes it: a disk that is full costs the file but not the figures. ThresholdMissed
    where what was asked for was not reached."""
    output.document(result.as_dict())
    if result.kind == "run":
        _show_run(result, output)
    else:
        _show_sweep(result, output)
    for warning in result.warnings:
        output.warn(warning)
    if json_file is not None:
        result.write(json_file)
        output.hint(f"Result written to {json_file}")
    if html_file is not None:
        write_html(result, html_file)
        output.hint(f"Report written to {html_file}")
    if not any(run.metrics["completed"] for run in result.runs):
        raise LLMToolError("No request succeeded.")
    if missed := missed_objectives(result):
        raise ThresholdMissed(f"Missed: {'; '.join(missed)}.")


def missed_objectives(result: BenchResult) -> list[str]:
    """What a run or search did not reach, in words. A sweep goes beyond them on purpose: it misses none."""
    if result.kind == "knee":
        found = (result.knee or {}).get("request_rate") is not None
        return [] if found else ["no rate held the objectives"]
    if result.kind != "run":
        return []
    m = result.runs[0].metrics
    missed = [
        f"{slo['slo']} (measured {_ms(slo['measured_ms'])} ms)"
        for slo in m.get("slos") or ()
        if slo.get("met") is False
    ]
    attained, wanted = m.get("slo_attainment"), result.config.get("slo_attainment")
    if attained is not None and wanted is not None and attained < wanted:
        missed.append(
            f"{100 * attained:.1f} % of the requests met the objectives, {100 * wanted:g} % were asked for"
        )
    return missed


def check_writable(*files: str | None) -> None:
    """UsageError, before anything is measured, where a result could not be written."""
    for file in files:
        if file is None:
            continue
        path = Path(file)
        if path.is_dir():
            raise UsageError(f"{file} is a directory.", "Name a file in it.")
        if not path.parent.is_dir():
            raise UsageError(
                f"The directory {path.parent} does not exist.", f"Create it: mkdir -p {path.parent}"
            )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(f"The directory {path.parent} is not writable.")


def _show_run(result: BenchResult, output: Output) -> None:
    run = result.runs[0]
    m = run.metrics
    rows = [
        ("Requests completed / failed", f"{m['completed']} / {m['failed']}"),
        ("Duration", f"{m['duration']:.2f} s"),
        ("Prompt / output tokens", f"{m['total_input_tokens']} / {m['total_output_tokens']}"),
        ("Request throughput", f"{m['request_throughput']:.2f} /s"),
        ("Output throughput", f"{m['output_throughput']:.1f} tokens/s"),
        ("Total throughput", f"{m['total_token_throughput']:.1f} tokens/s"),
    ]
    if m.get("request_goodput") is not None:
        rows.append(("SLO goodput", f"{m['request_goodput']:.2f} requests/s"))
    rows += _speculation_rows(run)
    hit_rate = {**m, **run.server}.get("prefix_cache_hit_rate")
    if hit_rate is not None:
        rows.append(("Prefix cache hit rate", f"{100 * hit_rate:.1f} %"))
    rows += [(name, size(value)) for name, value in memory_rows(run)]
    output.table(f"{result.model} — {result.backend}", ("", "value"), rows)
    latency = []
    # A vector comes whole: its first token is its last.
    latencies = _LATENCIES[3:] if result.config.get("endpoint") == "embeddings" else _LATENCIES
    for key, name in latencies:
        if m.get(f"mean_{key}_ms") is not None:
            latency.append((name, *(_ms(m.get(f"{part}_{key}_ms")) for part in _PARTS)))
    output.table("Latency, ms", ("", *_PARTS), latency)


def _speculation_rows(run: RunResult) -> list[tuple[str, str]]:
    """What was drafted and accepted, and why the controller chose as it did last."""
    figures = {**run.metrics, **run.server}
    rows = []
    if figures.get("spec_decode_acceptance_rate") is not None:
        rows += [
            ("Drafts accepted", f"{figures['spec_decode_acceptance_rate']:.1f} % of the tokens"),
            ("Tokens per verified draft", f"{figures['spec_decode_acceptance_length']:.2f}"),
        ]
    if explained := figures.get("speculation"):
        rows.append(("Speculation, last step", _reason(explained)))
    return rows


def _reason(explained: Mapping[str, Any]) -> str:
    """A controller's `explain()` in a line."""
    if not explained:
        return "-"
    text = str(explained.get("why") or f"k = {explained.get('k', '-')}")
    if "goodput" in explained and "seconds_per_token" in explained:
        threshold = explained["goodput"] * explained["seconds_per_token"]
        text += f": a draft token pays above {100 * threshold:.0f} % acceptance"
    if explained.get("watchdog_trips"):
        text += f", watchdog {explained['watchdog_trips']}x"
    return text


_PARTS = ("mean", "p50", "p90", "p95", "p99")


def memory_rows(run: RunResult) -> list[tuple[str, int]]:
    memory = run.server.get("memory_bytes") or run.metrics.get("memory_bytes") or {}
    return [(f"Memory: {_MEMORY.get(kind, kind)}", value) for kind, value in memory.items()]


_MEMORY = {
    "weights": "weights",
    "kv_cache": "KV pages",
    "kv_peak": "KV pages, most in use",
    "aot_arena": "captured steps",
    "rss": "engine RSS",
}


def _show_sweep(result: BenchResult, output: Output) -> None:
    columns: tuple[str, ...] = (
        "req/s",
        "done",
        "tok/s",
        "TTFT p50",
        "TTFT p99",
        "TPOT p50",
        "TPOT p99",
        "E2E p50",
    )
    goodput = any(run.metrics.get("request_goodput") is not None for run in result.runs)
    specs = any("spec" in {**run.metrics, **run.server} for run in result.runs)
    if specs:
        columns = ("spec", *columns, "accepted", "mean k", "last choice")
    rows = []
    for run in result.runs:
        m = run.metrics
        row = [f"{run.request_rate:.3g}", str(m["completed"]), f"{m['output_throughput']:.1f}"]
        row += [_ms(m.get(key)) for key in ("p50_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p99_tpot_ms")]
        row.append(_ms(m.get("p50_e2el_ms")))
        if specs:
            figures = {**m, **run.server}
            drafts, rate = figures.get("spec_decode_num_drafts"), figures.get("spec_decode_acceptance_rate")
            length = figures.get("spec_decode_draft_tokens", 0) / drafts if drafts else 0.0
            row[:0] = [str(run.server.get("spec", m.get("spec", "-")))]
            row += [
                "-" if rate is None else f"{rate:.0f} %",
                f"{length:.1f}",
                _reason(figures.get("speculation", {})),
            ]
        if goodput:
            value = m.get("request_goodput")
            row.append("-" if value is None else f"{value:.2f}")
        rows.append(row)
    title = f"{result.model} — {result.backend} (latencies in ms)"
    output.table(title, (*columns, "goodput") if goodput else columns, rows)
    if result.knee is not None:
        rate = result.knee.get("request_rate")
        output.line(
            "No rate held the objectives."
            if rate is None
            else f"Highest rate that held: {rate:.3g} requests/s"
        )
        output.hint(f"Search ended: {result.knee.get('reason', '')}")


def _ms(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}"


def show_file(file: str, output: Output, html: str | None) -> None:
    check_writable(html)
    report(read_result(file), output, None, html)


def compare_files(files: list[str], output: Output, json_file: str | None, html: str | None) -> None:
    if len(files) != 2:
        raise UsageError(
            f"--compare takes two result files, not {len(files)}.", "llmtool bench --compare A.json B.json"
        )
    if html is not None:
        raise UsageError("--html reports one run; it does not go with --compare.")
    check_writable(json_file)
    result = compare(read_result(files[0]), read_result(files[1]))
    output.document(result.as_dict())
    show_comparison(result, output)
    if json_file is not None:
        write_json(result.as_dict(), json_file)
        output.hint(f"Comparison written to {json_file}")


def show_comparison(result: CompareResult, output: Output) -> None:
    percent = f"{100 * result.confidence:.0f} %"
    for run in result.runs:
        rows = []
        for c in run.metrics:
            interval = "-" if c.low is None or c.high is None else f"{c.low:.3f} to {c.high:.3f}"
            ratio = "-" if c.ratio is None else f"{c.ratio:.3f}"
            rows.append((c.metric, _figure(c.a), _figure(c.b), ratio, interval, c.verdict))
        at = "" if run.request_rate is None else f" at {run.request_rate:.3g} requests/s"
        title = f"A = {result.a}, B = {result.b}{at}{', paired requests' if run.paired else ''}"
        output.table(title, ("metric", "A", "B", "B / A", f"{percent} interval", "B is"), rows)
    for name, (a, b) in result.differences.items():
        output.hint(f"Setting {name} differs: {a} in A, {b} in B")
    for note in result.notes:
        output.hint(note)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
