"""`llmtool bench`: measure a server, or an engine in this process, or compare two results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtool.cli import engine_flags as engine
from llmtool.cli.command import ConfigFile, JsonFlag, PrintConfig, QuietFlag, command, optional_size
from llmtool.cli.output import Output
from llmtool.config import EngineConfig, field_names, resolve
from llmtool.errors import UsageError

if TYPE_CHECKING:
    from llmtool.bench.config import BenchConfig

_data, _load, _ask = "Dataset", "Load", "Requests"


def _flag(panel: str, text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


@command
def bench(
    model: engine.ModelArg = None,
    url: Annotated[
        str | None, typer.Option(help="Server to measure; without it an engine in process.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LLMTOOL_API_KEY", help="The server's key.")] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="A.json B.json", help="Compare two results: --compare A.json --compare B.json."),
    ] = None,
    show: Annotated[str | None, typer.Option(metavar="FILE", help="Show a result again.")] = None,
    output_file: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result as JSON.")
    ] = None,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a self-contained report.")] = None,
    label: Annotated[str | None, typer.Option(help="What to call this run in reports.")] = None,
    dataset_name: Annotated[
        str | None,
        _flag(
            _data, "random, prefix_repetition, copy, sharegpt, custom, azure, burstgpt, lengths or mooncake."
        ),
    ] = None,
    dataset_path: Annotated[str | None, _flag(_data, "File of sharegpt, custom and timed traces.")] = None,
    num_prompts: Annotated[int | None, _flag(_data, "Requests to send (default 100).")] = None,
    random_input_len: Annotated[int | None, _flag(_data, "Prompt tokens (default 512).")] = None,
    random_output_len: Annotated[int | None, _flag(_data, "Output tokens (default 128).")] = None,
    random_range_ratio: Annotated[float | None, _flag(_data, "Lengths vary by this part, 0 to 1.")] = None,
    random_prefix_len: Annotated[int | None, _flag(_data, "Tokens that all prompts share.")] = None,
    prefix_repetition_prefix_len: Annotated[int | None, _flag(_data, "Tokens of a prefix (256).")] = None,
    prefix_repetition_suffix_len: Annotated[int | None, _flag(_data, "Tokens after it (256).")] = None,
    prefix_repetition_num_prefixes: Annotated[int | None, _flag(_data, "Different prefixes (10).")] = None,
    prefix_repetition_output_len: Annotated[int | None, _flag(_data, "Output tokens (128).")] = None,
    copy_passage_len: Annotated[int | None, _flag(_data, "Tokens to copy (160).")] = None,
    copy_output_len: Annotated[int | None, _flag(_data, "Output tokens (128).")] = None,
    output_len: Annotated[int | None, _flag(_data, "Output tokens, whatever the file says.")] = None,
    trace_block_size: Annotated[int | None, _flag(_data, "Tokens per Mooncake hash id (512).")] = None,
    request_rate: Annotated[
        str | None, _flag(_load, "Requests per second, or inf; several, as 1,2,4, make a sweep.")
    ] = None,
    burstiness: Annotated[
        float | None, _flag(_load, "1 is Poisson, smaller is burstier, inf constant.")
    ] = None,
    max_concurrency: Annotated[int | None, _flag(_load, "Requests under way at once.")] = None,
    ramp_up_start_rps: Annotated[float | None, _flag(_load, "A rate that grows from here …")] = None,
    ramp_up_end_rps: Annotated[float | None, _flag(_load, "… to here.")] = None,
    trace_speedup: Annotated[float | None, _flag(_load, "Play a timed trace faster.")] = None,
    duration: Annotated[float | None, _flag(_load, "Send nothing after so many seconds.")] = None,
    num_warmups: Annotated[int | None, _flag(_load, "Requests before the measured ones (1).")] = None,
    search_knee: Annotated[
        bool | None, _flag(_load, "Find the highest rate that holds --goodput.", "--search-knee")
    ] = None,
    slo_attainment: Annotated[
        float | None, _flag(_load, "Part of the requests that must hold it (0.9).")
    ] = None,
    knee_min_rate: Annotated[float | None, _flag(_load, "Lowest rate of the search (0.5).")] = None,
    knee_max_rate: Annotated[float | None, _flag(_load, "Highest rate of the search (256).")] = None,
    knee_max_runs: Annotated[int | None, _flag(_load, "Runs that the search may make (12).")] = None,
    goodput: Annotated[
        list[str] | None, _flag(_ask, "An objective, as ttft:200, tpot:50 (ms) or ttft:p99:500; repeatable.")
    ] = None,
    endpoint: Annotated[str | None, _flag(_ask, "auto, completions or chat.")] = None,
    temperature: Annotated[float | None, _flag(_ask, "0 is greedy (default).")] = None,
    top_p: Annotated[float | None, _flag(_ask, "Nucleus sampling.")] = None,
    top_k: Annotated[int | None, _flag(_ask, "Sample from the k best.")] = None,
    ignore_eos: Annotated[
        bool | None, _flag(_ask, "Generate the full length whatever the model says.", "--ignore-eos")
    ] = None,
    extra_body: Annotated[str | None, _flag(_ask, "More fields of every request, as JSON.")] = None,
    timeout: Annotated[float | None, _flag(_ask, "Seconds for one request.")] = None,
    save_text: Annotated[bool | None, _flag(_ask, "Keep the generated texts.", "--save-text")] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts, arrivals and sampling.")] = None,
    dtype: engine.Dtype = None,
    device: engine.Device = None,
    load_format: engine.LoadFormat = None,
    revision: engine.Revision = None,
    tokenizer: engine.TokenizerDir = None,
    max_model_len: engine.MaxModelLen = None,
    max_num_seqs: engine.MaxNumSeqs = None,
    max_num_batched_tokens: engine.MaxNumBatchedTokens = None,
    max_waiting: engine.MaxWaiting = None,
    block_size: engine.BlockSize = None,
    gpu_memory_utilization: engine.MemoryUtilization = None,
    kv_cache_memory: engine.KVCacheMemory = None,
    swap_space: engine.SwapSpace = None,
    preemption: engine.Preemption = None,
    scheduling_policy: engine.SchedulingPolicy = None,
    enable_prefix_caching: engine.PrefixCaching = None,
    num_threads: engine.NumThreads = None,
    step_log: engine.StepLog = None,
    files: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Measure throughput, TTFT, TPOT, ITL and end-to-end latency.

    Examples:

      llmtool bench                                          # the embedded model, in process

      llmtool bench ./my-model --num-prompts 200 --request-rate 4 -o a.json --html a.html

      llmtool bench --url http://127.0.0.1:8000 --dataset-name azure --dataset-path trace.csv

      llmtool bench --request-rate 1,2,4,8 --goodput ttft:500 --goodput tpot:100

      llmtool bench --compare a.json b.json
    """
    flags: dict[str, Any] = dict(locals())
    from llmtool.cli import bench_run

    output = Output(as_json, quiet)
    if compare:
        bench_run.compare_files([*compare, *([model] if model else []), *(files or [])], output, html)
        return
    if show is not None:
        bench_run.show_file(show, output, html)
        return
    if files:
        raise UsageError(f"Unexpected argument {files[0]!r}.", "One model is benched at a time.")
    bench_config, rest = bench_settings(flags)
    engine_config = engine_settings(rest, config)
    if print_config:
        from llmtool.cli.serve import print_settings

        print_settings(output, engine_config, bench_config)
        return
    result = bench_run.measure(bench_config, engine_config, api_key, output)
    bench_run.report(result, output, output_file, html)


def bench_settings(flags: dict[str, Any]) -> tuple[BenchConfig, dict[str, Any]]:
    """The bench's own settings, and the flags with what the engine shares."""
    from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig

    flags = dict(flags)
    rates = parse_rates(flags.pop("request_rate"))
    if len(rates) > 1:
        flags["request_rates"] = rates
    elif rates:
        flags["request_rate"] = rates[0]
    if flags["extra_body"] is not None:
        flags["extra_body"] = _json_object(flags["extra_body"])
    if flags["goodput"] is not None:
        flags["goodput"] = tuple(part for text in flags["goodput"] for part in text.split())

    def given(cls: type[Any]) -> dict[str, Any]:
        return {name: flags[name] for name in field_names(cls) if flags.get(name) is not None}

    dataset, load = DatasetConfig(**given(DatasetConfig)), LoadConfig(**given(LoadConfig))
    own = given(BenchConfig) | {"dataset": dataset, "load": load}
    return BenchConfig(**own), flags


def engine_settings(flags: dict[str, Any], config: str | None) -> EngineConfig:
    flags = dict(flags)
    flags["kv_cache_memory_bytes"] = optional_size(flags["kv_cache_memory"])
    flags["swap_space_bytes"] = optional_size(flags["swap_space"])
    return resolve(EngineConfig, flags, config)


def parse_rates(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is no request rate.", "Write 4, inf, or 1,2,4 for a sweep.") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--extra-body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UsageError("--extra-body must be a JSON object.")
    return value
