"""`run_bench`: one bench invocation from a configuration to a result. No printing: progress goes to a
callback.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from llmtool.bench.backend import Backend
from llmtool.bench.client import ClientOptions, HttpBackend, served_models
from llmtool.bench.config import BenchConfig
from llmtool.bench.counters import growth
from llmtool.bench.environment import hardware, versions
from llmtool.bench.load import LoadOutcome, ProgressCallback, run_load
from llmtool.bench.prepare import build_offsets, build_requests, build_warmups, run_seed
from llmtool.bench.result import BenchResult, RunResult, make_run
from llmtool.bench.sweep import find_knee, sweep, too_short
from llmtool.errors import LLMToolError, UsageError
from llmtool.workload.metrics import summarize
from llmtool.workload.requests import BenchRequest, Tokenizer

T = TypeVar("T")
UNSHARED = ("random", "azure", "burstgpt", "lengths")  # made-up prompts without common prefixes
TEXTS = ("sharegpt", "custom")  # prompts as a file has them
HIT_SHARE = 0.05  # of their tokens found in a prefix cache: more is no chance


async def connect(config: BenchConfig, api_key: str | None = None) -> tuple[BenchConfig, HttpBackend]:
    """A backend for `config.url`, and the configuration with the model's name filled in from the server.

    LLMToolError when no server answers there, UsageError when it does not serve `config.model`.
    """
    if not config.url:
        raise UsageError("There is no server to connect to.", "Give --url.")
    url = config.url
    names = await served_models(url, api_key)
    if config.model is None:
        if not names:
            raise LLMToolError(f"{config.url} serves no model.", "Name one: llmtool bench MODEL --url ...")
        config = replace(config, model=names[0])
    elif names and config.model not in names:
        raise UsageError(f"{config.url} does not serve {config.model!r}.", f"It serves {', '.join(names)}.")
    options = ClientOptions(
        url=url,
        model=config.model or "",
        api_key=api_key,
        fields=config.body_fields(),
        timeout=config.timeout,
        keep_text=config.save_text,
        embeddings=config.endpoint == "embeddings",
    )
    return config, HttpBackend(options)


async def run_bench(
    config: BenchConfig,
    backend: Backend,
    tokenizer: Tokenizer | None = None,
    progress: ProgressCallback | None = None,
    gpu: str | None = None,
) -> BenchResult:
    """Warms up, then runs the load once, at every rate of a sweep, or in search of the knee.

    tokenizer: needed where prompts are made or measured. gpu: what to call the accelerator in the result.
    Failed requests are in the result; LLMToolError where the configuration is wrong or no warm-up request
    succeeds.
    """
    # Tokenizing a corpus takes a second or asks a server: not on the event loop.
    requests = await asyncio.to_thread(build_requests, config, tokenizer)
    warmups = await asyncio.to_thread(build_warmups, config, tokenizer)
    bench = _Bench(config, backend, requests, tokenizer, progress)
    await bench.warm_up(warmups)
    load, knee = config.load, None
    if load.search_knee:
        kind = "knee"
        runs, found = await find_knee(bench.measure, load)
        knee = found.as_dict()
        runs = [_cautioned(run, found.request_rate) for run in runs]
    elif load.request_rates:
        kind, runs = "sweep", await sweep(bench.measure, load.request_rates)
    else:
        kind, runs = "run", [await bench.measure(None)]
    return BenchResult(
        kind=kind,
        runs=tuple(runs),
        config=config.as_dict(),
        backend=backend.description,
        model=config.model or "",
        seed=config.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=hardware(gpu),
        versions=versions(),
        label=config.label,
        knee=knee,
    )


def _cautioned(run: RunResult, knee: float | None) -> RunResult:
    """The run at the knee, with a warning where it was too short for one."""
    caution = too_short(run.metrics, run.request_rate) if run.request_rate == knee else None
    return run if caution is None else replace(run, warnings=(*run.warnings, caution))


class _Bench:
    """What the runs of one invocation share."""

    def __init__(
        self,
        config: BenchConfig,
        backend: Backend,
        requests: Sequence[BenchRequest],
        tokenizer: Tokenizer | None,
        progress: ProgressCallback | None,
    ) -> None:
        self._config = config
        self._backend = backend
        self._requests = list(requests)
        self._tokenizer = tokenizer
        self._progress = progress
        self._rates: Counter[float] = Counter()  # runs so far
        self._first_hits: float | None = None  # cached share of the prompts in the first run

    async def warm_up(self, warmups: Sequence[BenchRequest]) -> None:
        """All at once. If every one fails, so would the run: better one clear error than a table of zeros."""
        if not warmups:
            return
        limit = self._config.load.max_concurrency
        outcome = await self._load(warmups, [0.0] * len(warmups), limit, None, "warm-up")
        if not any(r.success for r in outcome.records):
            error = outcome.records[0].error
            raise LLMToolError(
                f"The first request failed: {error}", "See the server's log, or check the flags."
            )

    async def measure(self, rate: float | None) -> RunResult:
        """One run; rate: of a sweep or search, None for the load as configured."""
        config, load = self._config, self._config.load
        requests = await self._requests_at(rate)
        offsets = build_offsets(load, requests, config.seed, rate)
        phase = "bench" if rate is None else f"{rate:.3g}/s" if math.isfinite(rate) else "all at once"
        before = await self._backend.counters()
        outcome = await self._load(requests, offsets, load.max_concurrency, load.duration, phase)
        server = growth(before, await self._backend.counters())
        if memory := await self._backend.memory():
            server["memory_bytes"] = memory
        if explained := await self._backend.speculation():
            server["speculation"] = explained
        metrics = await asyncio.to_thread(
            summarize, outcome.records, outcome.duration, config.slos, config.metric_percentiles, config.seed
        )
        offered = rate if rate is not None else load.request_rate
        run = make_run(offered, metrics, outcome.records, outcome.client, server, config.save_text)
        warnings = (*run.warnings, *self._cautions({**metrics, **server}))
        return replace(run, warnings=warnings, arrivals=self._arrivals() if rate is None else None)

    async def _requests_at(self, rate: float | None) -> list[BenchRequest]:
        """Other prompts for every run of a sweep or search, since the server may have those of the last one cached;
        the same ones for the same rate, so that two sweeps can be compared.
        """
        if rate is None or math.isinf(rate):
            return self._requests
        config = replace(self._config, seed=run_seed(self._config.seed, rate, self._rates[rate]))
        self._rates[rate] += 1
        return await asyncio.to_thread(build_requests, config, self._tokenizer)

    def _arrivals(self) -> str | None:
        load = self._config.load
        if load.ramp_up_start_rps is not None:
            return f"ramp {load.ramp_up_start_rps:g} to {load.ramp_up_end_rps:g}"
        timed = math.isinf(load.request_rate) and all(r.arrival is not None for r in self._requests)
        return "trace" if timed else None

    def _cautions(self, figures: Mapping[str, Any]) -> Iterator[str]:
        """What the dataset was meant to be and was not."""
        data = self._config.dataset
        if len(self._requests) < data.num_prompts:
            yield f"The dataset gave {len(self._requests)} requests, not the {data.num_prompts} asked for."
        unshared = data.dataset_name in UNSHARED and not data.random_prefix_len
        hits = figures.get("prefix_cache_hit_rate")
        if hits is None and figures.get("cached_tokens") is not None and figures["total_input_tokens"]:
            hits = figures["cached_tokens"] / figures["total_input_tokens"]
        if hits is None:
            return
        share = f"{100 * hits:.0f} % of the prompt tokens came from the server's prefix cache"
        if unshared and hits > HIT_SHARE:
            yield (
                f"{share}, though these prompts share nothing: it has seen them before. Give another --seed, or "
                "restart the server."
            )
        if self._first_hits is None:
            self._first_hits = hits
        elif data.dataset_name in TEXTS and hits > self._first_hits + HIT_SHARE:
            yield (
                f"{share}, {100 * self._first_hits:.0f} % in the first run: {data.dataset_path} has too few "
                "prompts for runs that share none. Give a longer file, or fewer --num-prompts."
            )

    async def _load(
        self,
        requests: Sequence[BenchRequest],
        offsets: Any,
        limit: int | None,
        duration: float | None,
        phase: str,
    ) -> LoadOutcome:
        try:
            return await run_load(self._backend, requests, offsets, limit, duration, self._progress, phase)
        except BaseExceptionGroup as group:
            # A request's task can only fail on what is wrong for all: show that, not the group.
            error = group.exceptions[0]
            if isinstance(error, LLMToolError):
                raise error from None
            raise


def run_blocking(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on uvloop where it is installed: less CPU time per chunk and more punctual timers."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
