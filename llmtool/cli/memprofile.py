"""`llmtool memprofile`: where every byte of a card goes, and how many requests fit, without the card."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmtool.cli.command import JsonFlag, QuietFlag, command
from llmtool.cli.output import Output

_hardware, _load, _engine, _out = "Hardware", "Workload", "Engine", "Output"


def _option(name: str, text: str, panel: str, *aliases: str, metavar: str | None = None) -> Any:
    return typer.Option(name, *aliases, help=text, rich_help_panel=panel, metavar=metavar)


@command
def memprofile(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Catalogue name, config.json or directory.", show_default=False
        ),
    ] = None,
    device: Annotated[
        str | None, _option("--device", "Such as h200; `plan --list` shows all.", _hardware)
    ] = None,
    devices_file: Annotated[
        str | None, _option("--devices", "TOML file with further devices.", _hardware, metavar="FILE")
    ] = None,
    memory: Annotated[
        str | None, _option("--memory", "Of one card, as 80GiB.", _hardware, metavar="SIZE")
    ] = None,
    tensor_parallel_size: Annotated[
        int, _option("--tensor-parallel-size", "Cards that share the model.", _hardware, "-tp")
    ] = 1,
    workload: Annotated[
        str | None, _option("--workload", "chat, docqa, agent or summarize. Default: chat.", _load)
    ] = None,
    trace: Annotated[
        str | None,
        _option("--trace", "Recorded requests: Azure, BurstGPT, Mooncake, Vidur.", _load, metavar="FILE"),
    ] = None,
    num_prompts: Annotated[int, _option("--num-prompts", "Requests to replay.", _load)] = 512,
    image_tokens: Annotated[
        int, _option("--image-tokens", "Of each request, for layers that attend to images.", _load)
    ] = 0,
    seed: Annotated[int, _option("--seed", "Of the lengths.", _load)] = 0,
    compare: Annotated[
        str, _option("--compare", "Allocators, comma-separated.", _engine, metavar="NAMES")
    ] = "contiguous,paged,max,static,lcm,near",
    max_model_len: Annotated[
        int | None,
        _option("--max-model-len", "Longest sequence. Default: the model's, at most 131072.", _engine),
    ] = None,
    dtype: Annotated[
        str | None, _option("--dtype", "Weights: bf16, fp8, int4, ... Default: published.", _engine)
    ] = None,
    kv_dtype: Annotated[str, _option("--kv-dtype", "KV: bf16 or fp8.", _engine)] = "bf16",
    gpu_memory_utilization: Annotated[
        float, _option("--gpu-memory-utilization", "Part of the card to use.", _engine)
    ] = 0.9,
    kv_cache_memory: Annotated[
        str | None,
        _option("--kv-cache-memory", "KV memory, where it is not what is left.", _engine, metavar="SIZE"),
    ] = None,
    max_num_batched_tokens: Annotated[
        int, _option("--max-num-batched-tokens", "Tokens of a step.", _engine)
    ] = 8192,
    max_num_seqs: Annotated[int, _option("--max-num-seqs", "Sequences that run at once.", _engine)] = 256,
    block_size: Annotated[int, _option("--block-size", "Tokens per page.", _engine)] = 16,
    checkpoint_every: Annotated[
        int, _option("--checkpoint-every", "Tokens between states kept for a trace's prefixes.", _engine)
    ] = 512,
    enforce_eager: Annotated[
        bool,
        typer.Option("--enforce-eager", help="No steps captured ahead of time.", rich_help_panel=_engine),
    ] = False,
    explain: Annotated[
        int | None, _option("--explain", "The bill of one request of so many tokens.", _out, metavar="LEN")
    ] = None,
    html: Annotated[str | None, _option("--html", "Report with pictures.", _out, metavar="FILE")] = None,
    live: Annotated[
        str | None, _option("--live", "Read the ledger of a running server instead.", _out, metavar="URL")
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show where every byte of a card goes and how many requests fit, without a GPU and without weights.

    Requests are replayed against each allocator: all wait from the start, and the memory decides who runs together.
    Exit code 4 when the model, or a request, does not fit.

    Examples:

      llmtool memprofile gemma-3-27b --device h200 --workload docqa

      llmtool memprofile ./my-model --memory 80GiB --trace mooncake.jsonl --html memory.html

      llmtool memprofile falcon-h1-1.5b --memory 24GiB --explain 4000

      llmtool memprofile --live http://127.0.0.1:8000
    """
    arguments = dict(locals())
    from llmtool.cli import memprofile_run

    output = Output(as_json, quiet)
    if live is not None:
        memprofile_run.show_live(output, live)
    else:
        memprofile_run.run(output, arguments)
