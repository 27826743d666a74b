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


@dataclass(frozen=True, slots=True)
class _PromptPart:
    """Prompt tokens of a sequence that are scored: their ids [n], the rows [n] before them, how many of the best to
    list."""

    id: str
    count: int
    targets: Ints
    rows: Ints


@dataclass(frozen=True, slots=True)
class _Sampled:
    """Sequences that are sampled: their drafts, the rows [S] of the step, the positions [S] and numbers [S] of the
    tokens to come."""

    entries: list[ScheduledRequest]
    places: SampledRows
    rows: Ints
    positions: Ints
    num_outputs: Ints


@dataclass(slots=True)
class _Step:
    """A step that is computed and not yet sampled. hidden: [R, hidden] of the rows that are wanted, None where
    another rank has it."""

    out: SchedulerOutput
    outcome: _Outcome
    started: float
    prompts: list[_PromptPart] = field(default_factory=list)
    sampled: _Sampled | None = None
    hidden: torch.Tensor | None = None

    @property
    def wanted(self) -> list[Ints]:
        """Rows whose logits are asked for, chunk by chunk, in the order in which they are."""
        return [part.rows for part in self.prompts] + ([self.sampled.rows] if self.sampled else [])


def wanted_rows(chunks: Sequence[Ints]) -> Ints:
    """All of them, chunk after chunk."""
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


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
        self.plan_groups = store.groups  # the tables that decisions name
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
        self._begun: deque[_Step] = deque()
        self._finished = 0.0  # when the last step was

    # -- the port ------------------------------------------------------------------------------------------

    def submit(self, out: SchedulerOutput) -> None:
        with torch.inference_mode():
            self._begun.append(self._begin(out))

    def collect(self) -> StepResult:
        step = self._begun.popleft()
        with torch.inference_mode():
            result = self._finish(step)
        # With several steps in flight a step takes as long as the one before it is gone.
        now = time.perf_counter()
        result.seconds = now - max(step.started, self._finished)
        self._finished = now
        return result

    def warmup(self) -> None:
        """Run a page of prompt and one decoding step, so that the first request finds libraries loaded and
        buffers allocated. Before any request only: it writes page 0."""
        groups = self.plan_groups
        n = min(*(group.tokens_per_page for group in groups), self._sequences.tokens.shape[1])
        new = NewRequest("warmup", [0] * n, n, SamplingParams(temperature=0), 0, [[0] for _ in groups])
        for entry in (ScheduledRequest("warmup", 0, n, False), ScheduledRequest("warmup", n - 1, 1, True)):
            self.submit(SchedulerOutput(-1, new=[new], scheduled=[entry], num_tokens=entry.num_tokens))
            self.collect()
        self.submit(SchedulerOutput(-1, finished=["warmup"]))
        self.collect()

    def prepare_grammars(self) -> None:
        """Make the grammar compiler ahead of the first sequence that needs it, which would hold up a step by it."""
        if self._compiler is None and self._make_compiler is not None:
            with suppress(ModelError):  # a tokenizer that llguidance cannot read: for who asks for a grammar
                self._compiler = self._make_compiler()

    def read_pages(self, entries: Sequence[Sequence[int]]) -> bytes:
        with torch.inference_mode():
            return self.store.read(entries)

    # -- a step --------------------------------------------------------------------------------------------

    def _begin(self, out: SchedulerOutput) -> _Step:
        """Apply a decision and compute the step's hidden states."""
        step = _Step(out, _Outcome(), time.perf_counter())
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
        self._note_tokens(out.scheduled, step.outcome)
        if out.scheduled:
            self._execute(step)
        return step

    def _finish(self, step: _Step) -> StepResult:
        """Score and sample what `_begin` has computed."""
        out, outcome, at = step.out, step.outcome, 0
        for part in step.prompts:
            logits, count = self._logits(step.hidden, at, len(part.rows)), len(part.rows)
            targets = torch.from_numpy(part.targets).to(logits.device)
            scores = token_logprobs(logits, targets, [part.count] * count)
            outcome.prompt_logprobs[part.id] = [*outcome.prompt_logprobs.get(part.id, []), *scores]
            at += count
        if step.sampled is not None:
            logits = self._logits(step.hidden, at, len(step.sampled.rows))
            self._sample(step.sampled, logits, outcome)
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

    def _execute(self, step: _Step) -> None:
        scheduled = step.out.scheduled
        rows = self._sequences.apply(scheduled)
        inputs = self._sequences.inputs(scheduled, rows, self.model.device)
        if self._prompt_logprobs:
            step.prompts = self._prompt_parts(scheduled, inputs)
        which = np.flatnonzero([e.sample and e.id not in step.outcome.errors for e in scheduled])
        if len(which):
            sampled = [scheduled[i] for i in which]
            places = SampledRows.of([e.draft for e in sampled], rows[which], [e.parents for e in sampled])
            last = places.spread(inputs.ends[which] - places.drafted) + places.offsets - 1
            known = (inputs.starts + inputs.lengths)[which] - places.drafted
            positions = places.spread(known) + places.depths
            outputs = self._sequences.num_tokens[places.rows] - self._sequences.num_prompt[places.rows]
            step.sampled = _Sampled(sampled, places, last, positions, outputs + places.depths)
        step.hidden = self._forward(step, inputs)

    def _forward(self, step: _Step, inputs: StepInputs) -> torch.Tensor | None:
        """Hidden states [R, hidden] of the rows of `step.wanted`, chunk after chunk; None where another rank has
        them."""
        rows = wanted_rows(step.wanted)
        captured = self._graphs is not None and not inputs.trees
        kv = KVContext(self.store.arena, self._layers, inputs.batches, self._states)
        if not captured and len(rows) < len(inputs.input_ids):
            wanted = torch.from_numpy(rows).to(self.model.device)
            return self.model.forward(inputs.input_ids, inputs.positions, kv, wanted)
        if captured:
            assert self._graphs is not None
            every = self._graphs.forward(inputs)
        else:
            every = self.model.forward(inputs.input_ids, inputs.positions, kv)
        return every[torch.from_numpy(rows).to(every.device)]

    def _logits(self, hidden: torch.Tensor | None, begin: int, count: int) -> torch.Tensor:
        """float32 [count, vocab] of rows of what `_forward` returned; asked for chunk by chunk, in their order."""
        assert hidden is not None
        return self.model.logits(hidden[begin : begin + count])

    def _sample(self, step: _Sampled, logits: torch.Tensor, outcome: _Outcome) -> None:
        places, positions = step.places, step.positions
        rows, ids = places.rows, [entry.id for entry in step.entries]
        mask, broken = self._grammar_mask(places)
        sampled, peaks = sample(
            logits, self._sampling, rows, positions, step.num_outputs, mask, places.ahead()
        )
        for i in torch.nonzero(~torch.isfinite(peaks)).flatten().tolist():
            broken.setdefault(i, _why_not(peaks[i].item(), int(positions[i])))
        kept: list[int] = []
        for entry, (path, tokens) in zip(
            step.entries, places.accepted(sampled.tolist(), broken), strict=True
        ):
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

    def _prompt_parts(self, scheduled: Sequence[ScheduledRequest], inputs: StepInputs) -> list[_PromptPart]:
        """The prompt tokens that this step's positions predict, of sequences that want them scored."""
        parts = []
        for row, entry, end in zip(inputs.rows.tolist(), scheduled, inputs.ends.tolist(), strict=True):
            if row not in self._prompt_logprobs:
                continue
            count = self._prompt_logprobs[row]
            num_prompt = int(self._sequences.num_prompt[row])
            computed = entry.start + entry.num_tokens
            targets = self._sequences.tokens[row, entry.start + 1 : min(computed + 1, num_prompt)]
            begin = end - entry.num_tokens
            for at in range(0, len(targets), ROWS_AT_ONCE):
                part = targets[at : at + ROWS_AT_ONCE].astype(np.int64)
                rows = np.arange(begin + at, begin + at + len(part), dtype=np.int64)
                parts.append(_PromptPart(entry.id, count, part, rows))
            if computed >= num_prompt - 1:
                del self._prompt_logprobs[row]
        return parts

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
    directory = resolve(config.model, config.revision, fraction(progress, "Converting the model"))
    loading = fraction(progress, "Loading weights")
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
    tokenizer_dir = directory if config.tokenizer is None else tokenizer_dir_of(config)
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

    grammars = grammar_factory(tokenizer_dir, spec.vocab_size, eos)
    scales = None if kv_dtype is None else checked(model.kv_scales)
    groups = (group,) if plan is None else plan.groups
    store = KVStore(groups, budget.num_pages, budget.host_pages, device, kv_dtype, scales, sizes.page_bytes)
    capture = CudaCapture(device) if captures else None
    executor = TorchExecutor(model, store, config.max_num_seqs, budget.max_model_len, eos, grammars, capture)
    progress("Warming up", 1.0)
    executor.warmup()
    scheduler = config.scheduler(budget.max_model_len)
    info = describe(config, executor, scheduler, str(tokenizer_dir), eos, activations, num_threads, aot_bytes)
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


def grammar_factory(
    tokenizer_dir: Path, vocab_size: int, eos: tuple[int, ...]
) -> Callable[[], GrammarCompiler]:
    """Makes the compiler of grammars for a tokenizer."""

    def make() -> GrammarCompiler:
        text = Tokenizer.from_dir(tokenizer_dir).backend.to_str()
        return GrammarCompiler(grammar_tokenizer(text, vocab_size, eos))

    return make


def describe(
    config: EngineConfig,
    executor: TorchExecutor,
    scheduler: SchedulerConfig,
    tokenizer_dir: str,
    eos_token_ids: tuple[int, ...],
    activations: int,
    num_threads: int,
    aot_bytes: int,
) -> EngineInfo:
    """What an engine says of itself."""
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


def tokenizer_dir_of(config: EngineConfig) -> Path:
    """A tokenizer of its own: a directory needs no model in it."""
    assert config.tokenizer is not None
    path = Path(config.tokenizer).expanduser()
    return path if path.is_dir() else resolve(config.tokenizer, config.revision)


def fraction(progress: Progress, what: str) -> Callable[[int, int], None]:
    """For who counts bytes."""
    return lambda done, total: progress(what, done / total if total else 1.0)
