"""Speculation in a scheduler's steps: drafts of those that decode, lengths from the controller, and what became of
them. A step's decisions are made first, as without speculation; drafts take what budget and pages are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from llmtool.core.ports import DraftTree, SchedulerOutput, StepResult
from llmtool.core.request import Request
from llmtool.core.speculation.controllers import Controller
from llmtool.core.speculation.draft import (
    MAX_DEPTH,
    MAX_NODES,
    NOTHING,
    Draft,
    Ints,
    Proposer,
    StepRecord,
    StepView,
    leading_matches,
)
from llmtool.core.stats import SpecCounters


class BatchProposer(Protocol):
    """A drafter that is a model: it runs once per depth for a whole batch, and only once lengths are chosen.
    last_seconds: what the last `draft` took, on its own clock."""

    name: str
    last_seconds: float

    def draft(
        self, seqs: Sequence[str], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> list[list[int]]:
        """Up to lengths[i] tokens that may follow tokens[i], all that is known of seqs[i]."""
        ...

    def finish(self, seq: str) -> None:
        """The sequence is over, or has no pages for now. Unknown ones are ignored."""
        ...


@dataclass(slots=True)
class _Planned:
    view: StepView
    decoding: Sequence[int]  # places in out.scheduled
    drafts: list[Draft]  # whole, however much of them is verified
    lengths: Ints  # [B + X] of drafts and branches, as planned
    seconds: float  # that a model drafter took


@dataclass(slots=True)
class _Told:
    """tokens: the sequence's own list, which grows; count: how many of them the proposer has been told."""

    tokens: Sequence[int]
    count: int


class Speculator:
    """proposer: drafts from text, or None. model: drafts from a model for those without such a draft, or None.

    Sequences that ask for a length of their own (SamplingParams.spec) get it, whatever the controller says.
    """

    def __init__(
        self, controller: Controller, proposer: Proposer | None = None, model: BatchProposer | None = None
    ) -> None:
        assert proposer is not None or model is not None
        self.controller = controller
        self._proposer = proposer
        self._model = model
        self._told: dict[str, _Told] = {}
        self._sources: dict[str, int] = {}
        self._planned: dict[int, _Planned] = {}
        self._counters = SpecCounters()
        self._accepted_at = np.zeros(MAX_DEPTH, np.int64)

    def plan(
        self, out: SchedulerOutput, decoding: Sequence[int], work: Sequence[Request], room: int
    ) -> Sequence[Sequence[int] | DraftTree]:
        requests = [work[i] for i in decoding]
        limits = [_limit(request) for request in requests]
        drafts = [
            NOTHING if limit <= 0 else self._propose(request, limit)
            for request, limit in zip(requests, limits, strict=True)
        ]
        modelled = False
        if self._model is not None:
            drafts, modelled = self._with_model(drafts, limits)
        own = [request.params.spec for request in requests]
        if any(draft.branches for draft in drafts):
            trees = not modelled and all(entry.num_tokens <= MAX_NODES for entry in out.scheduled)
            drafts = [
                draft if trees and k is None else replace(draft, branches=())
                for draft, k in zip(drafts, own, strict=True)
            ]
        free = np.array(
            [len(d.tokens) if k is None else 0 for d, k in zip(drafts, own, strict=True)], np.int64
        )
        view = StepView(
            matches=np.array([draft.match for draft in drafts], np.int64),
            limits=np.minimum(free, MAX_DEPTH),
            sources=np.array([self._number(draft.source) for draft in drafts], np.int64),
            kv_tokens=sum(entry.start + entry.num_tokens for entry in out.scheduled),
            prefill_tokens=out.num_tokens - len(decoding),
            modelled=modelled,
        )
        if any(draft.branches for draft in drafts):
            view = self._with_branches(view, drafts)
        lengths = self._lengths(view)
        for i, k in enumerate(own):
            if k is not None:
                lengths[i] = min(k, len(drafts[i].tokens))
        _cut(lengths, room)
        if len(view.on):
            _cut_trees(lengths, view, [_left(request) for request in requests])
        seconds = 0.0
        if modelled:
            seconds = self._run_model(requests, drafts, lengths)
            view = replace(view, limits=np.array([len(draft.tokens) for draft in drafts], np.int64))
        self._planned[out.step_id] = _Planned(view, decoding, drafts, lengths, seconds)
        if not len(view.on):
            return [draft.tokens[:k] for draft, k in zip(drafts, lengths.tolist(), strict=True)]
        return [
            DraftTree(*draft.flatten(part)) if any(part[1:]) else draft.tokens[: part[0]]
            for draft, part in zip(drafts, _by_draft(drafts, lengths), strict=True)
        ]

    def _with_branches(self, view: StepView, drafts: Sequence[Draft]) -> StepView:
        """Rows for the branches after those of the drafts. Of a source, branches count as another."""
        size = view.batch
        on: list[int] = []
        rows: list[tuple[int, int, int, int]] = []
        for i, draft in enumerate(drafts):
            first = size + len(on)
            for branch in draft.branches:
                on.append(first + branch.on - 1 if branch.on else i)
                source, limit = (
                    self._number(f"{draft.source}, other ways"),
                    min(len(branch.tokens), MAX_DEPTH),
                )
                rows.append((branch.match, limit, source, branch.at))
        matches, limits, sources, at = np.array(rows, np.int64).T
        return replace(
            view,
            matches=np.append(view.matches, matches),
            limits=np.append(view.limits, limits),
            sources=np.append(view.sources, sources),
            on=np.array(on, np.int64),
            at=at,
        )

    def _lengths(self, view: StepView) -> Ints:
        """[B + X] as the controller plans. One that knows no trees plans the drafts, and every branch goes as far
        from the root as its draft does: a static tree."""
        if not len(view.on):
            return self.controller.plan(view)
        if self.controller.trees:
            return self.controller.plan(view)
        drafts = self.controller.plan(view.chains())
        lengths = np.append(drafts, np.zeros(len(view.on), np.int64))
        reach, roots = (
            drafts.tolist(),
            [0] * view.batch,
        )  # how far a row goes from the root, and where it begins
        for i, (on, at) in enumerate(zip(view.on.tolist(), view.at.tolist(), strict=True), view.batch):
            roots.append(roots[on] + at)
            reach.append(reach[on])
            if at <= lengths[on]:
                lengths[i] = max(0, min(int(view.limits[i]), reach[i] - roots[i]))
        return lengths

    def _propose(self, request: Request, limit: int) -> Draft:
        proposer = self._proposer
        if proposer is None:
            return NOTHING
        told, tokens = self._told.get(request.id), request.token_ids
        if told is None:
            proposer.begin(request.id, tokens, request.cache_salt)
            self._told[request.id] = _Told(tokens, len(tokens))
        elif told.count < len(tokens):
            proposer.observe(request.id, tokens[told.count :])
            told.count = len(tokens)
        return proposer.propose(request.id, limit)

    def _with_model(self, drafts: list[Draft], limits: list[int]) -> tuple[list[Draft], bool]:
        """Sequences without a draft from text get a promise of one from the model: its tokens come later."""
        assert self._model is not None
        out, modelled = [], False
        for draft, limit in zip(drafts, limits, strict=True):
            if not draft.tokens and limit > 0:
                draft, modelled = Draft((-1,) * limit, self._model.name), True
            out.append(draft)
        return out, modelled

    def _run_model(self, requests: list[Request], drafts: list[Draft], lengths: Ints) -> float:
        """Replace promises by drafts of the lengths that were chosen. Returns the seconds that takes."""
        assert self._model is not None
        name = self._model.name
        promised = [i for i, draft in enumerate(drafts) if draft.source == name]
        at = [i for i in promised if lengths[i] > 0]
        for i in promised:
            drafts[i] = NOTHING
        if not at:
            return 0.0
        tokens = self._model.draft(
            [requests[i].id for i in at], [requests[i].token_ids for i in at], [int(lengths[i]) for i in at]
        )
        for i, given in zip(at, tokens, strict=True):
            drafts[i] = Draft(given, name)
            lengths[i] = min(int(lengths[i]), len(given))
            self._told.setdefault(requests[i].id, _Told(requests[i].token_ids, 0))
        return self._model.last_seconds

    def _number(self, source: str) -> int:
        return self._sources.setdefault(source, len(self._sources)) if source else 0

    def record(self, out: SchedulerOutput, result: StepResult) -> None:
        planned = self._planned.pop(out.step_id, None)
        if planned is None:
            return
        view, size = planned.view, len(planned.decoding)
        lengths, emitted, matched = (np.zeros(len(view.limits), np.int64) for _ in range(3))
        row = size  # of the next branch
        for i, (place, draft) in enumerate(zip(planned.decoding, planned.drafts, strict=True)):
            tokens = result.tokens[place]
            left = len(out.scheduled[place].draft)  # of the planned ones, as far as pages went
            lengths[i] = min(left, int(planned.lengths[i]))
            left -= int(lengths[i])
            emitted[i] = len(tokens)
            matched[i] = leading_matches(draft.tokens, tokens)
            for branch in draft.branches:
                lengths[row] = min(left, int(planned.lengths[row]))
                left -= int(lengths[row])
                path = draft.path(branch.on, branch.at)
                if tokens[: len(path)] == path:
                    emitted[row] = len(tokens) - len(path)
                    matched[row] = leading_matches(branch.tokens, tokens[len(path) :])
                row += 1
        record = StepRecord(planned.view, lengths, emitted, matched, result.seconds + planned.seconds)
        self.controller.record(record)
        drafted = lengths[:size] > 0
        if drafted.any():
            # In a tree, the tokens that were right lie on one path, whichever branches it takes.
            right = np.maximum(emitted[:size] - 1, 0) if len(view.on) else np.minimum(matched, lengths)
            right = np.where(drafted, right, 0)
            counters = self._counters
            counters.drafts += int(drafted.sum())
            counters.draft_tokens += int(lengths.sum())
            counters.accepted_tokens += int(right.sum())
            self._accepted_at += (right[:, None] > np.arange(MAX_DEPTH)[None, :]).sum(axis=0)

    def forget(self, ended: Sequence[str]) -> None:
        for seq in ended:
            told = self._told.pop(seq, None)
            if told is None:
                continue
            if self._proposer is not None:
                if told.count and told.count < len(told.tokens):
                    self._proposer.observe(seq, told.tokens[told.count :])
                self._proposer.finish(seq)
            if self._model is not None:
                self._model.finish(seq)

    def count(self, counters: SpecCounters) -> None:
        own = self._counters
        counters.drafts, counters.draft_tokens = own.drafts, own.draft_tokens
        counters.accepted_tokens = own.accepted_tokens
        counters.accepted_at = tuple(self._accepted_at.tolist())
        counters.explain = self.controller.explain()
        counters.watchdog_trips = int(counters.explain.get("watchdog_trips", 0))


def _limit(request: Request) -> int:
    """Draft tokens that can be of use: with one more token than drafts the sequence is at its end."""
    own = MAX_DEPTH if request.params.spec is None else request.params.spec
    return min(own, _left(request))


def _left(request: Request) -> int:
    """Tokens until the one before its last."""
    return request.max_tokens - request.num_output_tokens - 1


def _cut(lengths: Ints, room: int) -> None:
    """Shorten the longest until at most `room` tokens are left."""
    while int(lengths.sum()) > max(room, 0):
        lengths[int(lengths.argmax())] -= 1


def _cut_trees(lengths: Ints, view: StepView, limits: Sequence[int]) -> None:
    """Leave out branches that leave no token, and of each tree what is more than MAX_NODES or than its limit, [B]:
    it must not be longer than what its sequence may still become."""
    owners = list(range(view.batch))
    left = [min(limit, MAX_NODES) - int(k) for limit, k in zip(limits, lengths[: view.batch], strict=True)]
    for i, (on, at) in enumerate(zip(view.on.tolist(), view.at.tolist(), strict=True), view.batch):
        owner = owners[on]
        owners.append(owner)
        lengths[i] = min(int(lengths[i]), left[owner]) if at <= lengths[on] else 0
        left[owner] -= int(lengths[i])


def _by_draft(drafts: Sequence[Draft], lengths: Ints) -> list[list[int]]:
    """Of each draft its length and those of its branches."""
    rows, at = lengths.tolist(), len(drafts)
    parts = []
    for length, draft in zip(rows, drafts, strict=False):
        parts.append([length, *rows[at : at + len(draft.branches)]])
        at += len(draft.branches)
    return parts
