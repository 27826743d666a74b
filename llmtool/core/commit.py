"""What a step's result means for its sequences: tokens appended, ends noticed, beams selected."""

from __future__ import annotations

from collections.abc import Sequence

from llmtool.core.admission import Admission
from llmtool.core.beam import BeamSearch
from llmtool.core.memory.allocator import Handover
from llmtool.core.ports import SchedulerOutput, StepResult
from llmtool.core.request import (
    FinishReason,
    Request,
    RequestStatus,
    RequestTimes,
    SequenceOutput,
    TokenLogprob,
)
from llmtool.core.roster import Roster


class Committer:
    """Applies results, and aborts, to the roster's sequences."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def commit(
        self, out: SchedulerOutput, work: Sequence[Request], result: StepResult, now: float
    ) -> list[SequenceOutput]:
        """work: the sequences of `out.scheduled`, in its order."""
        roster, logprobs = self._roster, result.logprobs
        outputs: list[SequenceOutput] = []
        ended = False
        for entry, request, tokens in zip(out.scheduled, work, result.tokens, strict=True):
            request.in_flight -= 1
            if request.status == RequestStatus.FINISHED:
                continue
            request.num_computed = entry.start + entry.num_tokens - len(entry.draft)
            if request.id in result.errors:
                outputs.extend(self.end(request, FinishReason.ERROR, now, result.errors[request.id]))
                ended = True
                continue
            if len(request.token_ids) == request.num_prompt_tokens:
                self._prompt_progress(request, result)
            if not tokens or request.num_computed != len(request.token_ids):
                continue  # a prompt chunk, or a beam that has moved on meanwhile
            given = logprobs.get(request.id, ()) if logprobs else ()
            search = roster.beams.get(request.group) if roster.beams else None
            if search is not None:
                if search.report(request, given[0]):
                    outputs.extend(self._select_beams(search, now))
                    ended = True
                continue
            output = self._append(request, tokens, given, now)
            outputs.append(output)
            ended = ended or output.finish_reason is not None
            if entry.draft and output.finish_reason is None:
                self._roll_back(request, len(entry.draft), len(tokens) - 1)
        if ended:
            roster.sweep()
        roster.stats.steps += 1
        return outputs

    def _prompt_progress(self, request: Request, result: StepResult) -> None:
        if request.id in result.prompt_logprobs:
            request.prompt_logprobs.extend(result.prompt_logprobs[request.id])
        if request.id in self._roster.children and request.num_computed >= request.num_prompt_tokens:
            self._roster.release_children(request)

    def _append(
        self, request: Request, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], now: float
    ) -> SequenceOutput:
        """New tokens of one sequence, up to where it ends."""
        output = SequenceOutput(request.group, request.index, tokens, logprobs)
        if len(request.token_ids) == request.num_prompt_tokens:
            self._first_token(request, output, now)
        for position, token in enumerate(tokens):
            request.token_ids.append(token)
            if logprobs:
                request.cumulative_logprob += logprobs[position].logprob
            made = len(request.token_ids) - request.num_prompt_tokens
            reason = None
            if token in request.stop_tokens and (made >= request.params.min_tokens or request.params.grammar):
                # A grammar that is complete allows nothing but an end, whatever min_tokens asks.
                reason, request.stopped_by = FinishReason.STOP, token
            elif made >= request.max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                if request.handoff and reason is FinishReason.LENGTH:
                    allocator = self._roster.allocator
                    assert isinstance(allocator, Handover)
                    entries = allocator.lent(request.id, request.num_prompt_tokens)
                    self._roster.handed.append((request.id, entries))
                output.token_ids = tokens[: position + 1]
                output.logprobs = logprobs[: position + 1]
                self._end(request, reason, now, output)
                break
        self._roster.stats.generation_tokens += len(output.token_ids)
        return output

    def _roll_back(self, request: Request, drafted: int, accepted: int) -> None:
        """Drafts that were right are computed already; what the others wrote is given up, and their pages."""
        request.num_submitted = request.num_computed = request.num_computed + accepted
        if accepted < drafted:
            request.kept_pages = self._roster.allocator.truncate(request.id, request.num_computed)

    def _first_token(self, request: Request, output: SequenceOutput, now: float) -> None:
        request.first_token = now
        output.num_prompt_tokens = request.num_prompt_tokens
        output.num_cached_tokens = request.num_cached
        if request.index == 0:
            self._roster.stats.prompt_tokens += request.num_prompt_tokens
        if request.params.prompt_logprobs is not None and request.index == 0:
            output.prompt_logprobs = [None, *request.prompt_logprobs]

    # -- beams ---------------------------------------------------------------------------------------------

    def _select_beams(self, search: BeamSearch, now: float) -> list[SequenceOutput]:
        """Every beam has reported: fork the survivors, end the others, or end the search."""
        roster, root = self._roster, search.root
        selected = search.select()
        if root.first_token < 0:
            root.first_token = now
            roster.stats.prompt_tokens += root.num_prompt_tokens
        if not selected:
            return self._end_beams(search, now)
        survivors: list[Request] = []
        kept: set[str] = set()
        for continuation in selected:  # fork first: sources must not have grown yet
            source = continuation.source
            survivors.append(self._fork_beam(search, source) if source.id in kept else source)
            kept.add(source.id)
        for beam in search.live:
            if beam.id not in kept:
                roster.retire(beam)
        for request, continuation in zip(survivors, selected, strict=True):
            request.token_ids.append(continuation.token)
            request.cumulative_logprob = continuation.cumulative_logprob
            roster.unpark(request)
        search.live = survivors
        roster.groups[root.group] = list(survivors)
        return []

    def _fork_beam(self, search: BeamSearch, source: Request) -> Request:
        child = Admission.child(source, search.next_index)
        search.next_index += 1
        if source.status == RequestStatus.RUNNING:
            self._roster.allocator.fork(source.id, child.id, child.token_ids, source.num_submitted)
            child.num_submitted = child.num_computed = source.num_submitted
            self._roster.join(child)
        else:  # its pages are gone: the child computes its tokens anew
            child.status, child.num_preemptions = RequestStatus.PREEMPTED, 1
            self._roster.waiting.push(child)
        return child

    def _end_beams(self, search: BeamSearch, now: float) -> list[SequenceOutput]:
        root = search.root
        outputs = []
        for index, hypothesis in enumerate(search.finished[: root.params.n]):
            output = SequenceOutput(root.group, index, hypothesis.token_ids)
            self._describe(root, hypothesis.reason, now, output)
            output.cumulative_logprob = hypothesis.cumulative_logprob
            self._roster.stats.generation_tokens += len(hypothesis.token_ids)
            outputs.append(output)
        for beam in search.live:
            self._roster.retire(beam)
        self._roster.groups[root.group] = []
        return outputs

    # -- ends ----------------------------------------------------------------------------------------------

    def end(
        self, request: Request, reason: FinishReason, now: float, error: str | None = None
    ) -> list[SequenceOutput]:
        """End a sequence from outside: abort or error. A beam search ends as a whole, with all its answers."""
        search = self._roster.beams.get(request.group)
        answers = [request.index] if search is None else range(request.params.n)
        outputs = [SequenceOutput(request.group, index, (), error=error) for index in answers]
        for output in outputs:
            self._end(request, reason, now, output)
        for beam in () if search is None else search.live:
            beam.finish_reason = reason
            self._roster.retire(beam)
        return outputs

    def _end(self, request: Request, reason: FinishReason, now: float, output: SequenceOutput) -> None:
        request.finish_reason = reason
        self._describe(request, reason, now, output)
        self._roster.retire(request)

    def _describe(self, request: Request, reason: FinishReason, now: float, output: SequenceOutput) -> None:
        """Fill in what the last output of an answer carries."""
        output.finish_reason, output.stop_token = reason, request.stopped_by
        output.num_prompt_tokens, output.num_cached_tokens = request.num_prompt_tokens, request.num_cached
        output.cumulative_logprob = request.cumulative_logprob
        output.times = RequestTimes(request.arrival, request.first_scheduled, request.first_token, now)
        finished = self._roster.stats.finished
        finished[reason.value] = finished.get(reason.value, 0) + 1
