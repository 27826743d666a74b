"""The controller that is never worse than off: draft tokens are verified while they pay, and are watched.

Goodput in the long run is a ratio of sums, so (Dinkelbach) a draft slot is worth verifying iff its chance of being
accepted exceeds lambda times what it costs, lambda being decode tokens per decode second: prompt chunks must be
computed anyway and their seconds are left out. Survival never rises with the position and so the largest n slots
are always prefixes: sort, add up, and take the n with the largest tokens(n) - lambda * seconds(n), which for an
affine cost is the threshold S > lambda * c1 and holds for steps and bends too.

A model drafter must run to be scored: one that pays only a little may be left off at batch 1, where a probe is one
observation.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmtool.core.speculation.acceptance import AcceptanceTable
from llmtool.core.speculation.controllers import check_name
from llmtool.core.speculation.cost import LearnedStepCost
from llmtool.core.speculation.draft import MAX_DEPTH, Floats, Ints, StepRecord, StepView

MEMORY = 0.98  # of a load's goodput: about 50 steps
PATIENCE, LEAST_PATIENCE = (
    8.0,
    2.0,
)  # plain steps that may be lost before the watchdog barks: 8 / sqrt(B)
HOLD, LONGEST_HOLD = 64, 4096  # steps that speculation then stays off; doubled each time
GROWTH = 1.5  # a step is at most so much larger than any seen: costs are learned on the way, not jumped over
PROBE, LONGEST_PROBE = 64, 4096  # steps without drafts after which a model drafter is tried


class _Load:
    """What is known of steps with about the same number of decoding sequences."""

    __slots__ = ("hold", "hold_next", "lost", "seconds", "tokens", "trips")

    def __init__(self) -> None:
        self.tokens = self.seconds = 0.0  # decayed sums of decode tokens and decode seconds
        self.hold, self.hold_next, self.trips = 0, HOLD, 0
        self.lost = 0.0  # plain steps' worth of time lost to speculation since it was last ahead


class AutoController:
    """cost: a step cost to share or to start from. max_depth: draft tokens of a sequence in one step, at most; of a
    tree along one path. A tree grows by the same rule as a chain: token by token while they pay."""

    name = "auto"
    trees = True

    def __init__(self, cost: LearnedStepCost | None = None, max_depth: int = MAX_DEPTH) -> None:
        self.cost = LearnedStepCost() if cost is None else cost
        self.acceptance = AcceptanceTable()
        self.max_depth = max_depth
        self._loads: dict[int, _Load] = {}
        self._idle, self._probe = 0, PROBE  # steps since a model drafter ran; when to try it
        self._last: dict[str, Any] = {}

    # -- before a step -------------------------------------------------------------------------------------

    def plan(self, view: StepView) -> Ints:
        limits = np.minimum(view.limits, self.max_depth)
        load = self._load(view.batch)
        why, lengths = "no step has been measured", np.zeros_like(limits)
        if load.hold:
            why = "watchdog"
        elif not limits.any():
            why = "no drafts"
        elif self.cost.known:
            choose = self._choose_trees if len(view.on) else self._choose
            lengths, why = choose(view, limits, load)
        if (
            view.modelled
            and not load.hold
            and not lengths.any()
            and limits.any()
            and self._idle >= self._probe
        ):
            lengths, why = np.minimum(limits, 1), "probe"
            self._probe = min(2 * self._probe, LONGEST_PROBE)
        self._last |= {"why": why, "batch": view.batch, "draft_tokens": int(lengths.sum())}
        return lengths

    def _choose(self, view: StepView, limits: Ints, load: _Load) -> tuple[Ints, str]:
        rows = self.acceptance.rows(view.sources, view.matches)
        width = int(limits.max())
        # Slots of the same row and position have the same chance: they are sorted as one.
        survival = self.acceptance.survival()  # [rows, MAX_DEPTH]
        slots = self.acceptance.longer(rows, limits)  # [rows, MAX_DEPTH]
        off, load_rate = self._decode_seconds(view), load.tokens / load.seconds if load.seconds > 0 else 0.0
        room = max(0, int(GROWTH * self.cost.largest) + 1 - view.num_tokens)
        best_gain, lengths = 0.0, np.zeros_like(limits)
        for depth in range(1, width + 1) if view.modelled else (width,):
            chance, count = survival[:, :depth].ravel(), slots[:, :depth].ravel()
            order = count.nonzero()[0]  # of equals in a row, the earlier position first
            order = order[(-chance[order]).argsort(kind="stable")]
            ordered = np.repeat(chance[order], count[order])[:room]
            tokens = np.empty(len(ordered) + 1)
            tokens[0] = view.batch
            ordered.cumsum(out=tokens[1:])
            tokens[1:] += view.batch
            curve = self.cost.curve(_upwards(view.num_tokens, len(tokens)), view.kv_tokens)
            drafting = depth * self.cost.per_depth if view.modelled else 0.0
            seconds = curve - (curve[0] - off - drafting)
            rate = load_rate or self._steady(tokens, seconds, view.batch / off)
            gains = tokens - rate * seconds
            gains[0] = view.batch - rate * off
            n = int(gains.argmax())
            gain = float(gains[n] - gains[0])
            if n and gain > best_gain:
                best_gain = gain
                lengths = _spread(n, order, count, depth, rows, limits)
            self._last["goodput"] = float(rate)
            self._last["seconds_per_token"] = float(curve[-1] - curve[0]) / max(1, len(curve) - 1)
        self._last["gain"] = best_gain
        return lengths, "pays" if best_gain > 0 else "does not pay"

    def _choose_trees(self, view: StepView, limits: Ints, load: _Load) -> tuple[Ints, str]:
        """The same for trees: a token's chance is that of its whole path, and so never above that of the one before
        it; the n largest are trees again."""
        rows = self.acceptance.rows(view.sources, view.matches)
        survival = self.acceptance.survival()[rows]  # [B + X, MAX_DEPTH]
        for i, (on, at) in enumerate(zip(view.on.tolist(), view.at.tolist(), strict=True), view.batch):
            if at:
                survival[i] *= survival[on, at - 1]
        owners = np.repeat(np.arange(len(limits)), limits)  # a token each, parents before what follows them
        places = np.arange(len(owners)) - np.repeat(np.cumsum(limits) - limits, limits)
        chance = survival[owners, places]
        room = max(0, int(GROWTH * self.cost.largest) + 1 - view.num_tokens)
        order = (-chance).argsort(kind="stable")[:room]
        off, load_rate = self._decode_seconds(view), load.tokens / load.seconds if load.seconds > 0 else 0.0
        tokens = view.batch + np.concatenate([[0.0], np.cumsum(chance[order])])
        curve = self.cost.curve(view.num_tokens + np.arange(len(tokens)), view.kv_tokens)
        seconds = curve - (curve[0] - off)
        rate = load_rate or self._steady(tokens, seconds, view.batch / off)
        gains = tokens - rate * seconds
        n = int(gains.argmax())
        gain = float(gains[n] - gains[0])
        self._last |= {"goodput": float(rate), "gain": gain}
        self._last["seconds_per_token"] = float(curve[-1] - curve[0]) / max(1, len(curve) - 1)
        return np.bincount(owners[order[:n]], minlength=len(limits)), "pays" if n else "does not pay"

    @staticmethod
    def _steady(tokens: Floats, seconds: Floats, off: float) -> float:
        """Goodput of a load that is met for the first time: the best that is predicted for it."""
        return max(off, float((tokens[1:] / seconds[1:]).max(initial=0.0)))

    def _decode_seconds(self, view: StepView) -> float:
        """Predicted seconds of the decoding sequences without drafts, and without prompt chunks beside them."""
        return max(self.cost.seconds(view.batch, view.kv_tokens), 1e-12)

    # -- after it ------------------------------------------------------------------------------------------

    def record(self, record: StepRecord) -> None:
        view = record.view
        drafted = int(record.lengths.sum())
        num_tokens = view.num_tokens + drafted
        depth = int(record.lengths.max(initial=0)) if view.modelled else 0
        if not view.modelled or depth:
            self.acceptance.record(record)
        self.cost.record(num_tokens, view.kv_tokens, depth, record.seconds)
        if view.modelled:
            self._idle = 0 if depth else self._idle + 1
            if depth and self._last.get("why") == "pays":
                self._probe = PROBE
        load = self._load(view.batch)
        load.hold = max(0, load.hold - 1)
        if not view.batch or not self.cost.known:
            return
        seconds = self._share(record, depth)
        emitted = float(record.emitted[: view.batch].sum())
        load.tokens = MEMORY * load.tokens + emitted
        load.seconds = MEMORY * load.seconds + seconds
        if drafted:
            self._watch(load, emitted, seconds, view)

    def _share(self, record: StepRecord, depth: int) -> float:
        """The part of a step's seconds that is not its prompt chunks'."""
        view = record.view
        if not view.prefill_tokens:
            return record.seconds
        alone = self.cost.seconds(record.num_tokens - view.prefill_tokens, view.kv_tokens, depth)
        whole = self.cost.seconds(record.num_tokens, view.kv_tokens, depth)
        return record.seconds * min(1.0, alone / max(whole, 1e-12))

    def _watch(self, load: _Load, tokens: float, seconds: float, view: StepView) -> None:
        """The floor: what was realised against what the model says of the same steps without drafts."""
        plain = self._decode_seconds(view)
        load.lost = max(0.0, load.lost + seconds / plain - tokens / view.batch)
        if load.lost > max(LEAST_PATIENCE, PATIENCE / view.batch**0.5):
            load.hold, load.trips = load.hold_next, load.trips + 1
            load.hold_next = min(2 * load.hold_next, LONGEST_HOLD)
            load.tokens = load.seconds = load.lost = 0.0

    def _load(self, batch: int) -> _Load:
        key = batch.bit_length()
        load = self._loads.get(key)
        if load is None:
            load = self._loads[key] = _Load()
        return load

    # -- looking in ----------------------------------------------------------------------------------------

    @property
    def trips(self) -> int:
        """How often the watchdog has switched speculation off."""
        return sum(load.trips for load in self._loads.values())

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "cost": self.cost.state_dict(), "acceptance": self.acceptance.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_name(self.name, state)
        self.cost.load_state_dict(state["cost"])
        self.acceptance.load_state_dict(state["acceptance"])

    def explain(self) -> dict[str, Any]:
        c = self.cost.coefficients
        learned = {"fixed": c[0], "token": c[1], "kv": c[2], "draft_depth": c[3]}
        return {
            "controller": self.name,
            **self._last,
            "first_token_acceptance": self.acceptance.first(),
            "cost": {key: float(value) for key, value in learned.items()},
            "watchdog_trips": self.trips,
        }


_NUMBERS = np.arange(4096.0)


def _upwards(first: int, count: int) -> Floats:
    """[count] first, first + 1, ..."""
    if first + count <= len(_NUMBERS):
        return _NUMBERS[first : first + count]
    return np.arange(first, first + count, dtype=float)


def _spread(n: int, order: Ints, count: Ints, depth: int, rows: Ints, limits: Ints) -> Ints:
    """[B] lengths of the first n slots. order: cells row * depth + position, by chance; count: slots in each."""
    ends = count[order].cumsum()
    whole = int(ends.searchsorted(n, side="right"))  # so many cells are taken whole
    most = np.bincount(order[:whole] // depth, minlength=len(count) // depth)  # [rows]
    lengths = np.minimum(most[rows], limits)
    rest = n - (int(ends[whole - 1]) if whole else 0)
    if rest:
        row, position = divmod(int(order[whole]), depth)
        lengths[((rows == row) & (limits > position)).nonzero()[0][:rest]] += 1
    return lengths
