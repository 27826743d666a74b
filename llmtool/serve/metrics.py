"""Prometheus metrics under the names dashboards already know (vLLM's), plus ours. One registry per server.

Engine gauges and totals are read from the engine's latest snapshot when scraped, so they cost nothing in between;
latencies are observed per request. Histogram boundaries are vLLM's, so that queries and panels fit as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmtool.core.request import RequestTimes, SamplingParams
from llmtool.core.stats import FleetView, SpecCounters
from llmtool.runtime.parts import memory_bytes
from llmtool.serve.ports import Engine

# fmt: off
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
                40.0, 80.0, 160.0, 640.0, 2560.0)
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
                 40.0, 80.0)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
                   480.0, 960.0, 1920.0, 7680.0)
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
N_BUCKETS = (1, 2, 5, 10, 20)
# fmt: on


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to and including the last one <= limit."""
    buckets: list[int] = []
    power = 1
    while power <= limit:
        buckets += [m * power for m in (1, 2, 5) if m * power <= limit]
        power *= 10
    return tuple(buckets)


class ServerMetrics:
    """compat: vllm | none, the prefix of the shared names is "vllm:" or "llmtool:"."""

    def __init__(self, engine: Engine, compat: str = "vllm") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        model = engine.info.served_model_name
        prefix = "vllm:" if compat == "vllm" else "llmtool:"
        lengths = one_two_five(engine.info.max_model_len)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(prefix + name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return family.labels(model)

        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.itl = histogram(
            "inter_token_latency_seconds", "Time between outputs of an answer.", TOKEN_BUCKETS
        )
        self.tpot = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per output token after the first.",
            TOKEN_BUCKETS,
        )
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", REQUEST_BUCKETS)
        self.queue = histogram("request_queue_time_seconds", "Arrival to first step.", REQUEST_BUCKETS)
        self.prompt = histogram("request_prompt_tokens", "Prompt tokens per request.", lengths)
        self.generation = histogram("request_generation_tokens", "Output tokens per answer.", lengths)
        engine.on_step = histogram(
            "iteration_tokens_total", "Batched tokens per engine step.", STEP_BUCKETS
        ).observe
        self.n = histogram("request_params_n", "The n of requests.", N_BUCKETS)
        self._success = Counter(
            prefix + "request_success",
            "Finished answers.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._model = model
        for reason in ("stop", "length", "abort", "error"):
            self._success.labels(model, reason)  # dashboards want the series to exist at zero
        self.registry.register(EngineCollector(engine, prefix))

    def observe(self, num_prompt_tokens: int, params: SamplingParams, arrival: float) -> RequestObserver:
        """arrival: of the HTTP request, by time.monotonic(), before its text was tokenized."""
        return RequestObserver(self, num_prompt_tokens, params, arrival)

    def observe_pooling(self, inputs: Sequence[Sequence[int]], arrival: float) -> PoolingObserver:
        """arrival: as for `observe`."""
        return PoolingObserver(self, inputs, arrival)

    def finished(self, reason: str) -> None:
        self._success.labels(self._model, reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class RequestObserver:
    """One engine request's latencies, from the arrival of its HTTP request on.

    The time per token is the engine's where it reports it, else measured here.
    """

    def __init__(
        self, metrics: ServerMetrics, num_prompt_tokens: int, params: SamplingParams, arrival: float
    ) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._first: dict[int, float] = {}  # by answer
        self._last: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._open = params.n
        metrics.prompt.observe(num_prompt_tokens)
        metrics.n.observe(params.n)

    def tokens(self, index: int, count: int) -> None:
        if count == 0:
            return
        now = time.monotonic()
        if index in self._last:
            self._metrics.itl.observe(now - self._last[index])
        else:
            if not self._first:
                self._metrics.ttft.observe(now - self._arrival)
            self._first[index] = now
        self._last[index] = now
        self._tokens[index] = self._tokens.get(index, 0) + count

    def finished(self, index: int, reason: str, times: RequestTimes | None) -> None:
        metrics, count = self._metrics, self._tokens.get(index, 0)
        self._open -= 1
        metrics.finished(reason)
        metrics.generation.observe(count)
        now = time.monotonic()
        metrics.e2e.observe(now - self._arrival)
        if times is not None and times.first_token >= 0:
            decoding = times.finished - times.first_token
        else:  # a stop string: the engine did not end this answer by itself
            decoding = now - self._first.get(index, self._arrival)
        if count > 1:
            metrics.tpot.observe(decoding / (count - 1))
        if index == 0 and times is not None and times.first_scheduled >= 0:
            metrics.queue.observe(times.first_scheduled - times.arrival)

    def ended(self, reason: str) -> None:
        """What is unfinished ends here: abort | error."""
        for _ in range(self._open):
            self._metrics.finished(reason)
        self._open = 0


class PoolingObserver:
    """One request for vectors: each of its inputs counts as one answer, its latency is that of the last."""

    def __init__(self, metrics: ServerMetrics, inputs: Sequence[Sequence[int]], arrival: float) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._open = len(inputs)
        for token_ids in inputs:
            metrics.prompt.observe(len(token_ids))

    def finished(self, times: RequestTimes | None) -> None:
        """One more input has its vector."""
        self._metrics.finished("stop")
        if times is not None:
            self._metrics.queue.observe(times.first_scheduled - times.arrival)
        self._open -= 1
        if self._open == 0:
            self._metrics.e2e.observe(time.monotonic() - self._arrival)

    def ended(self, reason: str) -> None:
        """What is unfinished ends here: abort | error."""
        for _ in range(self._open):
            self._metrics.finished(reason)
        self._open = 0


class EngineCollector(Collector):
    """The engine's snapshot as metric families, made when asked."""

    def __init__(self, engine: Engine, prefix: str) -> None:
        self._engine = engine
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        stats, prefix = self._engine.stats, self._prefix
        model = [self._engine.info.served_model_name]
        for name, text, value in (
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences waiting for admission.", stats.num_waiting),
            ("kv_cache_usage_perc", "Part of the KV pages in use, 0 to 1.", stats.kv_usage),
        ):
            gauge = GaugeMetricFamily(prefix + name, text, labels=["model_name"])
            gauge.add_metric(model, value)
            yield gauge
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits),
            ("num_preemptions", "Sequences that lost their pages and had to wait.", stats.preemptions),
            ("prompt_tokens", "Prompt tokens computed or found.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
        ):
            yield _counter(prefix + name, text, model, value)
        if stats.spec is not None:
            yield from self._speculation(stats.spec, model)
        yield from self._ours(model)
        if (fleet := self._engine.fleet) is not None:
            yield from self._replicas(fleet, model)

    def _speculation(self, spec: SpecCounters, model: list[str]) -> Iterator[Metric]:
        """vLLM's counters, and what the controller has learned."""
        prefix = self._prefix + "spec_decode_"
        for name, text, value in (
            ("num_drafts", "Drafts verified.", spec.drafts),
            ("num_draft_tokens", "Draft tokens verified.", spec.draft_tokens),
            ("num_accepted_tokens", "Draft tokens that the model would have said.", spec.accepted_tokens),
        ):
            yield _counter(prefix + name, text, model, value)
        at = CounterMetricFamily(
            prefix + "num_accepted_tokens_per_pos",
            "Accepted draft tokens by position in the draft.",
            labels=["model_name", "position"],
        )
        for position, count in enumerate(spec.accepted_at):
            at.add_metric([*model, str(position)], count)
        yield at
        trips = CounterMetricFamily(
            "llmtool:spec_watchdog_trips",
            "Times that speculation was switched off for losing.",
            labels=["model_name"],
        )
        trips.add_metric(model, spec.watchdog_trips)
        yield trips
        explain = spec.explain or {}
        for name, text, key in (
            ("spec_draft_tokens_planned", "Draft tokens of the last step.", "draft_tokens"),
            ("spec_token_goodput", "Decode tokens per decode second that drafts must beat.", "goodput"),
        ):
            gauge = GaugeMetricFamily(f"llmtool:{name}", text, labels=["model_name"])
            gauge.add_metric(model, float(explain.get(key, 0.0)))
            yield gauge
        cost = GaugeMetricFamily(
            "llmtool:spec_cost_seconds", "Learned step cost by part.", labels=["model_name", "part"]
        )
        for part, seconds in explain.get("cost", {}).items():
            cost.add_metric([*model, part], seconds)
        yield cost

    def _ours(self, model: list[str]) -> Iterator[Metric]:
        stats = self._engine.stats
        pages = GaugeMetricFamily("llmtool:kv_pages", "KV pages by state.", labels=["model_name", "state"])
        free = stats.pages_total - stats.pages_used - stats.pages_cached
        for state, count in (("used", stats.pages_used), ("cached", stats.pages_cached), ("free", free)):
            pages.add_metric([*model, state], count)
        yield pages
        memory = GaugeMetricFamily("llmtool:memory_bytes", "Memory by use.", labels=["model_name", "kind"])
        for kind, nbytes in memory_bytes(self._engine.info, self._engine.stats).items():
            memory.add_metric([*model, kind], nbytes)
        yield memory
        alive = GaugeMetricFamily("llmtool:engine_alive", "1 while the engine runs.", labels=["model_name"])
        alive.add_metric(model, 0 if self._engine.dead else 1)
        yield alive
        for name, text, value in (
            ("engine_steps", "Committed engine steps.", stats.steps),
            ("swapped_pages", "Pages moved between device and host.", stats.swapped_pages),
            ("copied_pages", "Pages copied on write.", stats.copied_pages),
        ):
            counter = CounterMetricFamily(f"llmtool:{name}", text, labels=["model_name"])
            counter.add_metric(model, value)
            yield counter

    @staticmethod
    def _replicas(fleet: FleetView, model: list[str]) -> Iterator[Metric]:
        """Of each engine behind the front. The shared names above are their sums: under names of their own, these
        are not added to them a second time."""
        counts = [(r, r.stats) for r in fleet.replicas]
        labels = ["model_name", "replica"]
        for name, text, values in (
            ("up", "1 while the replica takes requests.", [r.state == "up" for r, _ in counts]),
            ("requests_running", "Sequences in its batch.", [s.num_running for _, s in counts]),
            ("requests_waiting", "Sequences that wait for admission.", [s.num_waiting for _, s in counts]),
            ("requests_unfinished", "Requests routed to it and not ended.", [r.load for r, _ in counts]),
            ("kv_cache_usage", "Part of its KV pages in use, 0 to 1.", [s.kv_usage for _, s in counts]),
        ):
            gauge = GaugeMetricFamily(f"llmtool:replica_{name}", text, labels=labels)
            for (replica, _), value in zip(counts, values, strict=True):
                gauge.add_metric([*model, str(replica.number)], float(value))
            yield gauge
        for name, text, values in (
            ("restarts", "Times that it was started again.", [r.restarts for r, _ in counts]),
            ("prompt_tokens", "Prompt tokens computed or found.", [s.prompt_tokens for _, s in counts]),
            ("generation_tokens", "Tokens generated.", [s.generation_tokens for _, s in counts]),
            ("prefix_cache_queries", "Prompt tokens looked up.", [s.prefix_queries for _, s in counts]),
            ("prefix_cache_hits", "Prompt tokens found.", [s.prefix_hits for _, s in counts]),
            ("preemptions", "Sequences that lost their pages.", [s.preemptions for _, s in counts]),
            ("engine_steps", "Committed engine steps.", [s.steps for _, s in counts]),
        ):
            counter = CounterMetricFamily(f"llmtool:replica_{name}", text, labels=labels)
            for (replica, _), value in zip(counts, values, strict=True):
                counter.add_metric([*model, str(replica.number)], value)
            yield counter
        if (moved := fleet.transfers) is not None:
            for name, text, value in (
                ("kv_transfers", "Requests whose KV went to a decode engine.", moved.done),
                ("kv_transfers_failed", "Requests whose KV was computed again instead.", moved.failed),
                ("kv_transfer_bytes", "Bytes of KV sent.", moved.nbytes),
                ("kv_transfer_seconds", "From asking for a transfer to its end, in sum.", moved.seconds),
            ):
                yield _counter(f"llmtool:{name}", text, model, value)
        yield _counter(
            "llmtool:requests_retried", "Requests moved when their replica died.", model, fleet.retried
        )
        yield _counter(
            "llmtool:requests_lost", "Requests that failed by a replica's death.", model, fleet.lost
        )


def _counter(name: str, text: str, model: list[str], value: float) -> Metric:
    counter = CounterMetricFamily(name, text, labels=["model_name"])
    counter.add_metric(model, value)
    return counter
