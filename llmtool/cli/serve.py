"""`llmtool serve`: an OpenAI-compatible server of one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtool.cli import engine_flags as engine
from llmtool.cli.command import MASK, ConfigFile, JsonFlag, PrintConfig, QuietFlag, command, optional_size
from llmtool.cli.output import Output, size
from llmtool.config import EngineConfig, ServerConfig, as_dict, field_names, resolve
from llmtool.errors import UsageError

if TYPE_CHECKING:
    from llmtool.models.tokenizer import Tokenizer
    from llmtool.runtime.async_engine import AsyncEngine
    from llmtool.runtime.fleet import Fleet

_panel = "Server"


@command
def serve(
    model: engine.ModelArg = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", rich_help_panel=_panel)] = None,
    port: Annotated[
        int | None, typer.Option(help="Port; 0 picks a free one.", rich_help_panel=_panel)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="LLMTOOL_API_KEY", help="Key that requests must bring.", rich_help_panel=_panel),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", rich_help_panel=_panel)
    ] = None,
    allowed_origins: Annotated[
        str | None, typer.Option(help="CORS origins, separated by commas.", rich_help_panel=_panel)
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Jinja file, if not the model's own.", rich_help_panel=_panel)
    ] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="Grace for running requests on SIGTERM.", rich_help_panel=_panel)
    ] = None,
    max_body: Annotated[
        str | None, typer.Option(help="Largest request body, for example 32MiB.", rich_help_panel=_panel)
    ] = None,
    metrics_compat: Annotated[
        str | None, typer.Option(help="Names of shared metrics: vllm's, or none.", rich_help_panel=_panel)
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            envvar="LLMTOOL_LOG_LEVEL", help="debug, info, warning or error.", rich_help_panel=_panel
        ),
    ] = None,
    allow_lark: Annotated[
        bool | None,
        typer.Option("--allow-lark", help="Take lark grammars from clients.", rich_help_panel=_panel),
    ] = None,
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
    seed: Annotated[int | None, typer.Option(help="Of requests that bring none.")] = None,
    spec: engine.Spec = None,
    proposer: engine.Proposer = None,
    spec_branches: engine.SpecBranches = None,
    step_log: engine.StepLog = None,
    data_parallel_size: engine.DataParallelSize = None,
    disaggregate: engine.Disaggregate = None,
    replica_timeout: engine.ReplicaTimeout = None,
    plan: Annotated[
        str | None,
        typer.Option("--plan", metavar="FILE", help="Settings of `llmtool plan -o`; flags win."),
    ] = None,
    config: ConfigFile = None,
    print_config: PrintConfig = False,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Serve a model over OpenAI's HTTP API.

    Examples:

      llmtool serve                                     # the embedded SmolLM2-135M-Instruct

      llmtool serve ./my-model --port 9000 --api-key secret

      llmtool serve --plan plan.toml                    # what `llmtool plan` found

      llmtool serve ./my-model -tp 2 -pp 2              # four processes, a GPU each where there are GPUs

      llmtool serve model.gguf --max-model-len 4096 --max-num-seqs 32

      curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    flags: dict[str, Any] = dict(locals())
    if plan is not None:
        from llmtool.plan.planfile import serve_settings

        flags |= {k: v for k, v in serve_settings(plan).items() if flags.get(k) is None}
    flags["kv_cache_memory_bytes"] = optional_size(kv_cache_memory)
    flags["swap_space_bytes"] = optional_size(swap_space)
    flags["max_body_bytes"] = optional_size(max_body)
    flags["pipeline_layers"] = engine.layer_counts(flags["pipeline_layers"])
    if allowed_origins is not None:
        flags["allowed_origins"] = tuple(allowed_origins.split(","))
    engine_config = resolve(EngineConfig, flags, config, other_keys=field_names(ServerConfig))
    server_config = resolve(ServerConfig, flags, config, other_keys=field_names(EngineConfig))
    output = Output(as_json, quiet)
    if print_config:
        print_settings(output, engine_config, server_config)
        return
    if server_config.api_key == MASK:
        raise UsageError(
            "The settings come from --print-config, which does not show the API key.",
            "Give it again, as LLMTOOL_API_KEY or --api-key, or take api_key out of the file.",
        )
    if engine_config.node_rank:
        run_node(engine_config, output)
        return
    run(engine_config, server_config, output, log_level)


def run_node(engine_config: EngineConfig, output: Output) -> None:
    """Work for the server on node 0 until it ends."""
    from llmtool.runtime.parallel.node import work_for

    output.hint(
        f"Node {engine_config.node_rank} of {engine_config.nnodes} works for {engine_config.master_addr}:"
        f"{engine_config.master_port} (stop with Ctrl-C)"
    )
    work_for(engine_config)


def print_settings(output: Output, *configs: Any) -> None:
    """The key is not shown: what is printed ends up in logs and tickets."""
    settings = as_dict(*configs)
    if settings.get("api_key") is not None:
        settings["api_key"] = MASK
    output.document(settings)
    output.table("Settings", ("name", "value"), [(k, str(v)) for k, v in settings.items()])


def read_chat_template(path: str | None) -> str | None:
    """The Jinja source in the file `path`. Raises UsageError."""
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"Cannot read the chat template {path}: {reason}.") from None


def run(
    engine_config: EngineConfig, server_config: ServerConfig, output: Output, log_level: str | None
) -> None:
    # The engine's process starts first and loads while this one imports its HTTP stack.
    from llmtool.serve.logs import configure_logging
    from llmtool.serve.server import run_server

    configure_logging(log_level)
    chat_template = read_chat_template(server_config.chat_template)
    started: list[AsyncEngine | Fleet] = []

    async def start() -> tuple[AsyncEngine | Fleet, Tokenizer]:
        from llmtool.models.tokenizer import Tokenizer
        from llmtool.runtime.fleet import start_engine

        with output.progress() as progress:
            running = await start_engine(engine_config, progress=progress)
        started.append(running)
        return running, Tokenizer.from_dir(running.info.tokenizer_dir, chat_template)

    def listening(host: str, port: int) -> None:
        url = f"http://{host}:{port}"
        info, fleet = started[0].info, started[0].fleet
        pids = {} if fleet is None else {"replicas": [r.pid for r in fleet.replicas]}
        output.document({"url": url, "model": info.served_model_name, "pid": info.pid, **pids})
        output.line(f"Serving {info.served_model_name} at {url} (docs at {url}/docs; stop with Ctrl-C)")
        tokens = f"{info.num_pages * info.tokens_per_page} tokens"
        pages = f"{info.num_pages} large pages" if info.large_pages else tokens
        memory = f"KV memory {size(info.kv_bytes)} = {pages}"
        if info.kv_cache_dtype != info.dtype:
            memory += f" in {info.kv_cache_dtype}"
        if info.pooling is not None:
            memory = f"{info.pooling.task}: {info.pooling.size} numbers per text"
        replicas = "" if fleet is None else f"{len(fleet.replicas)} replicas, together: "
        output.hint(
            f"{replicas}{info.device}, {info.dtype}, weights {size(info.weight_bytes)}, {memory}, context "
            f"{info.max_model_len}, ready in {info.load_seconds:.1f} s"
        )

    run_server(start, server_config, on_listening=listening)
