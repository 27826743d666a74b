"""How much memory the KV pages get, and how long a sequence may then be."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool_kernels.attention_plan import MAX_BUCKET_TOKENS

from llmtool.config import EngineConfig
from llmtool.core.memory.geometry import UNIT
from llmtool.core.memory.tables import Pages, longest
from llmtool.errors import InfeasibleError, UsageError
from llmtool.modelspec import ModelSpec
from llmtool.runtime.device import DeviceMemory

MAX_ENTRY = 2**31  # a block-table entry is an int32, in units of UNIT bytes
CPU_SHARE = 4  # on a CPU, KV pages take at most one part in so many of the memory that is free


@dataclass(frozen=True, slots=True)
class KVBudget:
    num_pages: int
    host_pages: int
    max_model_len: int


def kv_budget(
    config: EngineConfig,
    sizes: Pages,
    model_len: int,
    memory: DeviceMemory,
    activation_bytes: int,
    on_cpu: bool,
    host_free: int,
) -> KVBudget:
    """Size the KV memory from what is free once the weights are loaded.

    sizes: of pages, or of large pages and how many a sequence needs. model_len: tokens the model was made for.
    host_free: bytes for swapped pages. On a GPU, pages take what gpu_memory_utilization leaves beside weights and
    activations; on a CPU, where others need memory too, enough for max_num_seqs sequences of full length, and at
    most a quarter of what is free. Without a max_model_len the model's is shortened to what fits; one that was
    asked for and does not fit is an InfeasibleError. Engines of a fleet share a CPU's memory equally.
    """
    if on_cpu:
        memory = DeviceMemory(memory.total, memory.free // config.engines)
        host_free //= config.engines
    length = config.max_model_len or model_len
    if length > model_len:
        raise UsageError(
            f"max_model_len is {length}, but the model was made for {model_len} tokens.",
            f"Set --max-model-len to {model_len} or less.",
        )
    room = _kv_bytes(config, sizes, length, memory, activation_bytes, on_cpu)
    num_pages = min(room // sizes.page_bytes, MAX_ENTRY // (sizes.page_bytes // UNIT))
    fits = longest(sizes, num_pages)
    least = sizes.least(config.max_num_seqs)
    if num_pages < least:
        enough = "not even one for each" if least == config.max_num_seqs else f"and {least} are the least"
        raise InfeasibleError(
            f"{_size(room)} for KV pages is {num_pages} pages of {_size(sizes.page_bytes)}, {enough} "
            f"of {config.max_num_seqs} sequences.",
            "Lower --max-num-seqs, or give more with --kv-cache-memory.",
        )
    if fits < length and config.max_model_len is not None:
        raise InfeasibleError(
            f"One sequence of {length} tokens needs {_size(sizes.pages(length) * sizes.page_bytes)} of KV pages, "
            f"and there are {_size(num_pages * sizes.page_bytes)}.",
            f"Set --max-model-len to {fits} or less, or give more with --kv-cache-memory.",
        )
    # On a CPU pages, swapped pages and activations share one memory.
    spare = host_free - (num_pages * sizes.page_bytes + activation_bytes if on_cpu else 0)
    if config.swap_space_bytes > max(0, spare):
        raise InfeasibleError(
            f"swap_space_bytes is {_size(config.swap_space_bytes)}, and {_size(max(0, spare))} of memory are left "
            f"for it.",
            "Lower --swap-space or --kv-cache-memory.",
        )
    return KVBudget(num_pages, config.swap_space_bytes // sizes.page_bytes, min(length, fits))


def activation_bytes(
    spec: ModelSpec, dtype_bytes: int, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """An estimate of what one step needs beside weights and KV, from above.

    Per token: the residual stream, one layer's widest tensors and their products; per sequence: logits in
    float32, the copies sampling makes of them and a float64 sum; and attention's gathered keys and values.
    """
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    per_token = 4 * spec.hidden_size + 2 * qkv + 3 * spec.intermediate_size
    gathered = 4 * max(MAX_BUCKET_TOKENS, max_num_batched_tokens) * spec.num_kv_heads * spec.head_dim
    per_sequence = spec.vocab_size * (4 * 4 + 8)
    return (max_num_batched_tokens * per_token + gathered) * dtype_bytes + max_num_seqs * per_sequence


def _kv_bytes(
    config: EngineConfig,
    sizes: Pages,
    length: int,
    memory: DeviceMemory,
    activation_bytes: int,
    on_cpu: bool,
) -> int:
    given = config.kv_cache_memory_bytes
    if given is not None:
        if given + activation_bytes > memory.free:
            raise InfeasibleError(
                f"kv_cache_memory_bytes is {_size(given)} and a step needs {_size(activation_bytes)}, but "
                f"{_size(memory.free)} of memory are free.",
                "Lower --kv-cache-memory.",
            )
        return given
    if on_cpu:
        return min(memory.free // CPU_SHARE, config.max_num_seqs * sizes.pages(length) * sizes.page_bytes)
    taken = memory.total - memory.free
    room = int(memory.total * config.gpu_memory_utilization) - taken - activation_bytes
    if room < sizes.page_bytes:
        raise InfeasibleError(
            f"Of {_size(memory.total)} of device memory, {_size(taken)} are taken and a step needs "
            f"{_size(activation_bytes)}: nothing is left for KV pages at a utilization of "
            f"{config.gpu_memory_utilization:g}.",
            "Raise --gpu-memory-utilization, or take a smaller model.",
        )
    return room


def _size(nbytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} bytes"
