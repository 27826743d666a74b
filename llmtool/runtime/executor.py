"""The torch executor: one scheduler decision in, one step of a real model run, its tokens out. And how an engine
with it is put together from settings (`build_engine`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from llmtool_kernels.attention import move_tokens

from llmtool.config import EngineConfig, SchedulerConfig
from llmtool.core.memory.geometry import uniform_group
from llmtool.core.memory.model import ModelGeometry
from llmtool.core.memory.select import plan_of
from llmtool.core.memory.tables import PlanPages
from llmtool.core.ports import NewRequest, ScheduledRequest, SchedulerOutput, StepResult
from llmtool.core.request import SamplingParams, TokenLogprob
from llmtool.errors import LLMToolError, ModelError, RequestError
from llmtool.models.cpu_decoder import CpuDecoder
from llmtool.models.decoder import Decoder, KVContext
from llmtool.models.kv_scales import checked
from llmtool.models.loader import load
from llmtool.models.resolve import resolve
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.aot.steps import MAX_TOKENS, Capture, CudaCapture, StepGraphs
from llmtool.runtime.batch import Ints, SequenceTable, StepInputs
from llmtool.runtime.budget import activation_bytes, kv_budget
from llmtool.runtime.device import (
    device_memory,
    host_memory,
    pick_device,
    pick_dtype,
    pick_kv_dtype,
    set_threads,
)
from llmtool.runtime.drafter import make_drafter
from llmtool.runtime.kv_store import KVStore
from llmtool.runtime.logprobs import ROWS_AT_ONCE, token_logprobs
from llmtool.runtime.parts import EngineInfo, EngineParts, Progress
from llmtool.runtime.sampler import GrammarMask, SamplingRows, sample
from llmtool.runtime.structured import GrammarCompiler, accept, grammar_tokenizer, why_stopped
from llmtool.runtime.verify import SampledRows

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(slots=True)
class _Outcome:
    """What a step has produced so far."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


class TorchExecutor:
    """Runs steps on a `Decoder` over a `KVStore`.

    max_num_seqs, max_model_len: sizes of the persistent state. eos_token_ids: what min_tokens holds back.
    grammars: makes the grammar compiler when the first sequence needs it; None refuses grammars. capture: of steps
    ahead of time; None runs all of them eagerly. What a sequence
    does wrong (bad token ids, a grammar that fails, NaN logits) ends that sequence, with an entry in
    StepResult.errors, and nothing else.
    """

    max_in_flight = 1

    def __init__(
        self,
        model: Decoder,
        store: KVStore,
        max_num_seqs: int,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        grammars: Callable[[], GrammarCompiler] | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.model = model
        self.store = store
        self._sequences = SequenceTable(store.groups, max_num_seqs, max_model_len)
        self._sampling = SamplingRows(max_num_seqs, model.spec.vocab_size, eos_token_ids, model.device)
        self._layers, self._states = store.places(), store.states()
        widths = [group.pages(max_model_len) for group in store.groups]
        graphs = (
            None
            if capture is None or self._states  # graphs hold no states
            else StepGraphs(model, store.arena, self._layers, widths, max_num_seqs, capture)
        )
        self._graphs = graphs
        self._make_compiler = grammars
        self._compiler: GrammarCompiler | None = None
        self._matchers: dict[int, LLMatcher] = {}  # row -> its grammar's state
        self._logprobs: dict[int, int] = {}  # row -> how many of the best tokens to list
        self._prompt_logprobs: dict[int, int] = {}  # the same, for rows whose prompt is asked about
        self._failed: dict[str, str] = {}  # sequences that could not be taken in, until they are forgotten
        self._results: deque[StepResult] = deque()

    # -- the port ------------------------------------------------------------------------------------------

    def submit(self, out: SchedulerOutput) -> None:
        started = time.perf_counter()
        with torch.inference_mode():
            result = self._run(out)
        result.seconds = time.perf_counter() - started
        self._results.append(result)

    def collect(self) -> StepResult:
        return self._results.popleft()

    def warmup(self) -> None:
        """Run a page of prompt and one decoding step, so that the first request finds libraries loaded and
        buffers allocated. Before any request only: it writes page 0."""
        groups = self.store.groups
        n = min(*(group.tokens_per_page for group in groups), self._sequences.tokens.shape[1])
        new = NewRequest("warmup", [0] * n, n, SamplingParams(temperature=0), 0, [[0] for _ in groups])
        for entry in (ScheduledRequest("warmup", 0, n, False), ScheduledRequest("warmup", n - 1, 1, True)):
            self.submit(SchedulerOutput(-1, new=[new], scheduled=[entry], num_tokens=entry.num_tokens))
        self.submit(SchedulerOutput(-1, finished=["warmup"]))
        self._results.clear()

    def prepare_grammars(self) -> None:
        """Make the grammar compiler ahead of the first sequence that needs it, which would hold up a step by it."""
        if self._compiler is None and self._make_compiler is not None:
            with suppress(ModelError):  # a tokenizer that llguidance cannot read: for who asks for a grammar
                self._compiler = self._make_compiler()

    def read_pages(self, entries: Sequence[Sequence[int]]) -> bytes:
        with torch.inference_mode():
            return self.store.read(entries)

    # -- a step --------------------------------------------------------------------------------------------

    def _run(self, out: SchedulerOutput) -> StepResult:
        # A preempted sequence comes back as a new one, tokens and all.
        for seq in (*out.finished, *out.preempted):
            self._forget(seq)
        self.store.swap_out(out.swap_out)
        self.store.swap_in(out.swap_in)
        self.store.copy(out.copies)
        for new in out.new:
            self._add(new)
        for moved in out.received:
            try:
                self.store.write(moved.entries, moved.kv)
            except ValueError as error:
                self._failed[moved.id] = str(error)
        outcome = _Outcome()
        self._note_tokens(out.scheduled, outcome)
        if out.scheduled:
            self._execute(out.scheduled, outcome)
        tokens = [outcome.tokens.get(e.id, []) for e in out.scheduled]
        return StepResult(out.step_id, tokens, outcome.logprobs, outcome.prompt_logprobs, outcome.errors)

    def _add(self, new: NewRequest) -> None:
        self._forget(new.id)
        # Even a sequence that fails computes its KV: others may have found its pages in the prefix cache already.
        matcher, problem = None, self._wrong_token(new.token_ids)
        if problem:
            new = replace(new, token_ids=[0] * len(new.token_ids))
        else:
            try:
                matcher = self._matcher(new)
            except LLMToolError as error:
                problem = error.message
        row = self._sequences.add(new)
        if problem:
            self._failed[new.id] = problem
            return
        params = new.params
        if self._sequences.capacity > len(self._sampling.features):
            self._sampling.grow(self._sequences.capacity)
        prompt, output = new.token_ids[: new.num_prompt_tokens], new.token_ids[new.num_prompt_tokens :]
        self._sampling.add(row, params, new.seed, prompt, output)
        if matcher is not None:
            self._matchers[row] = matcher
        wanted = -1 if params.logprobs is None else params.logprobs
        if params.beam is not None:
            wanted = max(wanted, params.beam.candidates)
        if wanted >= 0:
            self._logprobs[row] = wanted
        if params.prompt_logprobs is not None and not output:  # a resumed sequence has delivered them
            self._prompt_logprobs[row] = params.prompt_logprobs

    def _forget(self, seq: str) -> None:
        self._failed.pop(seq, None)
        row = self._sequences.remove(seq)
        if row is not None:
            self._sampling.remove(row)
            for table in (self._matchers, self._logprobs, self._prompt_logprobs):
                table.pop(row, None)

    def _note_tokens(self, scheduled: Sequence[ScheduledRequest], outcome: _Outcome) -> None:
        """Apply the deltas to penalties and grammars; sequences that fail by it go to the errors."""
        for entry in scheduled:
            problem = self._failed.get(entry.id, "")
            if not problem and entry.new_token_ids:
                row = self._sequences.row_of[entry.id]
                self._sampling.append(row, entry.new_token_ids)
                if row in self._matchers:
                    problem = accept(self._matchers[row], entry.new_token_ids)
            if problem:
                outcome.errors[entry.id] = problem

    def _execute(self, scheduled: list[ScheduledRequest], outcome: _Outcome) -> None:
        rows = self._sequences.apply(scheduled)
        inputs = self._sequences.inputs(scheduled, rows, self.model.device)
        which = np.flatnonzero([e.sample and e.id not in outcome.errors for e in scheduled])
        sampled = [scheduled[i] for i in which]
        places = SampledRows.of([e.draft for e in sampled], rows[which], [e.parents for e in sampled])
        last = places.spread(inputs.ends[which] - places.drafted) + places.offsets - 1
        wanted = torch.from_numpy(last).to(self.model.device)
        if self._graphs is None and not self._prompt_logprobs and len(last) < len(inputs.input_ids):
            kv = KVContext(self.store.arena, self._layers, inputs.batches, self._states)
            hidden = self.model.forward(inputs.input_ids, inputs.positions, kv, wanted)  # [S, hidden]
        else:
            every = self._forward(inputs)  # [N, hidden]
            if self._prompt_logprobs:
                self._score_prompts(scheduled, inputs, every, outcome)
            hidden = every[wanted]
        if sampled:
            known = (inputs.starts + inputs.lengths)[which] - places.drafted
            logits = self.model.logits(hidden)  # [S, V]
            self._sample(sampled, places, places.spread(known) + places.depths, logits, outcome)

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        if self._graphs is not None and not inputs.trees:
            return self._graphs.forward(inputs)
        kv = KVContext(self.store.arena, self._layers, inputs.batches, self._states)
        return self.model.forward(inputs.input_ids, inputs.positions, kv)

    def _sample(
        self,
        sampled_of: list[ScheduledRequest],
        places: SampledRows,
        positions: Ints,
        logits: torch.Tensor,
        outcome: _Outcome,
    ) -> None:
        rows, ids = places.rows, [entry.id for entry in sampled_of]
        mask, broken = self._grammar_mask(places)
        num_outputs = self._sequences.num_tokens[rows] - self._sequences.num_prompt[rows] + places.depths
        sampled, peaks = sample(logits, self._sampling, rows, positions, num_outputs, mask, places.ahead())
        for i in torch.nonzero(~torch.isfinite(peaks)).flatten().tolist():
            broken.setdefault(i, _why_not(peaks[i].item(), int(positions[i])))
        kept: list[int] = []
        for entry, (path, tokens) in zip(sampled_of, places.accepted(sampled.tolist(), broken), strict=True):
            if tokens:
                outcome.tokens[entry.id] = tokens
                kept += path
            else:
                outcome.errors[entry.id] = broken[path[0]]
            if entry.parents:
                self._settle(entry, np.array(path) - path[0])
        if not self._logprobs:
            return
        asked = [i for i in kept if int(rows[i]) in self._logprobs]
        at = torch.tensor(asked, dtype=torch.int64, device=logits.device)
        counts = [self._logprobs[int(rows[i])] for i in asked]
        for i, logprob in zip(asked, token_logprobs(logits[at], sampled[at], counts), strict=True):
            outcome.logprobs.setdefault(ids[places.owners[i]], []).append(logprob)

    def _settle(self, entry: ScheduledRequest, path: Ints) -> None:
        """Move the KV of a tree's right drafts behind the token before them. path: their numbers in the sequence's
        rows of the step, from the root, 0."""
        moved = np.flatnonzero(path != np.arange(len(path)))
        if not len(moved):
            return
        row = self._sequences.row_of[entry.id]
        source, target = entry.start + path[moved], entry.start + moved
        places = self._sequences.places
        by_group = [(*places(g, row, source), *places(g, row, target)) for g in range(len(self.store.groups))]
        tiled = self.model.tiled if isinstance(self.model, CpuDecoder) else frozenset[int]()
        for layer, (layout, g) in self._layers.items():
            at = (torch.from_numpy(a).to(self.store.device) for a in by_group[g])
            move_tokens(self.store.arena, layout, layout.element(self.model.dtype), layer in tiled, *at)

    def _score_prompts(
        self, scheduled: list[ScheduledRequest], inputs: StepInputs, hidden: torch.Tensor, outcome: _Outcome
    ) -> None:
        """Log-probabilities of the prompt tokens that this step's positions predict."""
        for row, entry, end in zip(inputs.rows.tolist(), scheduled, inputs.ends.tolist(), strict=True):
            if row not in self._prompt_logprobs:
                continue
            count = self._prompt_logprobs[row]
            num_prompt = int(self._sequences.num_prompt[row])
            computed = entry.start + entry.num_tokens
            targets = self._sequences.tokens[row, entry.start + 1 : min(computed + 1, num_prompt)]
            begin = end - entry.num_tokens
            scores: list[TokenLogprob] = []
            for at in range(0, len(targets), ROWS_AT_ONCE):
                part = torch.from_numpy(targets[at : at + ROWS_AT_ONCE].astype(np.int64)).to(hidden.device)
                logits = self.model.logits(hidden[begin + at : begin + at + len(part)])
                scores += token_logprobs(logits, part, [count] * len(part))
            if scores:
                outcome.prompt_logprobs[entry.id] = scores
            if computed >= num_prompt - 1:
                del self._prompt_logprobs[row]

    # -- grammars ------------------------------------------------------------------------------------------

    def _matcher(self, new: NewRequest) -> LLMatcher | None:
        """The state of a sequence's grammar after its output so far."""
        if new.params.grammar is None:
            return None
        if self._make_compiler is None:
            raise RequestError("This engine has no tokenizer, which structured output needs.")
        if self._compiler is None:
            self._compiler = self._make_compiler()
        return self._compiler.matcher(new.params.grammar, new.token_ids[new.num_prompt_tokens :])

    def _grammar_mask(self, places: SampledRows) -> tuple[GrammarMask | None, dict[int, str]]:
        """The mask of those of the rows that have a grammar, and which of them failed, by index into rows."""
        if not self._matchers:
            return None, {}
        at: list[int] = []
        matchers: list[LLMatcher] = []
        of_row: dict[int, LLMatcher] = {}
        for i, row in enumerate(places.rows.tolist()):
            matcher = self._matchers.get(row)
            if matcher is None:
                continue
            offset = int(places.offsets[i])
            if (
                offset
            ):  # as if the drafts before it were its output; where one is not allowed, the rest is idle
                owner = int(places.owners[i])
                matcher = of_row[i - offset + places.before(owner, offset)].deep_copy()
                accept(matcher, places.drafts[owner][offset - 1 : offset])
            at.append(i)
            matchers.append(matcher)
            of_row[i] = matcher
        if not at:
            return None, {}
        assert self._compiler is not None
        words = self._compiler.words(matchers)
        broken = {i: why_stopped(m) for i, m in zip(at, matchers, strict=True) if m.is_error()}
        return GrammarMask(np.array(at, np.int64), words), broken

    def _wrong_token(self, tokens: Sequence[int]) -> str:
        vocab_size = self.model.spec.vocab_size
        low, high = min(tokens), max(tokens)
        if low >= 0 and high < vocab_size:
            return ""
        return f"Token id {low if low < 0 else high} is not in the model's vocabulary of {vocab_size}."


def _why_not(peak: float, position: int) -> str:
    if peak == -np.inf:
        return f"No token is left to choose from at position {position}: everything is forbidden."
    return f"The model's logits at position {position} are not numbers (NaN or infinite)."


def build_engine(config: EngineConfig, progress: Progress) -> EngineParts:
    """Load the model of `config`, size its KV memory from what is then free, and warm up.

    Raises ModelError, UsageError, or InfeasibleError when the model's pages do not fit.
    """
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    kv_dtype = pick_kv_dtype(config.kv_cache_dtype, device)
    num_threads = set_threads(config.num_threads)
    progress("Finding the model", 0.0)
    directory = resolve(config.model, config.revision, _fraction(progress, "Converting the model"))
    loading = _fraction(progress, "Loading weights")
    model = load(
        directory,
        dtype,
        device,
        loading,
        config.load_format,
        config.seed,
        config.max_model_len,
        config.quantization,
    )
    spec = model.spec
    tokenizer_dir = directory if config.tokenizer is None else _tokenizer_dir(config)
    drafter = make_drafter(config, model, tokenizer_dir)  # its memory is taken before the pages are counted
    caches = spec.layer_cache_specs((kv_dtype or dtype).itemsize, dtype.itemsize)
    group = uniform_group(caches, config.block_size)
    plan = plan_of(ModelGeometry(spec.family, tuple(caches)), config.block_size, config.kv_page_plan)
    limits = config.scheduler(1)
    sizes = group if plan is None else PlanPages(plan, limits.max_num_batched_tokens)
    activations = activation_bytes(spec, dtype.itemsize, limits.max_num_batched_tokens, limits.max_num_seqs)
    memory, on_cpu = device_memory(device), device.type == "cpu"
    # On a CPU a step is one call into a list of operations already (llmtool/models/cpu_decoder.py).
    captures = device.type == "cuda" and not config.enforce_eager
    captured = min(MAX_TOKENS, limits.max_num_batched_tokens) if captures else 0
    aot_bytes = activation_bytes(spec, dtype.itemsize, captured, 0) if captures else 0
    activations += aot_bytes
    budget = kv_budget(config, sizes, spec.max_positions, memory, activations, on_cpu, host_memory().free)
    # Most config.json name the end of sequence; without it, only the tokenizer knows.
    eos = spec.eos_ids or tuple(i for i in [Tokenizer.from_dir(tokenizer_dir).eos_id] if i is not None)

    def grammars() -> GrammarCompiler:
        text = Tokenizer.from_dir(tokenizer_dir).backend.to_str()
        return GrammarCompiler(grammar_tokenizer(text, spec.vocab_size, eos))

    scales = None if kv_dtype is None else checked(model.kv_scales)
    groups = (group,) if plan is None else plan.groups
    store = KVStore(groups, budget.num_pages, budget.host_pages, device, kv_dtype, scales, sizes.page_bytes)
    capture = CudaCapture(device) if captures else None
    executor = TorchExecutor(model, store, config.max_num_seqs, budget.max_model_len, eos, grammars, capture)
    progress("Warming up", 1.0)
    executor.warmup()
    scheduler = config.scheduler(budget.max_model_len)
    info = _describe(
        config, executor, scheduler, str(tokenizer_dir), eos, activations, num_threads, aot_bytes
    )
    return EngineParts(
        executor,
        plan or group,
        budget.num_pages,
        budget.host_pages,
        scheduler,
        info,
        executor.prepare_grammars,
        drafter,
    )


def _describe(
    config: EngineConfig,
    executor: TorchExecutor,
    scheduler: SchedulerConfig,
    tokenizer_dir: str,
    eos_token_ids: tuple[int, ...],
    activations: int,
    num_threads: int,
    aot_bytes: int,
) -> EngineInfo:
    model, store = executor.model, executor.store
    return EngineInfo(
        model=config.model,
        served_model_name=config.served_model_name or config.model,
        tokenizer_dir=tokenizer_dir,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=scheduler.max_model_len,
        vocab_size=model.spec.vocab_size,
        eos_token_ids=eos_token_ids,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_waiting=scheduler.max_waiting,
        num_pages=store.num_pages,
        tokens_per_page=store.group.tokens_per_page,
        page_bytes=store.page_bytes,
        host_pages=store.host_pages,
        num_parameters=model.spec.num_parameters,
        weight_bytes=model.weight_bytes,
        activation_bytes=activations,
        num_threads=num_threads,
        kv_cache_dtype=str(store.dtype or model.dtype).removeprefix("torch."),
        aot_bytes=aot_bytes,
        large_pages=len(store.groups) > 1 or store.page_bytes > store.group.page_bytes,
    )


def _tokenizer_dir(config: EngineConfig) -> Path:
    """A tokenizer of its own: a directory needs no model in it."""
    assert config.tokenizer is not None
    path = Path(config.tokenizer).expanduser()
    return path if path.is_dir() else resolve(config.tokenizer, config.revision)


def _fraction(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done / total if total else 1.0)
