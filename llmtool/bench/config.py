"""What a bench run is: the flags of `llmtool bench`, under vLLM's names where vLLM has one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llmtool.errors import UsageError
from llmtool.workload.slo import SLO, parse_slos
from llmtool.workload.traces import MOONCAKE_BLOCK, TRACE_FORMATS

DATASETS = ("random", "prefix_repetition", "copy", "sharegpt", "custom", *TRACE_FORMATS)
FILE_DATASETS = ("sharegpt", "custom", *TRACE_FORMATS)
ENDPOINTS = ("auto", "completions", "chat", "embeddings")


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """Which prompts. Lengths are in tokens.

    output_len: overrides the lengths a sharegpt or custom file asks for. trace_block_size: tokens made per
    Mooncake hash id, to shrink its prompts. max_model_len: requests whose prompt and output together are
    longer are left out.
    """

    dataset_name: str = "random"
    dataset_path: str | None = None
    num_prompts: int = 100
    random_input_len: int = 512
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    copy_passage_len: int = 160
    copy_output_len: int = 128
    output_len: int | None = None
    trace_block_size: int = MOONCAKE_BLOCK
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        if self.dataset_name not in DATASETS:
            raise UsageError(f"Unknown dataset {self.dataset_name!r}.", f"Known: {', '.join(DATASETS)}.")
        if self.dataset_name in FILE_DATASETS and not self.dataset_path:
            raise UsageError(
                f"The dataset {self.dataset_name!r} is read from a file.", "Give --dataset-path FILE."
            )
        if self.num_prompts < 1:
            raise UsageError(f"num_prompts must be at least 1, not {self.num_prompts}.")
        if self.output_len is not None and self.output_len < 1:
            raise UsageError(f"output_len must be at least 1, not {self.output_len}.")


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """When requests are sent.

    request_rate: per second; infinity sends all at once (behind max_concurrency that is a closed loop), or,
    for a timed trace, at the trace's own times. burstiness: 1 Poisson, infinity constant gaps.
    ramp_up_start_rps and ramp_up_end_rps: a rate that grows linearly instead. duration: no request is sent
    after so many seconds; those under way finish. request_rates: one run per rate. search_knee: find the
    highest rate that holds the SLOs.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None
    trace_speedup: float = 1.0
    duration: float | None = None
    num_warmups: int = 1
    request_rates: tuple[float, ...] = ()
    search_knee: bool = False
    knee_min_rate: float = 0.5
    knee_max_rate: float = 256.0
    knee_max_runs: int = 12
    knee_tolerance: float = 0.1
    slo_attainment: float = 0.9

    def __post_init__(self) -> None:
        for name in ("request_rate", "burstiness", "trace_speedup", "knee_min_rate", "knee_tolerance"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be positive, not {getattr(self, name)}.")
        if any(not 0 < rate < math.inf for rate in self.request_rates):
            raise UsageError(f"A sweep takes positive, finite rates, not {self.request_rates}.")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise UsageError(f"max_concurrency must be at least 1, not {self.max_concurrency}.")
        if (self.ramp_up_start_rps is None) != (self.ramp_up_end_rps is None):
            raise UsageError("A ramp needs both ramp_up_start_rps and ramp_up_end_rps.")
        if self.ramp_up_start_rps is not None and not math.isinf(self.request_rate):
            raise UsageError("A ramp replaces request_rate.", "Give one of the two.")
        if self.duration is not None and not self.duration > 0:
            raise UsageError(f"duration must be positive, not {self.duration}.")
        if self.num_warmups < 0:
            raise UsageError(f"num_warmups must be at least 0, not {self.num_warmups}.")
        if not self.knee_min_rate < self.knee_max_rate < math.inf or self.knee_max_runs < 2:
            raise UsageError("A knee search needs knee_min_rate < knee_max_rate and at least 2 runs.")
        if not 0 < self.slo_attainment <= 1:
            raise UsageError(f"slo_attainment must be in (0, 1], not {self.slo_attainment}.")
        if self.request_rates and self.search_knee:
            raise UsageError("A sweep and a knee search are two different runs.", "Give one of the two.")
        if (self.request_rates or self.search_knee) and self.ramp_up_start_rps is not None:
            raise UsageError("A ramp cannot be swept.", "Leave out either.")


@dataclass(frozen=True, slots=True)
class BenchConfig:
    """One bench invocation.

    endpoint: auto sends messages to the chat endpoint and the rest to completions; chat sends everything as
    chat; embeddings asks an encoder for vectors, where output lengths and sampling mean nothing. temperature,
    top_p, top_k: None leaves it to the server. extra_body: more fields of every request body. goodput: SLOs as
    text (workload/slo.py). timeout: seconds for one request. save_text: keep generated texts.
    """

    model: str | None = None
    url: str | None = None
    endpoint: str = "auto"
    tokenizer: str | None = None
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    seed: int = 0
    temperature: float | None = 0.0
    top_p: float | None = None
    top_k: int | None = None
    ignore_eos: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    goodput: tuple[str, ...] = ()
    metric_percentiles: tuple[float, ...] = (50.0, 90.0, 95.0, 99.0)
    timeout: float = 6 * 3600.0
    save_text: bool = False
    label: str | None = None

    def __post_init__(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise UsageError(f"endpoint must be one of {', '.join(ENDPOINTS)}, not {self.endpoint!r}.")
        if self.endpoint == "embeddings" and (self.top_p or self.top_k or self.ignore_eos or self.save_text):
            raise UsageError(
                "Embeddings are not sampled.", "Leave out top_p, top_k, ignore_eos and save_text."
            )
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, not {self.seed}.")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature must be at least 0, not {self.temperature}.")
        if not self.timeout > 0:
            raise UsageError(f"timeout must be positive, not {self.timeout}.")
        if not self.metric_percentiles or any(not 0 <= p <= 100 for p in self.metric_percentiles):
            raise UsageError(f"metric_percentiles must be between 0 and 100, not {self.metric_percentiles}.")
        if self.load.search_knee and not self.slos:
            raise UsageError(
                "A knee search needs objectives to hold.",
                "For example --goodput ttft:500 --goodput tpot:100.",
            )

    @property
    def slos(self) -> tuple[SLO, ...]:
        return parse_slos(self.goodput)

    def body_fields(self) -> dict[str, Any]:
        """Fields that every request carries besides its prompt and length."""
        if (
            self.endpoint == "embeddings"
        ):  # in base64 they cost the client least, and are what openai's asks for
            return {"encoding_format": "base64"} | dict(self.extra_body)
        named = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        fields = {name: value for name, value in named.items() if value is not None}
        # OpenAI itself refuses fields it does not know, so ignore_eos is sent only when it is asked for.
        return fields | ({"ignore_eos": True} if self.ignore_eos else {}) | dict(self.extra_body)

    def as_dict(self) -> dict[str, Any]:
        """Flat, for the result file; infinite rates as text, since JSON has no infinity."""
        flat = asdict(self)
        flat |= flat.pop("dataset")
        flat |= flat.pop("load")
        return {key: str(v) if isinstance(v, float) and math.isinf(v) else v for key, v in flat.items()}
