"""How likely a draft token is to be accepted: a hazard table, learned from every token the target emits.

Rows are (proposer, class of match length), columns the position in the draft. A cell estimates the chance that the
position is accepted when those before it were; survival is their product. Drafts are scored against the tokens
that are emitted anyway, so also when nothing is verified and one past what was. A draft that was right as far as
tokens are known is censored there, not failed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmtool.core.speculation.draft import MAX_DEPTH, Floats, Ints, StepRecord
from llmtool.errors import UsageError

BOUNDS = np.array([3, 4, 6, 10, 18])  # where the classes {2}, 3, 4-5, 6-9, 10-17, >= 18 part
CLASSES = len(BOUNDS) + 1
# First-token acceptance of suffix drafts on code, chat, arithmetic and summaries is 0.41-0.49 after matches of 2
# tokens and 0.79-0.97 after 18 and more; the classes between are interpolated.
PRIOR = np.array([0.45, 0.52, 0.60, 0.70, 0.80, 0.88])
FIRST_WEIGHT, PRIOR_WEIGHT = (
    4.0,
    1.0,
)  # observations that the priors of the first and later positions are worth
ENOUGH = 16.0  # observations after which the prior of the first fades: a drafter may be always wrong
# A cell remembers about its last 100 observations, or 33 steps if those hold more.
MEMORY, STEP_MEMORY = 0.99, 0.97
DRIFT = 0.998  # and the table about its last 500 steps
_KEPT = np.maximum(
    MEMORY ** np.arange(8), STEP_MEMORY
)  # by a step's observations; the same for all further ones


_LONGEST = int(BOUNDS[-1])  # longer matches are in its class
_CLASS_OF = np.searchsorted(BOUNDS, np.arange(_LONGEST + 1), side="right")


def match_class(matches: Ints) -> Ints:
    """[B] classes of match lengths; a proposer without match lengths has class 0."""
    return _CLASS_OF[np.minimum(matches, _LONGEST)]


# After j accepted tokens a match is j longer, so position j of class c starts like position 0 of LATER[c, j].
_TYPICAL = np.array([2, 3, 4, 7, 12, 18])
LATER = match_class(_TYPICAL[:, None] + np.arange(MAX_DEPTH)[None, :])


class AcceptanceTable:
    """Decayed Beta counts [proposers * CLASSES, MAX_DEPTH]; proposers are added as their numbers appear."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, 0, MAX_DEPTH))  # tries, hits
        self._survival: Floats | None = None
        self._rows: tuple[Ints, Ints, Ints] | None = None  # the last sources and matches, and their rows

    def rows(self, sources: Ints, matches: Ints) -> Ints:
        """[B] rows of drafts, which exist afterwards."""
        last = self._rows
        if last is not None and last[0] is sources and last[1] is matches:
            return last[2]  # a step that was planned is recorded
        wanted = (int(sources.max(initial=0)) + 1) * CLASSES
        have = self._counts.shape[1]
        if wanted > have:
            self._counts = np.concatenate([self._counts, np.zeros((2, wanted - have, MAX_DEPTH))], axis=1)
            self._survival = None
        rows = sources * CLASSES + match_class(matches)
        self._rows = sources, matches, rows
        return rows

    def survival(self) -> Floats:
        """[rows, MAX_DEPTH] chance that a draft is right up to and including each position; never rises."""
        if self._survival is None:
            tries, hits = self._counts.reshape(2, -1, CLASSES, MAX_DEPTH)
            weight = FIRST_WEIGHT / (1.0 + (tries[..., 0] / ENOUGH) ** 2)  # [proposers, CLASSES]
            first = (hits[..., 0] + weight * PRIOR) / (tries[..., 0] + weight)
            hazard = (hits + PRIOR_WEIGHT * first[:, LATER]) / (tries + PRIOR_WEIGHT)
            hazard[..., 0] = first
            self._survival = np.asarray(np.cumprod(hazard, axis=-1).reshape(-1, MAX_DEPTH), np.float64)
        return self._survival

    def record(self, record: StepRecord) -> None:
        """Score a step's drafts, verified or not."""
        view = record.view
        seen = np.minimum(np.minimum(record.emitted, view.limits), MAX_DEPTH)
        right = np.minimum(record.matched, seen)
        tried = np.minimum(right + 1, seen)
        rows = self.rows(view.sources, view.matches)
        self._survival = None
        self._counts *= DRIFT
        size = self._counts.shape[1] * (MAX_DEPTH + 1)
        first = rows * (MAX_DEPTH + 1)
        new = _longer(np.concatenate([first + tried, first + right + size]), 2 * size).reshape(
            self._counts.shape
        )
        self._counts *= _KEPT[np.minimum(new[0], len(_KEPT) - 1)]
        self._counts += new

    def longer(self, rows: Ints, lengths: Ints) -> Ints:
        """[rows, MAX_DEPTH] how many of each row's lengths are longer than each position."""
        return _longer(rows * (MAX_DEPTH + 1) + lengths, self._counts.shape[1] * (MAX_DEPTH + 1))

    def first(self) -> dict[str, list[float]]:
        """Per proposer number, the estimated acceptance of a first draft token by class of match length."""
        table = self.survival()[:, 0].reshape(-1, CLASSES)
        return {str(i): [round(float(p), 4) for p in row] for i, row in enumerate(table)}

    def state_dict(self) -> dict[str, Any]:
        return {"hits": self._counts[1].tolist(), "tries": self._counts[0].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UsageError if the table has another shape."""
        hits, tries = (np.array(state[k], float).reshape(-1, MAX_DEPTH) for k in ("hits", "tries"))
        if hits.shape != tries.shape or len(hits) % CLASSES:
            raise UsageError(
                f"A saved acceptance table has {len(hits)} and {len(tries)} rows, not multiples of {CLASSES}.",
                "Delete the file; it is learned anew.",
            )
        self._counts, self._survival, self._rows = np.stack([tries, hits]), None, None


def _longer(cells: Ints, size: int) -> Ints:
    """[rows, MAX_DEPTH] how many lengths of each row are longer than each position. cells: row * (MAX_DEPTH + 1) +
    length; size: what is above them all."""
    counts = np.bincount(cells, minlength=size).reshape(-1, MAX_DEPTH + 1)
    return counts[:, :0:-1].cumsum(axis=1)[:, ::-1]
