"""Beam search as a policy over ordinary sequences: every live beam is a `Request`, a step that all beams have
reported on selects the survivors, and survivors with several continuations fork, sharing pages copy-on-write
(PagedAttention, section 4.4, "beam search"). The rule of selection is that of transformers' `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.core.request import FinishReason, Request, TokenLogprob


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished beam. score: sum of logprobs over length ** length_penalty."""

    score: float
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Continuation:
    """A live beam of the next round: `source` followed by `token`."""

    source: Request
    token: int
    cumulative_logprob: float


class BeamSearch:
    """One request's beams. `live` starts as the root alone."""

    def __init__(self, root: Request) -> None:
        assert root.params.beam is not None
        self.params = root.params.beam
        self.root = root
        self.live: list[Request] = [root]
        self.finished: list[Hypothesis] = []  # the best `width`, best first
        self.next_index = 1
        self.num_running = 0  # beams that hold pages and a seat
        self._top: dict[str, tuple[tuple[int, float], ...]] = {}

    def report(self, beam: Request, logprob: TokenLogprob) -> bool:
        """`beam`'s next-token distribution. True when every live beam has reported this round."""
        self._top[beam.id] = logprob.top
        return all(other.id in self._top for other in self.live)

    def select(self) -> list[Continuation]:
        """The next round's beams, best first; empty when the search is over."""
        width = self.params.width
        length = self.live[0].num_output_tokens + 1
        candidates = [
            (beam.cumulative_logprob + logprob, order, token, beam)
            for order, beam in enumerate(self.live)
            for token, logprob in self._top[beam.id]
        ]
        self._top.clear()
        candidates.sort(key=lambda c: (-c[0], c[1], c[2]))
        at_limit = length >= self.root.max_tokens
        ends = self.root.stop_tokens
        if length < self.root.params.min_tokens:
            candidates = [c for c in candidates if c[2] not in ends]
        live: list[Continuation] = []
        for rank, (score, _, token, beam) in enumerate(candidates):
            if token in ends or at_limit:
                if rank < width:  # the others are only there so that `width` beams can go on
                    self._finish(beam, token, score, length, ends)
            elif len(live) < width:
                live.append(Continuation(beam, token, score))
            if rank >= width and len(live) == width:
                break
        return [] if self._over(live, length) else live

    def _finish(self, beam: Request, token: int, score: float, length: int, ends: frozenset[int]) -> None:
        reason = FinishReason.STOP if token in ends else FinishReason.LENGTH
        tokens = (*beam.output_token_ids, token)
        self.finished.append(Hypothesis(score / length**self.params.length_penalty, tokens, score, reason))
        self.finished.sort(key=lambda h: -h.score)  # stable: earlier ones win ties
        del self.finished[self.params.width :]

    def _over(self, live: list[Continuation], length: int) -> bool:
        if not live:
            return True
        # Here transformers compares with -1e9, which beams undercut at a large penalty, and ends with too few.
        if len(self.finished) < self.params.width:
            return False
        if self.params.early_stopping:
            return True
        return live[0].cumulative_logprob / length**self.params.length_penalty <= self.finished[-1].score
