"""The protocol between the harness and a peer that is a library: one JSON document a line, on stdin and stdout.

The peer's own Python runs this, so it imports nothing but the standard library. The driver says {"ready": true}
once it can take requests. Then for each line {"requests": [{"at": seconds, "prompt": [ids], "max_tokens": n}, ...]}
it answers {"records": [{"start", "ttft", "e2e", "output_tokens", "tokens"}, ...]} in the same order, all times in
seconds, `start` after the line was read; or {"error": sentence}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

Request = dict[str, Any]
Record = dict[str, Any]


def protocol_stream() -> TextIO:
    """stdout for the protocol alone: what the library prints goes to stderr from here on. Call it first."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return stream


def serve(stream: TextIO, run: Callable[[list[Request]], list[Record]]) -> None:
    """Answers lines until stdin ends."""
    print(json.dumps({"ready": True}), file=stream)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"records": run(json.loads(line)["requests"])}
        except Exception as e:  # the harness records it as the cell's result and goes on
            traceback.print_exc()
            answer = {"error": f"{type(e).__name__}: {e}"[:500]}
        print(json.dumps(answer), file=stream)


def record(start: float, moments: list[float], tokens: list[int]) -> Record:
    """start and moments (of every output token) on one clock whose zero is when the line was read."""
    return {
        "start": start,
        "ttft": moments[0] - start,
        "e2e": moments[-1] - start,
        "output_tokens": len(tokens),
        "tokens": tokens,
    }
