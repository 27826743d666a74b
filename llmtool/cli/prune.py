"""`llmtool prune`: a smaller model without retraining, inside a hard budget, loadable by everyone."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtool.cli.command import JsonFlag, QuietFlag, command
from llmtool.cli.output import Output

if TYPE_CHECKING:
    from llmtool.prune.report import Report

_budget, _data, _how, _out = (
    "Budget (shares of the dense model, several hold at once)",
    "Data",
    "Method",
    "Output",
)


def _flag(panel: str, text: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **options)


@command
def prune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Alias (bert, distilbert, smollm2-135m, ...), hub id or directory."
        ),
    ],
    flops: Annotated[float | None, _flag(_budget, "Multiply-accumulates of attention and MLPs.")] = None,
    latency: Annotated[
        float | None, _flag(_budget, "Seconds of a forward pass, measured on this device.")
    ] = None,
    params: Annotated[float | None, _flag(_budget, "Parameters of attention and MLPs.")] = None,
    kv: Annotated[float | None, _flag(_budget, "KV cache bytes per token (decoders).")] = None,
    task: Annotated[str | None, _flag(_data, "A task by name: sst2, mrpc, squad, ...")] = None,
    data: Annotated[
        Path | None, _flag(_data, "TSV, CSV or JSONL with text and labels; for images their directory.")
    ] = None,
    text: Annotated[Path | None, _flag(_data, "Plain text, label-free.")] = None,
    samples: Annotated[int, _flag(_data, "Calibration samples.")] = 512,
    method: Annotated[
        str, _flag(_how, "obs, paper (the seed, as released), magnitude, random, wanda-sp or flap.")
    ] = "obs",
    granularity: Annotated[
        int | None,
        _flag(_how, "MLP widths are multiples of it (default 16 on a CPU, 64 on a GPU).", show_default=False),
    ] = None,
    uniform: Annotated[
        bool, _flag(_how, "The same sizes in every layer: decoders then need no custom code.", "--uniform")
    ] = False,
    rounds: Annotated[
        int | None,
        _flag(_how, "Rounds of pruning and scoring again (default by budget).", show_default=False),
    ] = None,
    latency_batch: Annotated[int, _flag(_how, "Sequences of a batch for --latency.")] = 1,
    device: Annotated[
        str | None, _flag(_how, "cpu or cuda (default: what there is).", show_default=False)
    ] = None,
    seed: Annotated[int, _flag(_how, "Chooses samples and labels drawn.")] = 0,
    output: Annotated[
        Path | None,
        _flag(
            _out, "Directory to write (default: named after the model).", "--output", "-o", show_default=False
        ),
    ] = None,
    export: Annotated[str, _flag(_out, "Formats, separated by commas: hf, onnx, gguf.")] = "hf",
    draft: Annotated[bool, _flag(_out, "Write a draft model for speculative decoding.", "--draft")] = False,
    sweep: Annotated[
        str | None,
        _flag(_out, "Try shares (from:to:step) and draw pareto.png and pareto.csv.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Make a model smaller without retraining: whole heads, KV heads and neurons go, the rest is refitted.

    Examples:

      llmtool prune bert --flops 0.5 --task sst2 -o out/

      llmtool prune smollm2-135m --params 0.8 --kv 0.67 --text book.txt -o out/ && llmtool serve out/model

      llmtool prune ./my-model --latency 0.6 --data train.jsonl --export hf,onnx -o out/

      llmtool prune ./my-model --flops 0.5                       # label-free, on Python's own English
    """
    from llmtool.prune.config import PruneConfig, parse_sweep

    out = Output(as_json, quiet)
    given = {"flops": flops, "latency": latency, "params": params, "kv": kv}
    target = output or Path(f"{Path(model.rstrip('/')).name}-pruned")
    config = PruneConfig(
        model=model,
        budget={kind: share for kind, share in given.items() if share is not None},
        task=task,
        data=data,
        text=text,
        samples=samples,
        method=method,
        granularity=granularity,
        uniform=uniform,
        export=tuple(part for part in export.split(",") if part),
        draft=draft,
        sweep=parse_sweep(sweep),
        seed=seed,
        output=target,
        device=device,
        latency_batch=latency_batch,
        rounds=rounds,
        command=shlex.join(["llmtool", *sys.argv[1:]]),
    )
    config.check()
    if output is None:
        out.hint(f"Writing to {target}.")
    if task is None and data is None and text is None:
        out.hint("No data was given: calibrating label-free, on the English of Python's own help.")
    _print(_run(config, out), target, out)


def _run(config: Any, out: Output) -> Report:
    from llmtool.prune.pipeline import Run

    with out.progress() as progress:
        return Run(config, lambda what, share: progress(_said(what, share), share)).execute()


def _said(what: str, share: float | None) -> str:
    return what if share is None else f"{what}: {share:.0%}"


def _print(report: Report, target: Path, out: Output) -> None:
    from llmtool.prune.report import LAYER_COLUMNS, layer_rows, summary_rows

    out.document(report.as_dict() | {"output": str(target)})
    if report.layers:
        out.table("Layers", LAYER_COLUMNS, layer_rows(report))
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items())
        note = f"{report.method}, seed {report.seed}, {report.calibration}. {phases}."
        out.table("Dense and small", ("", "dense", "small", ""), summary_rows(report), note)
    if draft := report.notes.get("draft"):
        out.line(
            f"Draft: {draft['layers']} of {draft['dense_layers']} layers, acceptance {draft['acceptance']:.3f}, "
            f"cost {draft['cost_ratio']:.3f} of the model, expected gain {draft['gain']:.2f}x with "
            f"{draft['tokens']} tokens."
        )
    out.line(f"Wrote {target}")
