"""The engine's flags, shared by `serve` and in-process `bench`. Names are vLLM's where it has one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmtool.errors import UsageError

ModelArg = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Hugging Face directory, hub id, GGUF file or alias. Default: the embedded smollm2-135m.",
        show_default=False,
    ),
]
_panel = "Engine"


def _option(name: str, text: str, *aliases: str) -> Any:
    return typer.Option(name, *aliases, help=text, rich_help_panel=_panel)


Dtype = Annotated[str | None, _option("--dtype", "auto, float32, bfloat16 or float16.")]
Quantization = Annotated[str | None, _option("--quantization", "int8 or int4: weights in so many bits.")]
KVCacheDtype = Annotated[
    str | None, _option("--kv-cache-dtype", "auto, or fp8 (fp8_e4m3, fp8_e5m2) on a GPU that has it.")
]
Device = Annotated[str | None, _option("--device", "auto, cpu or cuda.")]
LoadFormat = Annotated[str | None, _option("--load-format", "auto, or dummy for random weights.")]
Revision = Annotated[str | None, _option("--revision", "Branch, tag or commit of a hub model.")]
TokenizerDir = Annotated[str | None, _option("--tokenizer", "Directory or hub id, if not the model's own.")]
MaxModelLen = Annotated[int | None, _option("--max-model-len", "Prompt and output tokens of one sequence.")]
MaxNumSeqs = Annotated[int | None, _option("--max-num-seqs", "Sequences that run at once.")]
MaxNumBatchedTokens = Annotated[int | None, _option("--max-num-batched-tokens", "Token budget of a step.")]
MaxWaiting = Annotated[int | None, _option("--max-waiting", "Queue limit; beyond it requests get a 429.")]
BlockSize = Annotated[int | None, _option("--block-size", "Tokens per KV page.")]
PagePlan = Annotated[
    str | None,
    _option("--kv-page-plan", "near, lcm, max or uniform pages, for layers that cache different things."),
]
MemoryUtilization = Annotated[
    float | None, _option("--gpu-memory-utilization", "Part of the device memory to use, 0 to 1.")
]
KVCacheMemory = Annotated[
    str | None,
    _option(
        "--kv-cache-memory",
        "KV memory, for example 2GiB; overrides the utilization.",
        "--kv-cache-memory-bytes",
    ),
]
SwapSpace = Annotated[str | None, _option("--swap-space", "Host memory for swapped pages, for example 1GiB.")]
Preemption = Annotated[str | None, _option("--preemption", "recompute or swap, when pages run out.")]
SchedulingPolicy = Annotated[str | None, _option("--scheduling-policy", "fcfs or priority.")]
PrefixCaching = Annotated[
    bool | None,
    _option(
        "--enable-prefix-caching/--no-enable-prefix-caching", "Share KV pages of equal prefixes (default on)."
    ),
]
EnforceEager = Annotated[
    bool | None,
    _option("--enforce-eager/--no-enforce-eager", "Capture no steps ahead of time on a GPU (default off)."),
]
NumThreads = Annotated[int | None, _option("--num-threads", "CPU threads for the model.")]
Spec = Annotated[
    str | None,
    _option(
        "--spec",
        "Speculation: auto, off, smartspec, a number of draft tokens, or a TOML file of batch size = number.",
    ),
]
Proposer = Annotated[
    str | None, _option("--proposer", "Who drafts: suffix (default), draft:MODEL, pruned[:LAYERS] or union.")
]
SpecBranches = Annotated[
    int | None,
    _option(
        "--spec-branches",
        "Ways on that a draft from text shows (default 1: a chain; up to 8: a tree, grown by --spec auto).",
    ),
]
_parallel = "Parallelism"


def _parallel_option(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_parallel, show_default=False)


TensorParallel = Annotated[
    int | None, _parallel_option("Ranks that every layer is cut over.", "--tensor-parallel-size", "-tp")
]
PipelineParallel = Annotated[
    int | None, _parallel_option("Stages of layers.", "--pipeline-parallel-size", "-pp")
]
PipelineLayers = Annotated[
    str | None, _parallel_option("Layers of each stage, as 10,20 (as even as can be).", "--pipeline-layers")
]
ExpertParallel = Annotated[
    bool | None,
    _parallel_option(
        "Whole experts on ranks of their own.", "--enable-expert-parallel/--no-enable-expert-parallel"
    ),
]
Nodes = Annotated[int | None, _parallel_option("Machines of the engine.", "--nnodes")]
NodeRank = Annotated[
    int | None, _parallel_option("Which of them this is; 0 serves, the others work for it.", "--node-rank")
]
MasterAddr = Annotated[
    str | None, _parallel_option("Where they meet: an address of node 0.", "--master-addr")
]
MasterPort = Annotated[int | None, _parallel_option("And a free port there.", "--master-port")]
DistributedTimeout = Annotated[
    float | None,
    _parallel_option("Seconds that a rank waits for another (120).", "--distributed-timeout-seconds"),
]
StepLog = Annotated[str | None, _option("--step-log", "Record every scheduling decision in this JSONL file.")]
DataParallelSize = Annotated[
    int | None, _option("--data-parallel-size", "Engines with the whole model each, behind a router.", "-dp")
]
Disaggregate = Annotated[
    str | None,
    _option(
        "--disaggregate", "PREFILL:DECODE engines, as 1:1: prompts run on the former, the rest on the latter."
    ),
]
ReplicaTimeout = Annotated[
    float | None,
    _option("--replica-timeout", "Seconds of silence after which one of several engines is restarted (60)."),
]


def layer_counts(text: Any) -> tuple[int, ...] | None:
    """Of "10,20", or of a plan's list. Raises UsageError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in (text.split(",") if isinstance(text, str) else text))
    except ValueError:
        raise UsageError(f"{text!r} is no list of layers.", "Write, for example, 10,20.") from None
