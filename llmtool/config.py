"""Settings of engine, cache and scheduler: TOML file < LLMTOOL_* environment < flags.

Flag names are vLLM's where it has one. An unknown key is an error. `resolve` merges the three sources;
`as_dict` is what `--print-config` shows.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from llmtool.errors import UsageError

T = TypeVar("T")
ENV_PREFIX = "LLMTOOL_"
# Tokens of a step that a GPU captures ahead of time: larger ones keep the device busy by themselves.
MAX_CAPTURED_TOKENS = 256
# Variables with the prefix that are not settings.
ENV_RESERVED = {
    "LLMTOOL_DEBUG",
    "LLMTOOL_DATA",
    "LLMTOOL_CACHE",
    "LLMTOOL_PEERS",
    "LLMTOOL_API_KEY",
    "LLMTOOL_LOG_LEVEL",
    "LLMTOOL_CPU_KERNELS",
}


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """max_num_batched_tokens: token budget of a step. max_waiting: queue limit, beyond it requests are refused.
    max_model_len: prompt + output tokens of one sequence. policy: fcfs | priority. preemption: recompute | swap.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_model_len: int = 2048
    max_waiting: int = 1024
    policy: str = "fcfs"
    preemption: str = "recompute"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}), or some sequences would never get their token."
            )
        if self.max_waiting < 0:
            raise UsageError(f"max_waiting must be at least 0, not {self.max_waiting}.")
        if self.policy not in ("fcfs", "priority"):
            raise UsageError(f"policy must be fcfs or priority, not {self.policy!r}.")
        if self.preemption not in ("recompute", "swap"):
            raise UsageError(f"preemption must be recompute or swap, not {self.preemption!r}.")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything `serve` and in-process `bench` need to start an engine.

    model: HF directory, hub id, GGUF file or alias. dtype: auto | float32 | bfloat16 | float16. quantization:
    int8 | int4 rounds the weights, and only them, to so many bits as they are loaded. kv_cache_dtype: auto keeps
    keys and values in the model's dtype; fp8 (which is fp8_e4m3) or fp8_e5m2 in eight bits, on a GPU that has them.
    max_model_len: None takes the model's own, shortened to what the KV memory holds. block_size: tokens per page.
    kv_page_plan: near | lcm | max | uniform, how pages serve layers that cache different things.
    gpu_memory_utilization: part of the device's memory the engine may take (weights, activations, KV).
    kv_cache_memory_bytes: exact KV memory, instead. swap_space_bytes: host memory for swapped pages.
    enforce_eager: capture no steps ahead of time on a GPU.
    step_log: JSONL file to record every decision in, or None. spec: auto | off | smartspec | draft tokens a step |
    a TOML file of batch size = draft tokens (llmtool/core/speculation/build.py). proposer: who drafts them.
    spec_branches: ways on that a draft from text shows at most; with more than 1 it is a tree.
    data_parallel_size: engines with the whole model each, behind a router; limits and memory given are each one's.
    disaggregate: PREFILL:DECODE, numbers of engines for prompts and for the tokens after the first; "" for engines
    that do both. replica_timeout: seconds without a sign of life after which one of several engines is killed and
    started again.
    tensor_parallel_size, pipeline_parallel_size: ranks that a layer is cut over, and stages that layers are dealt
    to, pipeline_layers each. enable_expert_parallel: experts whole on ranks of their own. nnodes, node_rank:
    machines of the engine, and which of them this is; they meet at master_addr:master_port, 0 for a free one on
    one machine. distributed_timeout_seconds: how long a rank waits for another before it gives up.
    """

    model: str = "smollm2-135m"
    served_model_name: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    load_format: str = "auto"  # auto | dummy (random weights, for benchmarks)
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_waiting: int = 1024
    block_size: int = 16
    kv_page_plan: str = "near"
    scheduling_policy: str = "fcfs"
    preemption: str = "recompute"
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    swap_space_bytes: int = 0
    num_threads: int | None = None
    seed: int = 0
    step_log: str | None = None
    spec: str = "off"
    proposer: str = "suffix"
    spec_branches: int = 1
    data_parallel_size: int = 1
    disaggregate: str = ""
    replica_timeout: float = 60.0
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipeline_layers: tuple[int, ...] = ()
    enable_expert_parallel: bool = False
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    distributed_timeout_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError(f"dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}.")
        if self.quantization not in (None, "int8", "int4"):
            raise UsageError(f"quantization must be int8 or int4, not {self.quantization!r}.")
        if self.kv_cache_dtype not in ("auto", "fp8", "fp8_e4m3", "fp8_e5m2"):
            raise UsageError(
                f"kv_cache_dtype must be auto, fp8, fp8_e4m3 or fp8_e5m2, not {self.kv_cache_dtype!r}."
            )
        if self.load_format not in ("auto", "dummy"):
            raise UsageError(f"load_format must be auto or dummy, not {self.load_format!r}.")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise UsageError(f"gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}.")
        if self.kv_page_plan not in ("near", "lcm", "max", "uniform"):
            raise UsageError(f"kv_page_plan must be near, lcm, max or uniform, not {self.kv_page_plan!r}.")
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise UsageError(f"block_size must be a power of two, not {self.block_size}.")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise UsageError(f"max_model_len must be at least 1, not {self.max_model_len}.")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "nnodes"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.node_rank < self.nnodes:
            raise UsageError(
                f"node_rank is {self.node_rank}, and {self.nnodes} nodes have ranks 0 to {self.nnodes - 1}.",
                "Give --nnodes the number of machines, and each of them a --node-rank of its own.",
            )
        if self.nnodes > 1 and not self.master_port:
            raise UsageError(
                "Several nodes need a port to meet at.",
                "Give every node the same --master-addr and --master-port, an address and free port of node 0.",
            )
        if not 0 <= self.master_port < 65536:
            raise UsageError(f"master_port must be between 0 and 65535, not {self.master_port}.")
        if self.distributed_timeout_seconds <= 0:
            raise UsageError(
                f"distributed_timeout_seconds must be above 0, not {self.distributed_timeout_seconds:g}."
            )
        if self.swap_space_bytes < 0:
            raise UsageError(f"swap_space_bytes must be at least 0, not {self.swap_space_bytes}.")
        if self.data_parallel_size < 1:
            raise UsageError(f"data_parallel_size must be at least 1, not {self.data_parallel_size}.")
        if self.disaggregate and self.data_parallel_size > 1:
            raise UsageError(
                f"disaggregate {self.disaggregate} says how many engines there are, and data_parallel_size "
                f"{self.data_parallel_size}, too.",
                "Give one of them.",
            )
        assert self.engines
        if self.disaggregate and self.ranks > 1:
            raise UsageError(
                f"disaggregate {self.disaggregate} moves KV between engines of one process, and these have "
                f"{self.ranks}.",
                "Leave out --tensor-parallel-size and --pipeline-parallel-size, or --disaggregate.",
            )
        if self.spec_branches > 1 and self.ranks > 1:
            raise UsageError(
                f"spec_branches {self.spec_branches} moves KV after a step, which an engine of {self.ranks} "
                "processes does not.",
                "Leave out --spec-branches.",
            )
        if self.engines > 1 and self.master_port:
            raise UsageError(
                f"{self.engines} engines cannot all meet at port {self.master_port}, and none of them spans nodes.",
                "Leave out --nnodes and --master-port.",
            )
        if self.replica_timeout <= 0:
            raise UsageError(f"replica_timeout must be more than 0 seconds, not {self.replica_timeout:g}.")
        # Bad scheduler settings should fail here, before a model is loaded.
        self.scheduler(self.max_model_len or 1)

    @property
    def split(self) -> tuple[int, int] | None:
        """Engines for prompts, and for the rest; None where engines do both. Raises UsageError."""
        if not self.disaggregate:
            return None
        prefill, colon, decode = self.disaggregate.partition(":")
        if not (colon and prefill.isdecimal() and decode.isdecimal() and int(prefill) and int(decode)):
            raise UsageError(
                f"disaggregate must be two numbers of engines as 1:2, not {self.disaggregate!r}."
            )
        return int(prefill), int(decode)

    @property
    def engines(self) -> int:
        """Engines with the whole model each."""
        return sum(self.split) if self.split else self.data_parallel_size

    @property
    def ranks(self) -> int:
        """Processes that one engine takes."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def scheduler(self, max_model_len: int) -> SchedulerConfig:
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=512
            if self.max_num_batched_tokens is None
            else self.max_num_batched_tokens,
            max_model_len=max_model_len,
            max_waiting=self.max_waiting,
            policy=self.scheduling_policy,
            preemption=self.preemption,
        )


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """HTTP side of `serve`. max_body_bytes: larger requests get a 413. drain_seconds: grace after SIGTERM.

    metrics_compat: vllm names the shared metrics as vLLM does, none as llmtool's. allow_lark: take lark grammars
    from clients, which can be so ambiguous that one mask takes seconds.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = field(default_factory=tuple)
    max_body_bytes: int = 32 * 2**20
    drain_seconds: float = 30.0
    metrics_compat: str = "vllm"  # vllm: also under vLLM's names | none
    chat_template: str | None = None
    allow_lark: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UsageError(f"port must be between 0 and 65535, not {self.port}.")
        if self.metrics_compat not in ("vllm", "none"):
            raise UsageError(f"metrics_compat must be vllm or none, not {self.metrics_compat!r}.")


def resolve(
    cls: type[T],
    flags: Mapping[str, Any],
    config_file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    other_keys: frozenset[str] = frozenset(),
) -> T:
    """An instance of the settings dataclass `cls` from file < environment < flags (a flag of None is not given).

    other_keys: keys of the file and environment that belong to another dataclass. Raises UsageError on an
    unknown key, an unreadable file or a value of the wrong type.
    """
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for source, given in (
        ("the configuration file", read_toml(config_file)),
        ("the environment", from_env(environ)),
    ):
        for key, value in given.items():
            if key in names:
                values[key] = coerce(key, value, hints[key])
            elif key not in other_keys:
                raise UsageError(
                    f"Unknown setting {key!r} in {source}.",
                    f"Known settings: {', '.join(sorted(names | other_keys))}.",
                )
    values.update({k: v for k, v in flags.items() if v is not None and k in names})
    return cls(**values)


def read_toml(path: str | Path | None) -> dict[str, Any]:
    """The settings in a TOML file, or a JSON one as `--print-config --json` prints it."""
    if path is None:
        return {}
    try:
        with Path(path).open("rb") as f:
            data = json.load(f) if Path(path).suffix == ".json" else tomllib.load(f)
    except FileNotFoundError:
        raise UsageError(f"The configuration file {path} does not exist.") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"The configuration file {path} is not valid TOML or JSON: {e}.") from None
    if not isinstance(data, dict):
        raise UsageError(f"The configuration file {path} is no table of settings.")
    return {k.replace("-", "_"): v for k, v in data.items()}


def from_env(environ: Mapping[str, str] | None) -> dict[str, str]:
    environ = os.environ if environ is None else environ
    return {
        k[len(ENV_PREFIX) :].lower(): v
        for k, v in environ.items()
        if k.startswith(ENV_PREFIX) and k not in ENV_RESERVED
    }


def coerce(key: str, value: Any, hint: Any) -> Any:
    """`value` (from TOML or an environment string) as the field's type; UsageError when it does not fit."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None or (value == "" and type(None) in options):
        return None
    for option in options:
        try:
            if option is bool:
                if isinstance(value, bool):
                    return value
                return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                    value.lower()
                ]
            if option in (int, float) and not isinstance(value, bool):
                return option(value)
            if option is str and isinstance(value, str):
                return value
            if get_origin(option) is tuple:
                items = value.split(",") if isinstance(value, str) else value
                return tuple(coerce(key, item, get_args(option)[0]) for item in items)
            if get_origin(option) is Mapping:
                return dict(json.loads(value) if isinstance(value, str) else value)
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
    raise UsageError(f"Setting {key!r} cannot be {value!r}.")


def field_names(cls: type[Any]) -> frozenset[str]:
    """The settings that a dataclass knows."""
    return frozenset(f.name for f in fields(cls))


def as_dict(*configs: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for config in configs:
        merged |= asdict(config)
    return merged
