"""Service-level objectives as the command line writes them, in ms: `ttft:200 tpot:50`, or `ttft:p99:500`.

Without a percentile an SLO is a bound on every single request, and the requests per second that meet all such
bounds are the run's slo_goodput (DistServe, arXiv 2401.09670, section 2.3; vLLM's `--goodput`). With one it
is a bound on that percentile of the whole run, met or not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from llmtool.errors import UsageError

_FORM = re.compile(
    r"(?P<metric>[a-z0-9]+):(?:p(?P<percentile>\d+(?:\.\d+)?):)?(?P<limit>[0-9.]+(?:e[0-9]+)?)", re.I
)
_ALIASES = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2el": "e2el", "e2e": "e2el"}


@dataclass(frozen=True, slots=True)
class SLO:
    """metric: ttft | tpot | itl | e2el. limit_ms: met when the value is at most this. percentile: of the
    run, or None for a bound on each request."""

    metric: str
    limit_ms: float
    percentile: float | None = None

    def __str__(self) -> str:
        middle = "" if self.percentile is None else f"p{self.percentile:g}:"
        return f"{self.metric}:{middle}{self.limit_ms:g}"


def parse_slo(text: str) -> SLO:
    form = _FORM.fullmatch(text.strip())
    metric = _ALIASES.get(form["metric"].lower()) if form else None
    if not form or metric is None:
        raise UsageError(
            f"{text!r} is not a service-level objective.",
            "Write METRIC:MS or METRIC:pNN:MS with ttft, tpot, itl or e2el, as in ttft:200 or ttft:p99:500.",
        )
    try:
        limit = float(form["limit"])
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UsageError(f"The limit in {text!r} must be a positive number of milliseconds.")
    percentile = float(form["percentile"]) if form["percentile"] else None
    if percentile is not None and not 0 < percentile <= 100:
        raise UsageError(f"The percentile in {text!r} must be in (0, 100].")
    if metric == "itl" and percentile is None:
        raise UsageError(
            f"{text!r} is ambiguous: a request has many inter-token gaps.",
            f"Bound their percentile over the run (itl:p99:{limit:g}), or bound tpot, a request's mean gap.",
        )
    return SLO(metric, limit, percentile)


def parse_slos(texts: Iterable[str]) -> tuple[SLO, ...]:
    """Several objectives; each text may hold more than one, separated by spaces or commas."""
    slos = tuple(parse_slo(part) for text in texts for part in text.replace(",", " ").split())
    seen: set[tuple[str, float | None]] = set()
    for slo in slos:
        if (slo.metric, slo.percentile) in seen:
            raise UsageError(f"The objective for {slo.metric} is given twice.", "Give each metric one limit.")
        seen.add((slo.metric, slo.percentile))
    return slos
