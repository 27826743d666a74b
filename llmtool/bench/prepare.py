"""From a configuration to the requests to send: reads or makes the dataset, cuts and shapes it for the
endpoint.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from llmtool.bench.config import BenchConfig, LoadConfig
from llmtool.errors import UsageError
from llmtool.workload import arrivals
from llmtool.workload.datasets import (
    copy_requests,
    custom_requests,
    prefix_requests,
    random_requests,
    sharegpt_requests,
)
from llmtool.workload.requests import BenchRequest, Tokenizer, TokenSource, need
from llmtool.workload.traces import TRACE_FORMATS, read_trace, trace_requests


def build_requests(config: BenchConfig, tokenizer: Tokenizer | None) -> list[BenchRequest]:
    """The run's requests, the same for the same configuration and seed. UsageError where a file or flag is
    bad.
    """
    requests = _dataset(config, tokenizer, config.dataset.num_prompts, config.seed)
    limit = config.dataset.max_model_len
    if limit is not None:
        requests = [r for r in requests if (r.prompt_len or 0) + (r.max_tokens or 0) <= limit]
        if not requests:
            raise UsageError(
                f"No request of the dataset fits {limit} tokens.", "Give a larger max_model_len."
            )
    return [_shaped(config, request, tokenizer) for request in requests]


def run_seed(seed: int, rate: float, number: int) -> int:
    """The seed of the prompts of a sweep's run at `rate`; number: of runs at that rate before."""
    bits = int(np.float64(rate).view(np.uint64))
    return int(np.random.SeedSequence([seed, bits, number]).generate_state(1)[0])


def build_warmups(config: BenchConfig, tokenizer: Tokenizer | None) -> list[BenchRequest]:
    """Requests like the run's but of another seed, so that made prompts do not warm the run's prefix
    cache.
    """
    count = config.load.num_warmups
    if not count:
        return []
    made = _dataset(config, tokenizer, count, config.seed + 1_000_003)
    limit = config.dataset.max_model_len or math.inf
    fit = [r for r in made if (r.prompt_len or 0) + (r.max_tokens or 0) <= limit]
    return [_shaped(config, replace(r, arrival=None), tokenizer) for r in fit]


def _dataset(config: BenchConfig, tokenizer: Tokenizer | None, n: int, seed: int) -> list[BenchRequest]:
    d = config.dataset
    rng = np.random.default_rng(seed)
    # Not every server has /tokenize: text is measured only where its length decides something.
    if d.dataset_name == "sharegpt":
        measure = tokenizer if d.output_len is None or d.max_model_len is not None else None
        return sharegpt_requests(d.dataset_path or "", n, rng, measure, d.output_len)
    if d.dataset_name == "custom":
        measure = tokenizer if d.max_model_len is not None else None
        return custom_requests(d.dataset_path or "", n, rng, measure, d.output_len)
    source = TokenSource(need(tokenizer, f"to make the prompts of the {d.dataset_name} dataset"))
    if d.dataset_name in TRACE_FORMATS:
        rows = read_trace(d.dataset_name, d.dataset_path or "", n)
        return trace_requests(rows, source, seed, d.trace_block_size)
    if d.dataset_name == "prefix_repetition":
        return prefix_requests(
            n,
            source,
            rng,
            d.prefix_repetition_prefix_len,
            d.prefix_repetition_suffix_len,
            d.prefix_repetition_num_prefixes,
            d.prefix_repetition_output_len,
        )
    if d.dataset_name == "copy":
        return copy_requests(n, source, rng, d.copy_passage_len, d.copy_output_len)
    return random_requests(
        n, source, rng, d.random_input_len, d.random_output_len, d.random_range_ratio, d.random_prefix_len
    )


def _shaped(config: BenchConfig, request: BenchRequest, tokenizer: Tokenizer | None) -> BenchRequest:
    if config.endpoint == "chat":
        return request.as_chat(tokenizer)
    if config.endpoint in ("completions", "embeddings") and request.messages is not None:
        raise UsageError(
            f"The {config.endpoint} endpoint takes no chat messages.",
            "Give --endpoint auto, or a dataset with prompts.",
        )
    return replace(request, max_tokens=None) if config.endpoint == "embeddings" else request


def build_offsets(
    load: LoadConfig, requests: list[BenchRequest], seed: int, rate: float | None = None
) -> arrivals.Offsets:
    """When each request is sent, in seconds; `rate` overrides the configured one (sweep, knee search)."""
    n = len(requests)
    # A stream of its own, so that another dataset or length leaves the arrivals as they were.
    rng = np.random.default_rng([seed, 1])
    if rate is not None:
        return arrivals.gamma(n, rate, load.burstiness, rng)
    if load.ramp_up_start_rps is not None and load.ramp_up_end_rps is not None:
        return arrivals.ramp(n, load.ramp_up_start_rps, load.ramp_up_end_rps, load.burstiness, rng)
    if math.isinf(load.request_rate) and all(r.arrival is not None for r in requests):
        return arrivals.from_trace([r.arrival for r in requests], load.trace_speedup)
    return arrivals.gamma(n, load.request_rate, load.burstiness, rng)
