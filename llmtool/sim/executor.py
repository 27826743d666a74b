"""The second way of driving the core: steps cost what a model says, tokens come from a rule."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llmtool.core.ports import NewRequest, ScheduledRequest, SchedulerOutput, StepCost, StepResult
from llmtool.core.request import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class TokenContext:
    """What a token rule may look at. position: index in the sequence of the token to make."""

    id: str
    position: int
    seed: int
    params: SamplingParams


TokenRule = Callable[[TokenContext], int]
"""The next token of a sequence; deterministic, so that runs repeat."""

BeamRule = Callable[[TokenContext, int], tuple[tuple[int, float], ...]]
"""(context, k) -> the k most likely (token, logprob), best first."""


def constant_token(context: TokenContext) -> int:
    """Token 1 always: lengths then come from max_tokens alone."""
    return 1


@dataclass(slots=True)
class _Known:
    seed: int
    params: SamplingParams


class CostModelExecutor:
    """Executor for a virtual clock. cost: seconds of a step. tokens, beams: what sequences go on with.

    Steps in flight run one after the other, as on one device.
    """

    def __init__(
        self,
        cost: StepCost,
        tokens: TokenRule = constant_token,
        beams: BeamRule | None = None,
        max_in_flight: int = 1,
    ) -> None:
        self.max_in_flight = max_in_flight
        self._cost = cost
        self._tokens = tokens
        self._beams = beams
        self._known: dict[str, _Known] = {}
        self._queue: deque[StepResult] = deque()

    def submit(self, out: SchedulerOutput) -> None:
        for sequence in out.finished:
            self._known.pop(sequence, None)
        for new in out.new:
            self._learn(new)
        tokens: list[list[int]] = []
        logprobs: dict[str, tuple[TokenLogprob, ...]] = {}
        kv_tokens = 0
        for entry in out.scheduled:
            kv_tokens += entry.start + entry.num_tokens
            tokens.append(self._sample(entry, logprobs) if entry.sample else [])
        seconds = self._cost.seconds(out.num_tokens, kv_tokens, len(out.scheduled)) if out.scheduled else 0.0
        self._queue.append(StepResult(out.step_id, tokens, logprobs, seconds=seconds))

    def _learn(self, new: NewRequest) -> None:
        self._known[new.id] = _Known(new.seed, new.params)

    def _sample(self, entry: ScheduledRequest, logprobs: dict[str, tuple[TokenLogprob, ...]]) -> list[int]:
        known = self._known[entry.id]
        position = entry.start + entry.num_tokens - len(entry.draft)
        context = TokenContext(entry.id, position, known.seed, known.params)
        if known.params.beam is None:
            tokens = [self._tokens(context)]
            for guess in entry.draft:
                if guess != tokens[-1]:
                    break
                position += 1
                tokens.append(self._tokens(TokenContext(entry.id, position, known.seed, known.params)))
            return tokens
        assert self._beams is not None, "a beam search needs a rule for beams"
        top = self._beams(context, known.params.beam.candidates)
        logprobs[entry.id] = (TokenLogprob(top[0][0], top[0][1], 1, top),)
        return [top[0][0]]

    def collect(self) -> StepResult:
        return self._queue.popleft()
