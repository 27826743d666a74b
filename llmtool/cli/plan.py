"""`llmtool plan`: the best parallel deployment of a model, found without a device."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmtool.cli.command import JsonFlag, QuietFlag, command
from llmtool.cli.output import Output

_hardware, _load, _space, _out = "Hardware", "Workload", "Space", "Output"


def _option(name: str, text: str, panel: str, *aliases: str, metavar: str | None = None) -> Any:
    return typer.Option(name, *aliases, help=text, rich_help_panel=panel, metavar=metavar)


@command
def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Catalogue name, config.json, directory or hub id.", show_default=False
        ),
    ] = None,
    device: Annotated[str | None, _option("--device", "Such as h100; `--list` shows all.", _hardware)] = None,
    num_devices: Annotated[int, _option("--num-devices", "Devices in all.", _hardware)] = 8,
    devices_per_node: Annotated[
        int, _option("--devices-per-node", "Default: the device's usual.", _hardware)
    ] = 0,
    devices_file: Annotated[
        str | None, _option("--devices", "TOML file with further devices.", _hardware, metavar="FILE")
    ] = None,
    tables: Annotated[
        str | None,
        _option("--tables", "Measured kernel tables, as --import-tables writes.", _hardware, metavar="FILE"),
    ] = None,
    price: Annotated[float | None, _option("--price", "Dollars per device and hour.", _hardware)] = None,
    prices: Annotated[str | None, _option("--prices", "Price table.", _hardware, metavar="FILE")] = None,
    workload: Annotated[
        str | None, _option("--workload", "chat, conversation, code, summarization or creation.", _load)
    ] = None,
    trace: Annotated[
        str | None,
        _option("--trace", "Recorded requests: Azure, BurstGPT, Mooncake, Vidur.", _load, metavar="FILE"),
    ] = None,
    trace_format: Annotated[
        str | None, _option("--trace-format", "Where it cannot be guessed.", _load)
    ] = None,
    input_len: Annotated[int | None, _option("--input-len", "Fixed prompt tokens.", _load)] = None,
    output_len: Annotated[int | None, _option("--output-len", "Fixed output tokens.", _load)] = None,
    num_prompts: Annotated[int, _option("--num-prompts", "Requests to simulate.", _load)] = 500,
    request_rate: Annotated[float | None, _option("--request-rate", "Requests per second.", _load)] = None,
    burstiness: Annotated[float, _option("--burstiness", "1 is a Poisson process.", _load)] = 1.0,
    max_concurrency: Annotated[
        int | None, _option("--max-concurrency", "Clients of a closed loop, instead of a rate.", _load)
    ] = None,
    seed: Annotated[int, _option("--seed", "Of lengths and arrivals.", _load)] = 0,
    slo: Annotated[
        list[str] | None, _option("--slo", "As ttft:p99:500 or tpot:50, in ms; repeatable.", _load)
    ] = None,
    objective: Annotated[
        str | None,
        _option("--objective", "goodput, latency, throughput, cost or energy. Default: goodput.", _load),
    ] = None,
    engine: Annotated[
        str, _option("--engine", "vllm, sglang, trtllm, vllm-0.6 or llmtool.", _space)
    ] = "vllm",
    dtype: Annotated[
        list[str] | None,
        _option(
            "--dtype", "Weights: bf16, fp8, int4, ...; several to choose from. Default: published.", _space
        ),
    ] = None,
    kv_dtype: Annotated[
        list[str] | None, _option("--kv-dtype", "KV cache: bf16 or fp8; several to choose from.", _space)
    ] = None,
    budget: Annotated[
        list[int] | None,
        _option("--max-num-batched-tokens", "Token budgets to choose from.", _space),
    ] = None,
    max_num_seqs: Annotated[
        list[int] | None, _option("--max-num-seqs", "Sequence limits to choose from.", _space)
    ] = None,
    max_model_len: Annotated[
        int | None, _option("--max-model-len", "Longest sequence. Default: the workload's.", _space)
    ] = None,
    enable_prefix_caching: Annotated[
        bool | None,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Default: on where the trace shares prefixes.",
            rich_help_panel=_space,
        ),
    ] = None,
    spec: Annotated[
        list[str] | None,
        _option("--spec", "Speculation to choose from: off, auto, smartspec, 3, ... Default: off.", _space),
    ] = None,
    acceptance: Annotated[
        float | None, _option("--acceptance", "Part of the draft tokens that are right.", _space)
    ] = None,
    coverage: Annotated[
        float | None, _option("--coverage", "Part of the steps that have a draft. Default: 1.", _space)
    ] = None,
    router: Annotated[
        str | None,
        _option("--router", "round-robin, least-loaded or prefix-aware (default: the engine's own).", _space),
    ] = None,
    fewer_devices: Annotated[
        bool,
        typer.Option("--fewer-devices", help="Also plans that leave devices idle.", rich_help_panel=_space),
    ] = False,
    any_plan: Annotated[
        bool,
        typer.Option(
            "--any-plan", help="Also plans that the engine has no flags for.", rich_help_panel=_space
        ),
    ] = False,
    disaggregate: Annotated[
        bool,
        typer.Option(
            "--disaggregate", help="Also plans with engines of their own for prefill.", rich_help_panel=_space
        ),
    ] = False,
    exhaustive: Annotated[
        bool, typer.Option("--exhaustive", help="Simulate every plan in full.", rich_help_panel=_space)
    ] = False,
    processes: Annotated[int | None, _option("--processes", "Default: one per core.", _space)] = None,
    capacity: Annotated[
        bool,
        typer.Option("--capacity", help="Also the highest rate the best plan holds.", rich_help_panel=_out),
    ] = False,
    what_if: Annotated[
        list[str] | None,
        _option(
            "--what-if", "rate=2, device=h200, dtype=fp8, model=DIR, speculation=3, ...; repeatable.", _out
        ),
    ] = None,
    top: Annotated[int, _option("--top", "Plans to print.", _out)] = 10,
    output_file: Annotated[
        str | None, _option("--output", "Write the best plan for `serve --plan`.", _out, "-o", metavar="FILE")
    ] = None,
    html: Annotated[str | None, _option("--html", "Report with pictures.", _out, metavar="FILE")] = None,
    perfetto: Annotated[
        str | None, _option("--perfetto", "Trace of the best plan's simulation.", _out, metavar="FILE")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        _option(
            "--calibrate",
            "Fit the engine's constants to a bench result of --plan; repeatable. Kept per device and engine.",
            "Calibrate",
            metavar="FILE",
        ),
    ] = None,
    plan_file: Annotated[
        str | None, _option("--plan", "The plan that the bench result is of.", "Calibrate", metavar="FILE")
    ] = None,
    import_tables: Annotated[
        str | None,
        _option(
            "--import-tables",
            "Folder of aiconfigurator-core's tables of one device.",
            "Calibrate",
            metavar="DIR",
        ),
    ] = None,
    list_all: Annotated[
        bool, typer.Option("--list", help="Models, devices, engines and workloads known here.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Find the best parallel deployment of a model, without a GPU.

    Examples:

      llmtool plan llama-3.1-70b --device h100 --num-devices 8 --workload chat --request-rate 4

      llmtool plan qwen3-235b-a22b --device h200 --trace azure.csv --slo ttft:p99:1000 --slo tpot:p90:50

      llmtool plan ./my-model --device l40s --num-devices 4 --objective cost --price 0.9 -o plan.toml

      llmtool plan --calibrate measured.json --plan plan.toml
    """
    arguments = dict(locals())
    from llmtool.cli import plan_run, plan_show

    output = Output(as_json, quiet)
    if list_all:
        plan_show.show_catalogue(output, devices_file)
    elif import_tables is not None:
        plan_run.import_kernel_tables(output, import_tables, device, devices_file, output_file)
    elif calibrate:
        from llmtool.cli.plan_calibrate import calibrate_from

        calibrate_from(output, arguments)
    else:
        plan_run.run(output, arguments)
