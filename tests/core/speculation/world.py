"""A device and a target that are made up: costs are a function, acceptance is a chance per position."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llmtool.core.speculation.controllers import Controller
from llmtool.core.speculation.draft import StepRecord, StepView

Cost = Callable[[int, int, int], float]
"""(tokens, kv tokens, draft depth) -> seconds"""


@dataclass
class World:
    """groups: (sequences, match length, chance that a draft token is right) of a batch that never changes."""

    cost: Cost
    groups: Sequence[tuple[int, int, float]]
    limit: int = 8
    modelled: bool = False
    noise: float = 0.0
    seed: int = 0
    kv_tokens: int = 1000
    tokens: float = 0.0
    seconds: float = 0.0
    lengths: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def view(self, prefill_tokens: int = 0) -> StepView:
        matches = np.repeat([g[1] for g in self.groups], [g[0] for g in self.groups])
        batch = len(matches)
        return StepView(
            matches,
            np.full(batch, self.limit),
            np.zeros(batch, np.int64),
            self.kv_tokens,
            prefill_tokens,
            self.modelled,
        )

    def step(self, controller: Controller, prefill_tokens: int = 0) -> None:
        view = self.view(prefill_tokens)
        lengths = controller.plan(view)
        assert lengths.shape == (view.batch,) and (lengths >= 0).all() and (lengths <= view.limits).all()
        chance = np.repeat([g[2] for g in self.groups], [g[0] for g in self.groups])
        wrong = self.rng.random((view.batch, self.limit)) >= chance[:, None]
        right = np.where(wrong.any(axis=1), wrong.argmax(axis=1), self.limit)
        emitted = np.minimum(right, lengths) + 1
        seconds = self.true_seconds(lengths, prefill_tokens) * float(np.exp(self.noise * self.rng.normal()))
        controller.record(StepRecord(view, lengths, emitted, np.minimum(right, emitted), seconds))
        self.tokens += float(emitted.sum())
        self.seconds += seconds
        self.lengths.append(lengths.tolist())

    def run(self, controller: Controller, steps: int) -> float:
        """Realised tokens per second of these steps."""
        before = self.tokens, self.seconds
        for _ in range(steps):
            self.step(controller)
        return (self.tokens - before[0]) / (self.seconds - before[1])

    def true_seconds(self, lengths: np.ndarray, prefill_tokens: int = 0) -> float:
        depth = int(lengths.max(initial=0)) if self.modelled else 0
        return self.cost(len(lengths) + int(lengths.sum()) + prefill_tokens, self.kv_tokens, depth)

    def goodput(self, lengths: Sequence[int]) -> float:
        """Expected tokens per second of steps with these lengths."""
        chance = np.repeat([g[2] for g in self.groups], [g[0] for g in self.groups])
        tokens = sum(float((c ** np.arange(k + 1)).sum()) for c, k in zip(chance, lengths, strict=True))
        return tokens / self.true_seconds(np.array(lengths))

    def best(self) -> float:
        """The largest goodput of any choice of one length per group, by trying all."""
        counts = [g[0] for g in self.groups]
        choices = itertools.product(range(self.limit + 1), repeat=len(self.groups))
        return max(self.goodput(np.repeat(choice, counts).tolist()) for choice in choices)

    def chosen(self, last: int) -> float:
        """Expected goodput of what was chosen in the last steps: a ratio of sums, without luck."""
        chance = np.repeat([g[2] for g in self.groups], [g[0] for g in self.groups])
        tokens = seconds = 0.0
        for lengths in self.lengths[-last:]:
            tokens += sum(float((c ** np.arange(k + 1)).sum()) for c, k in zip(chance, lengths, strict=True))
            seconds += self.true_seconds(np.array(lengths))
        return tokens / seconds


SHAPES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)


def affine(n: int, kv: int, depth: int) -> float:
    return 5.9e-3 + 2.1e-5 * n + 3.9e-8 * kv + 1e-3 * depth


def steep(n: int, kv: int, depth: int) -> float:
    """A processor without much parallelism: every token costs."""
    return 2e-3 + 1e-3 * n + 1e-8 * kv + 2e-3 * depth


def knee(n: int, kv: int, depth: int) -> float:
    """Bound by memory up to 48 tokens, by arithmetic from there."""
    return max(6e-3, 6e-3 * n / 48) + 3.9e-8 * kv


def staircase(n: int, kv: int, depth: int) -> float:
    """Padded to the shapes of captured graphs."""
    padded = next(s for s in SHAPES if s >= n)
    return 3e-3 + 8e-5 * padded + 3.9e-8 * kv
