"""What a user asks for (`SamplingParams`), the sequence the engine runs for it (`Request`), what it answers.

One `Request` is one sequence of tokens. A call with n > 1 or a beam search becomes several of them that share
`group` (the caller's id) and, while their tokens agree, KV pages (PagedAttention, sections 4.4 and 4.5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from llmtool.errors import RequestError

MAX_N = 128
MAX_LOGPROBS = 100
MAX_STOP_TOKENS = 128
MAX_BEAM_STOPS = 8
MAX_SPEC = 16  # draft tokens of a sequence in one step
MAX_TOKENS = 2**31 - 1
MIN_TEMPERATURE = 0.01
GREEDY_BELOW = 1e-5
_NOT_WITH_BEAMS = (
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "prompt_logprobs",
)


class RequestStatus(IntEnum):
    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2  # waits again; its KV is gone and is recomputed
    SWAPPED = 3  # waits again; its KV lies in host memory
    FINISHED = 4


class FinishReason(StrEnum):
    STOP = "stop"  # end-of-sequence, stop token or stop string
    LENGTH = "length"  # max_tokens or the context is exhausted
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint on the output. kind: json_schema | json_object | regex | lark | choice; text: its source."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class BeamParams:
    """Beam search as transformers' ``generate(num_beams=width)`` defines it. width: live beams."""

    width: int
    length_penalty: float = 1.0
    early_stopping: bool = False

    @property
    def candidates(self) -> int:
        """Continuations needed of each beam: `width` that go on, and any that end."""
        return 2 * self.width + MAX_BEAM_STOPS


def _require(ok: bool, param: str, message: str) -> None:
    if not ok:
        raise RequestError(message, param=param)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. Names and meanings are vLLM's; ``temperature=0`` is greedy.

    max_tokens: None means up to the context's end. logprobs: None is none, 0 the sampled token's only, k the
    k best besides. top_k: 0 or -1 is off. seed: None lets the caller's `Engine.add` choose one. spec: draft tokens
    verified in a step, 0 for none; None leaves it to the engine's controller. It changes no token.
    cache_hints: lengths of prefixes of the prompt that later prompts may share, such as ends of chat messages.
    stop_token_ids also end a sequence; ignore_eos ignores only the model's own end tokens.
    Raises RequestError naming the field at fault.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    spec: int | None = None
    grammar: Grammar | None = None
    beam: BeamParams | None = None
    cache_hints: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._normalise()
        m = self.max_tokens
        _require(
            m is None or m <= MAX_TOKENS, "max_tokens", f"max_tokens must be at most {MAX_TOKENS}, not {m}."
        )
        _require(
            self.min_tokens <= MAX_TOKENS,
            "min_tokens",
            f"min_tokens must be at most {MAX_TOKENS}, not {self.min_tokens}.",
        )
        _require(m is None or m >= 1, "max_tokens", f"max_tokens must be at least 1, not {m}.")
        _require(self.min_tokens >= 0, "min_tokens", f"min_tokens must be at least 0, not {self.min_tokens}.")
        _require(
            m is None or self.min_tokens <= m,
            "min_tokens",
            f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({m}).",
        )
        _finite(self.temperature, "temperature", 0.0, 100.0)
        _finite(self.top_p, "top_p", 0.0, 1.0, open_low=True)
        _finite(self.min_p, "min_p", 0.0, 1.0)
        _finite(self.repetition_penalty, "repetition_penalty", 0.01, 100.0)
        _finite(self.presence_penalty, "presence_penalty", -2.0, 2.0)
        _finite(self.frequency_penalty, "frequency_penalty", -2.0, 2.0)
        _require(self.top_k >= -1, "top_k", f"top_k must be -1, 0 (off) or positive, not {self.top_k}.")
        _require(1 <= self.n <= MAX_N, "n", f"n must be between 1 and {MAX_N}, not {self.n}.")
        _require(
            self.n == 1 or self.temperature > 0 or self.beam is not None,
            "n",
            f"n must be 1 with temperature 0 (greedy), not {self.n}: all answers would be the same.",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value <= MAX_LOGPROBS,
                name,
                f"{name} must be between 0 and {MAX_LOGPROBS}, not {value}.",
            )
        _require(
            self.seed is None or -(2**63) <= self.seed < 2**63,
            "seed",
            f"seed must be a 64-bit signed integer, not {self.seed}.",
        )
        _require(
            self.spec is None or 0 <= self.spec <= MAX_SPEC,
            "spec",
            f"spec must be between 0 and {MAX_SPEC} draft tokens, not {self.spec}.",
        )
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKENS,
            "stop_token_ids",
            f"at most {MAX_STOP_TOKENS} stop_token_ids are taken, not {len(self.stop_token_ids)}.",
        )
        for token, bias in self.logit_bias.items():
            _require(token >= 0, "logit_bias", f"logit_bias has a negative token id, {token}.")
            _finite(bias, "logit_bias", -100.0, 100.0)
        if self.beam is not None:
            width = self.beam.width
            _require(1 <= width <= 32, "best_of", f"a beam search takes 1 to 32 beams, not {width}.")
            _require(self.n <= width, "n", f"n ({self.n}) must not exceed the number of beams ({width}).")
            self._check_beam()

    def _normalise(self) -> None:
        """As vLLM does: a temperature near 0 is greedy and no other is below 0.01, which float32 would not survive;
        seed -1 is none."""
        set_field = object.__setattr__
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            set_field(self, "temperature", 0.0 if self.temperature < GREEDY_BELOW else MIN_TEMPERATURE)
        if self.seed == -1:
            set_field(self, "seed", None)

    def _check_beam(self) -> None:
        """Beams are ranked by the model's own probabilities: what would change those is refused, not ignored."""
        _require(
            self.temperature in (0.0, 1.0), "temperature", "A beam search takes no temperature but 0 or 1."
        )
        _require(self.grammar is None, "response_format", "A beam search takes no structured output.")
        _require(not self.spec, "spec", "A beam search takes no drafts.")
        default = SamplingParams()
        for name in _NOT_WITH_BEAMS:
            _require(getattr(self, name) == getattr(default, name), name, f"A beam search takes no {name}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _finite(value: float, name: str, low: float, high: float, open_low: bool = False) -> None:
    ok = low < value <= high if open_low else low <= value <= high  # NaN fails both
    bracket = "(" if open_low else "["
    _require(ok, name, f"{name} must be in {bracket}{low:g}, {high:g}], not {value}.")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token (natural log) and its rank (1 = most likely) at that position.

    top: the k most likely (token, logprob) pairs, best first.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False, slots=True)
class Request:
    """One running sequence: its tokens and how far the engine has come with them.

    Two counters, because more than one step may be in flight: `num_submitted` tokens have KV that is written
    or will be by a submitted step; `num_computed` of them are committed by `Scheduler.update`.
    """

    id: str  # unique sequence id: "<group>" or "<group>/<index>"
    group: str  # the caller's request id
    index: int  # which of the n answers this is
    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    params: SamplingParams
    arrival: float  # seconds on the engine's clock
    max_tokens: int  # resolved: never None, fits the context
    priority: int = 0  # smaller goes first
    seed: int = 0
    cache_salt: str = ""
    parent: Request | None = None  # fork its pages once its prompt is computed
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed: int = 0
    num_submitted: int = 0
    num_sent: int = 0  # tokens the executor has been told; 0: it does not know this sequence
    in_flight: int = 0  # submitted steps not committed yet
    num_cached: int = 0  # prompt tokens taken from the prefix cache at first admission
    num_preemptions: int = 0
    compact: bool = False  # next time it takes no cached pages, which may lie scattered
    cumulative_logprob: float = 0.0
    first_scheduled: float = -1.0
    first_token: float = -1.0
    stop_tokens: frozenset[int] = frozenset()  # ends of sequence and stop ids that count for this request
    stopped_by: int | None = None  # the stop token id, if one ended it
    kept_pages: Sequence[
        int
    ] = ()  # per group, table entries left by a rollback the executor has not heard of
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # collected over prompt chunks
    handoff: bool = False  # ends with its first token: another engine goes on, with its KV
    moved: int = 0  # tokens whose KV comes from another engine, until it is admitted
    sort_key: tuple[int, float, str, int] = (0, 0.0, "", 0)

    def __post_init__(self) -> None:
        # Total order, so that ties never depend on insertion or hashing.
        self.sort_key = (self.priority, self.arrival, self.group, self.index)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def finished(self) -> bool:
        return self.status == RequestStatus.FINISHED


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """Moments on the engine's clock, seconds; -1 where it never happened."""

    arrival: float
    first_scheduled: float
    first_token: float
    finished: float


@dataclass(slots=True)
class SequenceOutput:
    """What one step added to one answer of one request. The last one carries `finish_reason` and `times`."""

    request_id: str  # the caller's id (Request.group)
    index: int
    token_ids: Sequence[int]  # new tokens of this step
    logprobs: Sequence[TokenLogprob] = ()  # one per new token when asked for
    prompt_logprobs: Sequence[TokenLogprob | None] = ()  # once, with the first token; [0] is None
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    cumulative_logprob: float = 0.0
    times: RequestTimes | None = None
    vector: bytes = b""  # of a pooled sequence: float32 in native order
