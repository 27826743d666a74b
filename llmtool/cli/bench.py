"""`llmtool bench`: measure a server, or an engine in this process, or compare two results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer

from llmtool.cli import engine_flags as engine
from llmtool.cli.command import MASK, ConfigFile, JsonFlag, PrintConfig, QuietFlag, command, optional_size
from llmtool.cli.output import Output
from llmtool.config import EngineConfig, ServerConfig, as_dict, field_names, resolve
from llmtool.errors import LLMToolError, UsageError

if TYPE_CHECKING:
    from llmtool.bench.config import BenchConfig

T = TypeVar("T")
_data, _load, _ask, _quality, _simulated = "Dataset", "Load", "Requests", "Perplexity", "Simulation"
_ahead = "Ahead-of-time execution"


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
    endpoint: Annotated[str | None, _flag(_ask, "auto, completions, chat or embeddings.")] = None,
    temperature: Annotated[float | None, _flag(_ask, "0 is greedy (default).")] = None,
    top_p: Annotated[float | None, _flag(_ask, "Nucleus sampling.")] = None,
    top_k: Annotated[int | None, _flag(_ask, "Sample from the k best.")] = None,
    ignore_eos: Annotated[
        bool | None, _flag(_ask, "Generate the full length whatever the model says.", "--ignore-eos")
    ] = None,
    extra_body: Annotated[str | None, _flag(_ask, "More fields of every request, as JSON.")] = None,
    timeout: Annotated[float | None, _flag(_ask, "Seconds for one request, with --url.")] = None,
    metric_percentiles: Annotated[str | None, _flag(_ask, "Percentiles to report (50,90,95,99).")] = None,
    save_text: Annotated[bool | None, _flag(_ask, "Keep the generated texts.", "--save-text")] = None,
    perplexity: Annotated[
        bool | None,
        _flag(
            _quality,
            "Measure it on a text instead: MODEL --perplexity FILE (without: Python's help).",
            "--perplexity",
        ),
    ] = None,
    perplexity_window: Annotated[int | None, _flag(_quality, "Tokens the model sees at once (1024).")] = None,
    perplexity_stride: Annotated[
        int | None, _flag(_quality, "Tokens scored per window (half of it).")
    ] = None,
    perplexity_tokens: Annotated[int | None, _flag(_quality, "Tokens read; 0 is all (32768).")] = None,
    baseline: Annotated[
        list[str] | None,
        _flag(_quality, "Engine setting to compare with, as dtype=float32; repeatable.", "--baseline"),
    ] = None,
    simulate: Annotated[
        bool | None,
        _flag(_simulated, "No engine: --device NAME on a virtual clock, for --spec.", "--simulate"),
    ] = None,
    acceptance: Annotated[
        float | None, _flag(_simulated, "Chance that a draft token is right (0.7).")
    ] = None,
    coverage: Annotated[
        float | None, _flag(_simulated, "Chance that a sequence has a draft at all (1).")
    ] = None,
    aot: Annotated[
        str | None,
        _flag(
            _ahead,
            "Compare eager, compiled and ahead-of-time steps of a model or a net (bert, distilbert, pruned-bert, "
            "decoder, moe, resnet, mobilenet, efficientnet, inception, nasnet, mlp) instead.",
            "--aot",
        ),
    ] = None,
    aot_batch: Annotated[str | None, _flag(_ahead, "Batch sizes, as 1,8 (1).")] = None,
    aot_seconds: Annotated[float | None, _flag(_ahead, "Measured so long for each batch size (3).")] = None,
    aot_peers: Annotated[
        bool | None, _flag(_ahead, "Also run torch.compile (default on).", "--aot-peers/--no-aot-peers")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of prompts, arrivals and sampling.")] = None,
    dtype: engine.Dtype = None,
    quantization: engine.Quantization = None,
    kv_cache_dtype: engine.KVCacheDtype = None,
    device: engine.Device = None,
    load_format: engine.LoadFormat = None,
    revision: engine.Revision = None,
    tokenizer: engine.TokenizerDir = None,
    max_model_len: engine.MaxModelLen = None,
    max_num_seqs: engine.MaxNumSeqs = None,
    max_num_batched_tokens: engine.MaxNumBatchedTokens = None,
    max_waiting: engine.MaxWaiting = None,
    block_size: engine.BlockSize = None,
    kv_page_plan: engine.PagePlan = None,
    gpu_memory_utilization: engine.MemoryUtilization = None,
    kv_cache_memory: engine.KVCacheMemory = None,
    swap_space: engine.SwapSpace = None,
    preemption: engine.Preemption = None,
    scheduling_policy: engine.SchedulingPolicy = None,
    enable_prefix_caching: engine.PrefixCaching = None,
    enforce_eager: engine.EnforceEager = None,
    num_threads: engine.NumThreads = None,
    tensor_parallel_size: engine.TensorParallel = None,
    pipeline_parallel_size: engine.PipelineParallel = None,
    pipeline_layers: engine.PipelineLayers = None,
    enable_expert_parallel: engine.ExpertParallel = None,
    nnodes: engine.Nodes = None,
    node_rank: engine.NodeRank = None,
    master_addr: engine.MasterAddr = None,
    master_port: engine.MasterPort = None,
    distributed_timeout_seconds: engine.DistributedTimeout = None,
    spec: engine.Spec = None,
    proposer: engine.Proposer = None,
    spec_branches: engine.SpecBranches = None,
    step_log: engine.StepLog = None,
    data_parallel_size: engine.DataParallelSize = None,
    disaggregate: engine.Disaggregate = None,
    replica_timeout: engine.ReplicaTimeout = None,
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

      llmtool bench ./my-model --perplexity text.txt --baseline dtype=float32

      llmtool bench --spec auto,off,3 --request-rate 1,2,4   # what speculation brings, and why

      llmtool bench llama-3.1-8b --simulate --device h100 --spec auto,off,3 --request-rate 1,20 --acceptance 0.7

      llmtool bench --aot inception --aot-batch 1,8 --html inception.html
    """
    flags: dict[str, Any] = dict(locals())
    from llmtool.cli import bench_run

    output = Output(as_json, quiet)
    if compare:
        bench_run.compare_files(
            [*compare, *([model] if model else []), *(files or [])], output, output_file, html
        )
        return
    if show is not None:
        with _document_shown(output):
            bench_run.show_file(show, output, html)
        return
    if aot is not None:
        from llmtool.cli import bench_aot

        bench_run.check_writable(output_file, html)
        bench_aot.bench_aot(flags, output)
        return
    refuse_aot(flags)
    if perplexity:
        measure_perplexity(flags, [*([model] if model else []), *(files or [])], config, output)
        return
    if files:
        raise UsageError(f"Unexpected argument {files[0]!r}.", "One model is benched at a time.")
    bench_config, engine_config, api_key = settings(flags, config)
    refuse_perplexity(flags)
    refuse_ignored(flags, bench_config.url)
    if print_config:
        print_settings(bench_config, engine_config, api_key, output)
        return
    if engine_config.node_rank:
        raise UsageError(
            f"bench runs on node 0, and this is node {engine_config.node_rank}.",
            "Run `llmtool serve` with the same engine flags here: it works for node 0.",
        )
    bench_run.check_writable(output_file, html)
    if simulate:
        from llmtool.cli.bench_simulate import simulate as on_virtual_clock

        chances = 0.7 if acceptance is None else acceptance, 1.0 if coverage is None else coverage
        result = on_virtual_clock(bench_config, engine_config, *chances)
    else:
        if acceptance is not None or coverage is not None:
            raise UsageError("--acceptance and --coverage go with --simulate.", "Add it, or leave them out.")
        result = bench_run.measure(bench_config, engine_config, api_key, output)
    with _document_shown(output):
        bench_run.report(result, output, output_file, html)


def measure_perplexity(
    flags: dict[str, Any], positional: list[str], config: str | None, output: Output
) -> None:
    from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig
    from llmtool.bench.perplexity import PerplexityConfig
    from llmtool.cli import bench_perplexity, bench_run

    load = (
        field_names(BenchConfig) | field_names(DatasetConfig) | field_names(LoadConfig) | {"html", "api_key"}
    )
    kept = field_names(EngineConfig) | {"dataset_path"}
    bench_perplexity.refuse_ignored(flags, load - kept)
    model, text = bench_perplexity.arguments(positional, flags["dataset_path"])
    merged = _merger(config, None)
    engine_config = merged(EngineConfig, _with_sizes(flags) | {"model": model})
    settings = merged(PerplexityConfig, flags)
    baseline = bench_perplexity.baseline_of(engine_config, flags["baseline"] or ())
    if flags["print_config"]:
        flat = as_dict(engine_config, settings)
        output.document(flat)
        output.table("Settings", ("name", "value"), [(k, str(v)) for k, v in flat.items()])
        return
    bench_run.check_writable(flags["output_file"])
    bench_perplexity.bench_perplexity(engine_config, baseline, settings, text, output, flags["output_file"])


def refuse_aot(flags: Mapping[str, Any]) -> None:
    """UsageError for flags that need --aot."""
    given = [n for n in ("aot_batch", "aot_seconds", "aot_peers") if flags.get(n) is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{names} goes with --aot.", "Add it, or leave it out.")


def refuse_perplexity(flags: Mapping[str, Any]) -> None:
    """UsageError for flags that need --perplexity."""
    names = ("perplexity_window", "perplexity_stride", "perplexity_tokens", "baseline")
    given = [f"--{name.replace('_', '-')}" for name in names if flags.get(name) is not None]
    if given:
        raise UsageError(f"{', '.join(given)} goes with --perplexity.", "Add it, or leave it out.")


@contextmanager
def _document_shown(output: Output) -> Iterator[None]:
    """An error after the result: under --json stdout has its one document already, the error is for stderr."""
    try:
        yield
    except LLMToolError as error:
        if not output.as_json or isinstance(error, UsageError):
            raise
        Output(quiet=output.quiet).error(error)
        raise typer.Exit(error.exit_code) from None


def settings(
    flags: dict[str, Any], config: str | None, environ: Mapping[str, str] | None = None
) -> tuple[BenchConfig, EngineConfig, str | None]:
    """What to measure, the engine for it where there is no --url, and the server's key: file < environment < flags.
    Settings of the other commands are accepted, so that one file serves all."""
    from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig

    merged = _merger(config, environ)
    flags = _with_sizes(flags)
    rates = parse_rates(flags.pop("request_rate", None))
    if len(rates) > 1:
        flags["request_rates"] = rates
    elif rates:
        flags["request_rate"], flags["request_rates"] = rates[0], ()
    if flags.get("extra_body") is not None:
        flags["extra_body"] = _json_object(flags["extra_body"])
    if flags.get("goodput") is not None:
        flags["goodput"] = tuple(part for text in flags["goodput"] for part in text.split())
    if flags.get("metric_percentiles") is not None:
        flags["metric_percentiles"] = _floats(flags["metric_percentiles"], "list of percentiles", "50,90,99")
    dataset, load = merged(DatasetConfig, flags), merged(LoadConfig, flags)
    bench_config = merged(BenchConfig, flags | {"dataset": dataset, "load": load})
    api_key = merged(ServerConfig, {"api_key": flags.get("api_key")}).api_key
    return bench_config, merged(EngineConfig, flags), None if api_key == MASK else api_key


def _with_sizes(flags: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"kv_cache_memory_bytes": "kv_cache_memory", "swap_space_bytes": "swap_space"}
    layers = engine.layer_counts(flags.get("pipeline_layers"))
    return {
        **flags,
        "pipeline_layers": layers,
        **{name: optional_size(flags.get(flag)) for name, flag in sizes.items()},
    }


class _Merger(Protocol):
    def __call__(self, cls: type[T], values: Mapping[str, Any]) -> T: ...


def _merger(config: str | None, environ: Mapping[str, str] | None) -> _Merger:
    """Makes settings of any class from flags over environment over file, which may hold those of the others too."""
    from llmtool.bench.config import BenchConfig, DatasetConfig, LoadConfig
    from llmtool.bench.perplexity import PerplexityConfig

    classes = (EngineConfig, BenchConfig, DatasetConfig, LoadConfig, PerplexityConfig, ServerConfig)
    known = frozenset[str]().union(*(field_names(cls) for cls in classes))

    def merged(cls: type[T], values: Mapping[str, Any]) -> T:
        return resolve(cls, values, config, environ, known - field_names(cls))

    return merged


def refuse_ignored(flags: Mapping[str, Any], url: str | None) -> None:
    """UsageError for flags that this run would not heed."""
    from llmtool.bench.config import BenchConfig

    if url is None:
        if flags["timeout"] is not None:
            raise UsageError("--timeout is for requests over HTTP.", "Give --url, or leave it out.")
        return
    shared = field_names(BenchConfig) | {"max_model_len"}
    engine_only = sorted(field_names(EngineConfig) - shared | {"kv_cache_memory", "swap_space"})
    given = [f"--{n.replace('_', '-')}" for n in engine_only if flags.get(n) is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)} cannot change the server at {url}.", "Give them to `llmtool serve`."
        )


def print_settings(bench: BenchConfig, engine: EngineConfig, api_key: str | None, output: Output) -> None:
    """Flat, and fit to be given back as --config; the key is not shown."""
    own = bench.as_dict()
    # With a server of its own choice there is no engine to set up, and no model but the server's.
    flat = own if bench.url else own | {k: v for k, v in as_dict(engine).items() if own.get(k) is None}
    if api_key is not None:
        flat["api_key"] = MASK
    output.document(flat)
    output.table("Settings", ("name", "value"), [(k, str(v)) for k, v in flat.items()])


def parse_rates(text: str | None) -> tuple[float, ...]:
    return () if text is None else _floats(text, "request rate", "4, inf, or 1,2,4 for a sweep")


def _floats(text: str, what: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{text!r} is no {what}.", f"Write {example}.") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise UsageError(f"--extra-body is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UsageError("--extra-body must be a JSON object.")
    return value
