"""Who may enter: limits are checked once, when a request comes, so that nothing that can never fit waits."""

from __future__ import annotations

from collections.abc import Sequence

from llmtool.config import SchedulerConfig
from llmtool.core.memory.allocator import KVAllocator
from llmtool.core.request import MAX_BEAM_STOPS, Request, SamplingParams
from llmtool.errors import QueueFull, RequestError, RequestTooLong

_MASK64 = 2**64 - 1


def sibling_seed(seed: int, index: int) -> int:
    """The seed of answer `index` of a request: answer 0 keeps the request's own (splitmix64 for the others)."""
    if index == 0:
        return seed
    z = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return (z ^ (z >> 31)) - 2**63


class Admission:
    """Checks requests against limits and turns them into sequences."""

    def __init__(
        self, config: SchedulerConfig, allocator: KVAllocator, eos_token_ids: frozenset[int]
    ) -> None:
        self._config = config
        self._allocator = allocator
        self._eos = eos_token_ids
        self.context = min(config.max_model_len, allocator.max_tokens())

    def check_queue(self, present: int, new: int) -> None:
        limit = self._config.max_num_seqs + self._config.max_waiting
        if present + new > limit:
            raise QueueFull(
                f"The queue is full: {present} sequences are running or waiting, {new} more are asked for, and the "
                f"limit is {limit}.",
                "Try again later.",
            )

    def max_tokens(self, prompt_len: int, params: SamplingParams) -> int:
        """The output limit of a prompt of `prompt_len` tokens. Raises RequestTooLong with the numbers."""
        if prompt_len == 0:
            raise RequestError("The prompt has no tokens.", param="prompt")
        room = self.context - prompt_len
        if room < 1:
            raise RequestTooLong(
                f"The prompt has {prompt_len} tokens, but this model takes {self.context} tokens for prompt and "
                "output together.",
                "Shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestTooLong(
                f"The prompt has {prompt_len} tokens and {params.max_tokens} are asked for, but this model takes "
                f"{self.context} tokens for prompt and output together.",
                f"Set max_tokens to {room} or less.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return room if params.max_tokens is None else params.max_tokens

    def sequences(
        self,
        group: str,
        prompt: Sequence[int],
        params: SamplingParams,
        now: float,
        priority: int,
        cache_salt: str,
        seed: int,
        handoff: bool = False,
        given: Sequence[int] = (),
        moved: bool = False,
    ) -> list[Request]:
        """The request's sequences; all but the first wait to share the first one's prompt. handoff, given, moved:
        see `Scheduler.add`."""
        max_tokens = self.max_tokens(len(prompt), params)
        assert not (handoff or given) or (params.n == 1 and params.beam is None), "one sequence moves"
        width = 1 if params.beam is None else params.beam.width
        if width > self._config.max_num_seqs:
            raise RequestError(
                f"A beam search of {width} beams does not fit: this server runs {self._config.max_num_seqs} "
                "sequences at once.",
                param="best_of",
            )
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
        if params.beam is not None and len(stops) > MAX_BEAM_STOPS:
            raise RequestError(
                f"A beam search takes at most {MAX_BEAM_STOPS} stop tokens, not {len(stops)}.",
                param="stop_token_ids",
            )
        requests: list[Request] = []
        for index in range(params.n if params.beam is None else 1):
            requests.append(
                Request(
                    id=group if index == 0 else f"{group}/{index}",
                    group=group,
                    index=index,
                    token_ids=[*prompt, *given],
                    num_prompt_tokens=len(prompt),
                    params=params,
                    arrival=now,
                    max_tokens=1 if handoff else max_tokens,
                    priority=priority if self._config.policy == "priority" else 0,
                    seed=sibling_seed(seed, index),
                    cache_salt=cache_salt,
                    parent=requests[0] if index else None,
                    stop_tokens=stops,
                    handoff=handoff and max_tokens > 1,
                    moved=len(prompt) + len(given) - 1 if moved else 0,
                )
            )
        return requests

    @staticmethod
    def child(source: Request, index: int) -> Request:
        """A copy of a beam, before its next token is appended."""
        return Request(
            id=f"{source.group}/{index}",
            group=source.group,
            index=index,
            token_ids=list(source.token_ids),
            num_prompt_tokens=source.num_prompt_tokens,
            params=source.params,
            arrival=source.arrival,
            max_tokens=source.max_tokens,
            priority=source.priority,
            cache_salt=source.cache_salt,
            stop_tokens=source.stop_tokens,
            num_cached=source.num_cached,
            first_scheduled=source.first_scheduled,
        )
