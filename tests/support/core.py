"""A small policy core on a virtual clock, with tokens that depend on everything before them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence

from llmtool.config import SchedulerConfig
from llmtool.core.engine import Engine
from llmtool.core.memory.allocator import KVAllocator
from llmtool.core.memory.geometry import KVCacheGroup, LayerCacheSpec, uniform_group
from llmtool.core.memory.page_plan import plan_pages
from llmtool.core.memory.two_level import TwoLevelAllocator
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.ports import Clock, Drafts, SchedulerOutput, StepResult, VirtualClock
from llmtool.core.request import SamplingParams, TokenLogprob
from llmtool.core.scheduler import Scheduler
from tests.support.pages import PageMemory, Work, model

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
    """An executor whose "KV" is a fingerprint of the tokens, written into pages and read back through the block
    tables: a wrong table, a lost copy or a page shared by mistake shows in the step that reads it.
    """

    def __init__(
        self, groups: KVCacheGroup | Sequence[KVCacheGroup], max_in_flight: int = 1, seconds: float = 0.01
    ) -> None:
        self.max_in_flight = max_in_flight
        self.seconds = seconds
        groups = [groups] if isinstance(groups, KVCacheGroup) else groups
        self._device, self._host = PageMemory(groups), PageMemory(groups)
        self._tables: dict[str, list[list[int]]] = {}
        self._tokens: dict[str, list[int]] = {}
        self._facts: dict[str, tuple[SamplingParams, int]] = {}
        self._results: list[StepResult] = []
        self.failing: set[str] = set()
        self.max_batch_tokens = 0

    def submit(self, out: SchedulerOutput) -> None:
        for sequence in out.finished:
            for known in (self._tables, self._tokens, self._facts):
                known.pop(sequence, None)
        self._host.copy_from(self._device, out.swap_out)
        self._device.copy_from(self._host, out.swap_in)
        self._device.copy_from(self._device, out.copies)
        for new in out.new:
            self._tables[new.id] = [list(table) for table in new.tables]
            self._tokens[new.id] = list(new.token_ids)
            self._facts[new.id] = (new.params, new.seed)
        for moved in out.received:
            self._device.put(moved.entries, pickle.loads(moved.kv))
        self.max_batch_tokens = max(self.max_batch_tokens, out.num_tokens)
        assert out.num_tokens == sum(s.num_tokens for s in out.scheduled)
        step = []
        for entry in out.scheduled:
            tables = self._tables[entry.id]
            for g, index, value in entry.table_edits:
                tables[g][index] = value
            for table, kept in zip(tables, entry.keep_pages, strict=False):
                del table[kept:]
            for table, entries in zip(tables, entry.new_pages, strict=False):
                table.extend(entries)
            self._tokens[entry.id].extend(entry.new_token_ids)
            end = entry.start + entry.num_tokens
            seen = [*self._tokens[entry.id], *entry.draft][:end]
            step.append(Work(entry.id, tables, seen, entry.start, end))
        self._device.run(step)
        tokens, logprobs, errors = [], {}, {}
        for entry, work in zip(out.scheduled, step, strict=True):
            seen, end = list(work.tokens), work.end
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

    def read_pages(self, entries: Sequence[Sequence[int]]) -> bytes:
        return pickle.dumps(self._device.get(entries))


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
    model_name: str | None = None,
    **config: object,
) -> Engine:
    """model_name: a model of tests.support.pages, whose large pages these are; None: uniform pages."""
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 64, "max_waiting": 1000}
    settings |= config  # type: ignore[arg-type]
    allocator: KVAllocator = UniformAllocator(group(tokens_per_page), num_pages, host_pages, prefix_caching)
    if model_name is not None:
        plan = plan_pages(model(model_name), tokens_per_page, 8192)
        budget = int(settings["max_num_batched_tokens"])
        allocator = TwoLevelAllocator(plan, num_pages, host_pages, prefix_caching, budget, 16, 4)
    scheduler = Scheduler(SchedulerConfig(**settings), allocator, eos, drafts)  # type: ignore[arg-type]
    return Engine(scheduler, MemoryExecutor(allocator.groups, max_in_flight), clock or VirtualClock())


def expected(prompt: Sequence[int], max_tokens: int, seed: int = 0, stops: Sequence[int] = ()) -> list[int]:
    """What a sequence must produce, whatever else runs beside it."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, seed))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]
