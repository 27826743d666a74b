"""A plan as something to run: command lines of engines, and the bench line that verifies the prediction."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from llmtool.plan.runnable import why_not_runnable
from llmtool.sim.deployment import Deployment
from llmtool.sim.workload import Workload
from llmtool.workload.slo import SLO

_NO_CONTROLLER = "# {} drafts a fixed number of tokens; plan with --spec 3, or serve with llmtool."
_VLLM_DTYPES = {"fp8": "fp8", "fp8_block": "fp8"}


def vllm_lines(model: str, d: Deployment, per_node: int = 8) -> list[str]:
    """`vllm serve` for one engine of the plan; with several, one each, on devices of their own. A comment where
    vLLM cannot run it. per_node: devices of a node; what reaches further is started on each node."""
    plan = d.plan
    why = why_not_runnable("vllm", plan, d.ir)
    if why:
        return [f"# {why}"]
    parts = ["vllm", "serve", model]
    if plan.tp > 1:
        parts += ["--tensor-parallel-size", str(plan.tp)]
    if plan.pp > 1:
        parts += ["--pipeline-parallel-size", str(plan.pp)]
    if plan.attention_dp > 1:
        parts += ["--data-parallel-size", str(plan.attention_dp)]
    if plan.ep > 1:
        parts += ["--enable-expert-parallel"]
    parts += ["--max-model-len", str(d.max_len), "--max-num-seqs", str(d.max_seqs)]
    parts += ["--max-num-batched-tokens", str(d.budget), "--block-size", str(d.block_size)]
    parts += ["--gpu-memory-utilization", f"{d.engine.utilization:g}"]
    if d.dtype in _VLLM_DTYPES and d.ir.native != "fp8":
        parts += ["--quantization", _VLLM_DTYPES[d.dtype]]
    if d.kv_dtype == "fp8":
        parts += ["--kv-cache-dtype", "fp8"]
    if d.drafting is not None:
        if not d.drafting.spec.isdecimal():
            return [_NO_CONTROLLER.format("vLLM")]
        drafts = {"method": "ngram", "num_speculative_tokens": d.drafting.depth, "prompt_lookup_max": 4}
        parts += ["--speculative-config", json.dumps(drafts)]
    if not d.prefix_caching:
        parts += ["--no-enable-prefix-caching"]
    environment = []
    if len(set(plan.layers)) > 1:
        environment.append(f"VLLM_PP_LAYER_PARTITION={','.join(map(str, plan.layers))}")
    if plan.engine <= per_node:
        return _engines(parts, plan.dp, plan.engine, environment, 8000, per_node)
    nodes = -(-plan.engine // per_node)
    if plan.attention_dp % nodes:  # groups reach over nodes: Ray starts the ranks
        return _spanning([[*parts, "--distributed-executor-backend", "ray"]], plan.dp, nodes, environment)
    local = plan.attention_dp // nodes
    shared = ["--data-parallel-size-local", str(local), "--data-parallel-address", "NODE0"]
    shared += ["--data-parallel-rpc-port", "13345"]
    ranks = [[*parts, *shared]]
    ranks += [
        [*parts, *shared, "--headless", "--data-parallel-start-rank", str(i * local)] for i in range(1, nodes)
    ]
    return _spanning(ranks, plan.dp, nodes, environment)


def sglang_lines(model: str, d: Deployment, per_node: int = 8) -> list[str]:
    """`sglang.launch_server` for one engine of the plan. Its --tp-size counts the whole stage. As vllm_lines."""
    plan = d.plan
    why = why_not_runnable("sglang", plan, d.ir)
    if why:
        return [f"# {why}"]
    parts = ["python", "-m", "sglang.launch_server", "--model-path", model]
    if plan.stage > 1:
        parts += ["--tp-size", str(plan.stage)]
    if plan.pp > 1:
        parts += ["--pp-size", str(plan.pp)]
    if plan.attention_dp > 1:
        parts += ["--dp-size", str(plan.attention_dp), "--enable-dp-attention"]
    if plan.ep > 1:
        parts += ["--ep-size", str(plan.ep)]
    parts += [
        "--context-length",
        str(d.max_len),
        "--max-running-requests",
        str(d.max_seqs * plan.attention_dp),
    ]
    parts += ["--chunked-prefill-size", str(d.budget), "--mem-fraction-static", f"{d.engine.utilization:g}"]
    if d.dtype in _VLLM_DTYPES and d.ir.native != "fp8":
        parts += ["--quantization", "fp8"]
    if d.kv_dtype == "fp8":
        parts += ["--kv-cache-dtype", "fp8_e4m3"]
    if d.drafting is not None:
        if not d.drafting.spec.isdecimal():
            return [_NO_CONTROLLER.format("SGLang")]
        parts += ["--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", str(d.drafting.depth)]
    if not d.prefix_caching:
        parts += ["--disable-radix-cache"]
    if plan.engine <= per_node:
        return _engines(parts, plan.dp, plan.engine, [], 30000, per_node)
    nodes = -(-plan.engine // per_node)
    ranks = [
        [*parts, "--nnodes", str(nodes), "--node-rank", str(i), "--dist-init-addr", "NODE0:5000"]
        for i in range(nodes)
    ]
    return _spanning(ranks, plan.dp, nodes, [])


def _engines(
    parts: Sequence[str], dp: int, devices: int, environment: Sequence[str], port: int, per_node: int
) -> list[str]:
    """Engines that fit a node: as many to a node as do, device numbers counted in it."""
    line = shlex.join(parts)
    if dp == 1:
        return [" ".join([*environment, line])]
    out, together = [], per_node // devices
    for i in range(dp):
        node, place = divmod(i, together)
        ids = ",".join(str(place * devices + j) for j in range(devices))
        text = " ".join([f"CUDA_VISIBLE_DEVICES={ids}", *environment, line, f"--port {port + place}"])
        out.append(f"{text}  # node {node}" if dp > together else text)
    return out


def _spanning(ranks: Sequence[Sequence[str]], dp: int, nodes: int, environment: Sequence[str]) -> list[str]:
    """Engines that fill several nodes. ranks: what to run on each node of one, or on its first alone. NODE0 stands
    for the address of an engine's first node."""
    return [
        f"{' '.join([*environment, shlex.join(parts)])}  # node {engine * nodes + i}"
        for engine in range(dp)
        for i, parts in enumerate(ranks)
    ]


def llmtool_line(plan_file: str) -> str:
    return shlex.join(["llmtool", "serve", "--plan", plan_file])


def bench_line(
    workload: Workload, slos: Sequence[SLO], trace: tuple[str, str] | None, url: str = "http://127.0.0.1:8000"
) -> str:
    """The load of the simulation, for a real server. trace: (format, path) where it came from a file."""
    parts = ["llmtool", "bench", "--url", url, "--num-prompts", str(len(workload.rows)), "--ignore-eos"]
    if trace is not None:
        parts += ["--dataset-name", trace[0], "--dataset-path", trace[1]]
    else:
        parts += ["--dataset-name", "random", "--random-input-len", str(round(workload.mean_input))]
        parts += ["--random-output-len", str(round(workload.mean_output))]
        spread = [max(r.input_len for r in workload.rows) != min(r.input_len for r in workload.rows)]
        if any(spread):
            parts += ["--random-range-ratio", "0.9"]
    if workload.concurrency is not None:
        parts += ["--max-concurrency", str(workload.concurrency)]
    elif trace is None and workload.rate is not None:
        parts += ["--request-rate", f"{workload.rate:.4g}"]
    for slo in slos:
        parts += ["--goodput", str(slo)]
    return shlex.join([*parts, "-o", "measured.json"])
