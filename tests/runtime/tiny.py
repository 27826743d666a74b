"""A tiny random Llama both here and in transformers, and a stand-in scheduler that scatters pages on purpose."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmtool.core.memory.geometry import KVCacheGroup, uniform_group
from llmtool.core.memory.model import ModelGeometry
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.select import plan_of
from llmtool.core.ports import NewRequest, PageCopy, ScheduledRequest, SchedulerOutput, StepResult
from llmtool.core.request import SamplingParams
from llmtool.models.decoder import Decoder
from llmtool.models.loader import load
from llmtool.runtime.executor import TorchExecutor
from llmtool.runtime.kv_store import KVStore

VOCAB = 300
EOS = 0
MAX_LEN = 160
GREEDY = SamplingParams(temperature=0)


@dataclass(frozen=True, slots=True)
class TinyModel:
    """The same weights twice. reference: transformers' model; directory: where both were loaded from."""

    decoder: Decoder
    reference: Any
    directory: Path

    def greedy(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """What transformers' generate says, ends of sequence ignored."""
        return self.generate(prompt, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)[0]

    def generate(self, prompt: Sequence[int], **options: Any) -> list[list[int]]:
        ids = torch.tensor([list(prompt)])
        out = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), pad_token_id=VOCAB - 1, **options
        )
        return [row[len(prompt) :].tolist() for row in out]

    def logprobs(self, tokens: Sequence[int]) -> torch.Tensor:
        """[T, V] log-softmax after each token."""
        with torch.inference_mode():
            return torch.log_softmax(self.reference(torch.tensor([list(tokens)])).logits[0].double(), dim=-1)

    def group(self, tokens_per_page: int) -> KVCacheGroup:
        return uniform_group(self.decoder.spec.layer_cache_specs(4), tokens_per_page)

    def plan(self, tokens_per_page: int, mode: str = "near") -> PagePlan | None:
        geometry = ModelGeometry.from_spec(self.decoder.spec, 4)
        return plan_of(geometry, tokens_per_page, mode)

    def executor(self, tokens_per_page: int = 4, num_pages: int = 64, **options: Any) -> TorchExecutor:
        plan: PagePlan | None = options.pop("plan", None)
        store = KVStore(
            self.group(tokens_per_page) if plan is None else plan.groups,
            num_pages,
            options.pop("host_pages", 0),
            page_bytes=None if plan is None else plan.large_page,
        )
        max_num_seqs = options.pop("max_num_seqs", 8)
        return TorchExecutor(self.decoder, store, max_num_seqs, MAX_LEN, [EOS], **options)


def make_tiny_model(directory: Path) -> TinyModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.3,  # far from uniform, so that the largest logit stands out
        bos_token_id=1,
        eos_token_id=EOS,
    )
    reference = LlamaForCausalLM(config).eval()
    reference.save_pretrained(directory)
    return TinyModel(load(directory, torch.float32), reference, directory)


def random_prompts(count: int, seed: int, low: int = 1, high: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB - 1) for _ in range(rng.randint(low, high))] for _ in range(count)]


@dataclass(slots=True)
class Live:
    """What a scheduler knows of a sequence."""

    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    seed: int
    computed: int = 0
    sent: int = 0
    pages: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]


class Script:
    """Plays the scheduler step by step: the test says who gets how many tokens, and when pages move."""

    def __init__(self, executor: TorchExecutor, seed: int = 0) -> None:
        self.executor = executor
        group = executor.store.group
        self.tokens_per_page, self.units = group.tokens_per_page, group.page_units
        self.live: dict[str, Live] = {}
        rng = random.Random(seed)
        self._free = rng.sample(range(executor.store.num_pages), executor.store.num_pages)
        self._host_free = rng.sample(range(executor.store.host_pages), executor.store.host_pages)
        self._refs = [0] * executor.store.num_pages
        self._next = SchedulerOutput(0)

    def add(self, seq: str, prompt: Sequence[int], params: SamplingParams = GREEDY, seed: int = 0) -> None:
        self.live[seq] = Live(list(prompt), len(prompt), params, seed)

    def finish(self, seq: str) -> list[int]:
        live = self.live.pop(seq)
        self._release(live)
        self._next.finished.append(seq)
        return live.output

    def preempt(self, seq: str, told_as: str = "preempted") -> None:
        """Drop its pages; it starts again from nothing, tokens and all."""
        live = self.live[seq]
        self._release(live)
        live.computed = live.sent = 0
        getattr(self._next, told_as).append(seq)

    def swap_out(self, seq: str) -> None:
        live = self.live[seq]
        live.host = [self._host_free.pop() for _ in live.pages]
        self._next.swap_out += self._copies(live.pages, live.host)
        self._next.preempted.append(seq)
        self._release(live)
        live.sent = 0

    def swap_in(self, seq: str) -> None:
        live = self.live[seq]
        live.pages = [self._take() for _ in live.host]
        self._next.swap_in += self._copies(live.host, live.pages)
        self._host_free += live.host

    def fork(self, parent: str, child: str, params: SamplingParams, seed: int, shared: int) -> None:
        """A child that shares the pages of the parent's first `shared` tokens until one of them writes."""
        source = self.live[parent]
        live = self.live[child] = Live(source.tokens[: source.num_prompt], source.num_prompt, params, seed)
        live.computed = shared
        live.pages = source.pages[: -(-shared // self.tokens_per_page)]
        for page in live.pages:
            self._refs[page] += 1

    def step(self, work: Mapping[str, int]) -> StepResult:
        """Give each sequence its tokens; sampled ones are appended. Returns the result."""
        out, self._next = self._next, SchedulerOutput(self._next.step_id + 1)
        for seq, count in work.items():
            self._schedule(out, seq, self.live[seq], count)
        self.executor.submit(out)
        result = self.executor.collect()
        assert result.step_id == out.step_id
        for entry, tokens in zip(out.scheduled, result.tokens, strict=True):
            live = self.live[entry.id]
            live.computed += entry.num_tokens
            live.tokens += tokens
        return result

    def run(self, seqs: Sequence[str], new_tokens: int, chunks: random.Random | None = None) -> None:
        """Steps until each has `new_tokens` output tokens; chunk sizes at random when a generator is given."""
        while True:
            work = {}
            for seq in seqs:
                live = self.live[seq]
                pending = len(live.tokens) - live.computed
                if len(live.output) < new_tokens:
                    work[seq] = pending if chunks is None else chunks.randint(1, min(pending, 7))
            if not work:
                return
            self.step(work)

    def _schedule(self, out: SchedulerOutput, seq: str, live: Live, count: int) -> None:
        end = live.computed + count
        assert 0 < count <= len(live.tokens) - live.computed
        entry = ScheduledRequest(seq, live.computed, count, end == len(live.tokens))
        first, edits = live.computed // self.tokens_per_page, []
        if first < len(live.pages) and self._refs[live.pages[first]] > 1:  # copy before writing
            old, own = live.pages[first], self._take()
            self._refs[old] -= 1
            live.pages[first] = own
            edits.append((0, first, own * self.units))
            out.copies += self._copies([old], [own])
        new_pages = [self._take() for _ in range(-(-end // self.tokens_per_page) - len(live.pages))]
        live.pages += new_pages
        if live.sent == 0:
            table = [page * self.units for page in live.pages]
            out.new.append(
                NewRequest(seq, list(live.tokens), live.num_prompt, live.params, live.seed, [table])
            )
        else:
            entry.new_pages = [[page * self.units for page in new_pages]]
            entry.table_edits = edits
            entry.new_token_ids = live.tokens[live.sent :]
        live.sent = len(live.tokens)
        out.scheduled.append(entry)
        out.num_tokens += count

    def _take(self) -> int:
        page = self._free.pop(0)
        self._refs[page] = 1
        # Whatever was in it must not matter: NaN in every element type.
        store = self.executor.store
        store.arena[page * store.group.page_bytes : (page + 1) * store.group.page_bytes] = 0xFF
        return page

    def _release(self, live: Live) -> None:
        for page in live.pages:
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free.append(page)
        live.pages = []

    def _copies(self, src: Sequence[int], dst: Sequence[int]) -> list[PageCopy]:
        return [PageCopy(a * self.units, b * self.units) for a, b in zip(src, dst, strict=True)]
