"""What the server itself counted during a run: speculation, prefix cache, preemptions.

Names are those of vLLM's /metrics page, which `llmtool serve` has too. A counter is reported as its growth over
the run, summed over labels; anyone else's requests to the same server are in it.
"""

from __future__ import annotations

import re
from typing import Any

_LINE = re.compile(
    r"^(?P<name>[a-zA-Z_:][\w:]*?)(?:_total)?(?:\{.*\})?\s+(?P<value>[-+.\deE]+)(?:\s+\d+)?$", re.M
)
COUNTERS = (
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_preemptions",
    "prompt_tokens",
    "generation_tokens",
)


def read_counters(page: str) -> dict[str, float]:
    """The known counters of a Prometheus page, summed over labels; those it lacks are absent."""
    totals: dict[str, float] = {}
    for line in _LINE.finditer(page):
        name = line["name"].removeprefix("vllm:")
        if name in COUNTERS:
            totals[name] = totals.get(name, 0.0) + float(line["value"])
    return totals


_MEMORY = re.compile(r"^llmtool:memory_bytes\{.*?kind=\"(\w+)\".*?\}\s+([-+.\deE]+)", re.M)


def read_memory(page: str) -> dict[str, int]:
    """What `llmtool serve` says of its memory, in bytes by use; {} of other servers."""
    return {kind: int(float(value)) for kind, value in _MEMORY.findall(page)}


def growth(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """Counters over the run, with the rates that follow, under vLLM's result-file names where it has one.

    spec_decode_acceptance_rate: accepted / drafted tokens, in percent. spec_decode_acceptance_length: tokens
    per verified step, the bonus token included. prefix_cache_hit_rate: share of prompt tokens found in the
    cache.
    """
    grown = {name: after[name] - before.get(name, 0.0) for name in COUNTERS if name in after}
    # A server that restarted meanwhile counts from zero again: its growth means nothing.
    if any(value < 0 for value in grown.values()):
        return {}
    out: dict[str, Any] = {"server_counters": grown} if grown else {}
    drafts, drafted = grown.get("spec_decode_num_drafts", 0.0), grown.get("spec_decode_num_draft_tokens", 0.0)
    if drafts and drafted:
        accepted = grown.get("spec_decode_num_accepted_tokens", 0.0)
        out |= {
            "spec_decode_num_drafts": int(drafts),
            "spec_decode_draft_tokens": int(drafted),
            "spec_decode_accepted_tokens": int(accepted),
            "spec_decode_acceptance_rate": 100.0 * accepted / drafted,
            "spec_decode_acceptance_length": 1.0 + accepted / drafts,
        }
    if grown.get("prefix_cache_queries"):
        out["prefix_cache_hit_rate"] = grown.get("prefix_cache_hits", 0.0) / grown["prefix_cache_queries"]
    return out
