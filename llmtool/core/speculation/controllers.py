"""How many draft tokens each sequence verifies in the next step: controllers that do not choose by goodput, and the
seed's that does. `auto` has a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from llmtool.core.speculation.cost import LearnedStepCost
from llmtool.core.speculation.draft import MAX_DEPTH, Ints, StepRecord, StepView
from llmtool.errors import UsageError


class Controller(Protocol):
    """trees: it plans branches too."""

    name: str
    trees: bool

    def plan(self, view: StepView) -> Ints:
        """[B] draft tokens to verify, none above its limit; for a model drafter also how deep it must draft. Who
        plans trees returns [B + X]; others are given no branches."""
        ...

    def record(self, record: StepRecord) -> None:
        """Learn from a step, in the order of steps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learned, as JSON. Worth keeping per (device, model, dtype)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError for another controller's state."""
        ...

    def explain(self) -> dict[str, Any]:
        """The last choice and what it rests on, as JSON."""
        ...


class FixedController:
    """Always k draft tokens, where there are so many; 0 is off. Raises UsageError for other k than 0..MAX_DEPTH."""

    trees = False

    def __init__(self, k: int) -> None:
        if not 0 <= k <= MAX_DEPTH:
            raise UsageError(f"A speculation length must be between 0 and {MAX_DEPTH}, not {k}.")
        self.k = k
        self.name = str(k) if k else "off"

    def plan(self, view: StepView) -> Ints:
        return np.minimum(view.limits, self.k)

    def record(self, record: StepRecord) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_name(self.name, state)

    def explain(self) -> dict[str, Any]:
        return {"controller": self.name, "k": self.k}


class TableController:
    """A length by batch size: the entry of the largest key that is at most B, 0 below all keys.

    table: smallest batch size -> k. Raises UsageError when it is empty or a length is out of range.
    """

    name = "table"
    trees = False

    def __init__(self, table: Mapping[int, int]) -> None:
        if not table:
            raise UsageError(
                "A table of speculation lengths is empty.", "Give it lines of batch size and length."
            )
        for batch, k in table.items():
            if batch < 1 or not 0 <= k <= MAX_DEPTH:
                raise UsageError(
                    f"A table of speculation lengths has k = {k} at batch size {batch}.",
                    f"Batch sizes start at 1, lengths go from 0 to {MAX_DEPTH}.",
                )
        self._batches = sorted(table)
        self._lengths = [table[batch] for batch in self._batches]
        self._last: tuple[int, int] = (0, 0)

    def plan(self, view: StepView) -> Ints:
        at = int(np.searchsorted(self._batches, view.batch, side="right")) - 1
        k = self._lengths[at] if at >= 0 else 0
        self._last = (view.batch, k)
        return np.minimum(view.limits, k)

    def record(self, record: StepRecord) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_name(self.name, state)

    def explain(self) -> dict[str, Any]:
        return {"controller": self.name, "batch": self._last[0], "k": self._last[1]}


class SmartSpecController:
    """The seed's rule (SmartSpec, arXiv 2406.14066, goodput-guided proposal length), kept for comparison.

    One k for the whole batch: the one with the largest goodput, B * (1 - a^(k+1)) / (1 - a) tokens over the
    predicted time of the step with them. a: moving average of the acceptance of single draft tokens, taken as the
    same at all positions and for all sequences. The time is the line fixed + token * N + kv * context (section
    4.2), fitted here to measured steps, bends included; prompt chunks count as any other tokens. Drafts are scored
    only where they were verified, so that k = 0 learns nothing, as in the seed.
    """

    name = "smartspec"
    trees = False
    average = 0.9  # weight of the past in the moving average
    start = 0.7

    def __init__(self, cost: LearnedStepCost | None = None, max_depth: int = MAX_DEPTH) -> None:
        self.cost = LearnedStepCost() if cost is None else cost
        self.acceptance = self.start
        self._lengths = np.arange(max_depth + 1)
        self._last: dict[str, Any] = {}

    def plan(self, view: StepView) -> Ints:
        if not self.cost.known:
            return np.zeros_like(view.limits)
        verified = np.minimum(view.limits[:, None], self._lengths[None, :]).sum(axis=0)  # [K + 1]
        a = min(self.acceptance, 0.999)
        expected = (1.0 - a ** (np.minimum(view.limits[:, None], self._lengths[None, :]) + 1)) / (1.0 - a)
        seconds = self.cost.curve(view.num_tokens + verified, view.kv_tokens)
        if view.modelled:
            seconds = seconds + self._lengths * self.cost.per_depth
        goodput = expected.sum(axis=0) / seconds
        k = int(goodput.argmax())
        self._last = {"k": k, "goodput": float(goodput[k]), "goodput_off": float(goodput[0])}
        return np.minimum(view.limits, k)

    def record(self, record: StepRecord) -> None:
        view = record.view
        depth = int(record.lengths.max(initial=0)) if view.modelled else 0
        self.cost.record(record.num_tokens, view.kv_tokens, depth, record.seconds)
        right = np.minimum(record.matched, record.lengths)[: view.batch]
        tried = int(np.minimum(right + 1, record.lengths[: view.batch]).sum())
        if tried:
            self.acceptance += (1.0 - self.average) * (float(right.sum()) / tried - self.acceptance)

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name, "acceptance": self.acceptance, "cost": self.cost.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_name(self.name, state)
        self.acceptance = float(state["acceptance"])
        self.cost.load_state_dict(state["cost"])

    def explain(self) -> dict[str, Any]:
        return {"controller": self.name, "acceptance": self.acceptance, **self._last}


def check_name(name: str, state: Mapping[str, Any]) -> None:
    """Raises UsageError if `state` was saved by another controller."""
    if state.get("name") != name:
        raise UsageError(
            f"A saved state is of the controller {state.get('name')!r}, not {name!r}.",
            "Delete the file; what it holds is learned anew.",
        )
