"""A small policy core on a virtual clock, with tokens that depend on everything before them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.geometry import KVCacheGroup, LayerCacheSpec, uniform_group
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import Clock, Drafts, PageCopy, SchedulerOutput, StepResult, VirtualClock
from llmtool.core.request import SamplingParams, TokenLogprob
from llmtool.core.scheduler import Scheduler

VOCAB = 97
LAYERS = [LayerCacheSpec(layer, 2, 8, 8, 4) for layer in range(2)]


def group(tokens_per_page: int = 4) -> KVCacheGroup:
    return uniform_group(LAYERS, tokens_per_page)


def digest(tokens: Sequence[int], salt: int = 0) -> int:
    data = ",".join(map(str, tokens)) + f"|{salt}"
    return int.from_bytes(hashlib.blake2b(data.encode(), digest_size=8).digest(), "little")


def next_token(tokens: Sequence[int], seed: int) -> int:
    """What this "model" says after `tokens`."""
    return digest(tokens, seed) % VOCAB


def next_logprobs(tokens: Sequence[int], k: int) -> tuple[tuple[int, float], ...]:
    """Distinct, strictly ordered log-probabilities over the vocabulary."""
    scored = [
        (token, -((digest([*tokens, token]) % 10_000) + token / VOCAB) / 1000) for token in range(VOCAB)
    ]
    return tuple(sorted(scored, key=lambda p: -p[1])[:k])


class MemoryExecutor:
    """An executor whose "KV" is the token itself, written into pages and read back through the block table: it
    answers from what it reads, so a wrong table, a lost copy or a page shared by mistake changes its tokens.
    """

    def __init__(self, kv_group: KVCacheGroup, max_in_flight: int = 1, seconds: float = 0.01) -> None:
        self.max_in_flight = max_in_flight
        self.seconds = seconds
        self._size = kv_group.tokens_per_page
        self._device: dict[int, list[int]] = {}
        self._host: dict[int, list[int]] = {}
        self._tables: dict[str, list[int]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._facts: dict[str, tuple[SamplingParams, int]] = {}
        self._results: list[StepResult] = []
        self.failing: set[str] = set()
        self.max_batch_tokens = 0

    def _copy(
        self, target: dict[int, list[int]], source: dict[int, list[int]], copies: list[PageCopy]
    ) -> None:
        for copy in copies:
            target[copy.dst] = list(source.get(copy.src, [-1] * self._size))

    def submit(self, out: SchedulerOutput) -> None:
        for sequence in out.finished:
            for known in (self._tables, self._tokens, self._facts):
                known.pop(sequence, None)
        self._copy(self._host, self._device, out.swap_out)
        self._copy(self._device, self._host, out.swap_in)
        self._copy(self._device, self._device, out.copies)
        for new in out.new:
            self._tables[new.id] = list(new.tables[0])
            self._tokens[new.id] = list(new.token_ids)
            self._facts[new.id] = (new.params, new.seed)
        self.max_batch_tokens = max(self.max_batch_tokens, out.num_tokens)
        assert out.num_tokens == sum(s.num_tokens for s in out.scheduled)
        for entry in out.scheduled:
            table = self._tables[entry.id]
            for g, index, value in entry.table_edits:
                assert g == 0
                table[index] = value
            if entry.keep_pages:
                del table[entry.keep_pages[0] :]
            table.extend(entry.new_pages[0] if entry.new_pages else ())
            self._tokens[entry.id].extend(entry.new_token_ids)
            for position in range(entry.start, entry.start + entry.num_tokens):
                page = self._device.setdefault(table[position // self._size], [-1] * self._size)
                page[position % self._size] = (*self._tokens[entry.id], *entry.draft)[position]
        # Every sequence reads after all have written, as real layers do.
        tokens, logprobs, errors = [], {}, {}
        for entry in out.scheduled:
            end = entry.start + entry.num_tokens
            table = self._tables[entry.id]
            seen = [self._device[table[p // self._size]][p % self._size] for p in range(end)]
            assert seen == [*self._tokens[entry.id], *entry.draft][:end], f"{entry.id} reads {seen}"
            if entry.id in self.failing:
                errors[entry.id] = "it was told to fail"
                tokens.append([])
                continue
            if not entry.sample:
                tokens.append([])
                continue
            params, seed = self._facts[entry.id]
            if params.beam is not None:
                top = next_logprobs(seen, params.beam.candidates)
                logprobs[entry.id] = (TokenLogprob(top[0][0], top[0][1], 1, top),)
            known = end - len(entry.draft)
            made = [next_token(seen[:known], seed)]
            while len(made) <= len(entry.draft) and entry.draft[len(made) - 1] == made[-1]:
                made.append(next_token(seen[: known + len(made)], seed))
            tokens.append(made)
        self._results.append(StepResult(out.step_id, tokens, logprobs, errors=errors, seconds=self.seconds))

    def collect(self) -> StepResult:
        return self._results.pop(0)


def make_engine(
    num_pages: int = 64,
    *,
    tokens_per_page: int = 4,
    host_pages: int = 0,
    prefix_caching: bool = True,
    max_in_flight: int = 1,
    eos: Sequence[int] = (),
    clock: Clock | None = None,
    drafts: Drafts | None = None,
    **config: object,
) -> Engine:
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 64, "max_waiting": 1000}
    settings |= config  # type: ignore[arg-type]
    kv_group = group(tokens_per_page)
    allocator = UniformAllocator(kv_group, num_pages, host_pages, prefix_caching)
    scheduler = Scheduler(SchedulerConfig(**settings), allocator, eos, drafts)  # type: ignore[arg-type]
    return Engine(scheduler, MemoryExecutor(kv_group, max_in_flight), clock or VirtualClock())


def expected(prompt: Sequence[int], max_tokens: int, seed: int = 0, stops: Sequence[int] = ()) -> list[int]:
    """What a sequence must produce, whatever else runs beside it."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, seed))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]
