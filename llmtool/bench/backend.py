"""What the load generator drives: anything that can run one request and write down what happened."""

from __future__ import annotations

from typing import Any, Protocol

from llmtool.workload.metrics import RequestRecord
from llmtool.workload.requests import BenchRequest


class Backend(Protocol):
    """An HTTP server (client.py) or an engine in this process (inprocess.py)."""

    @property
    def description(self) -> str:
        """What is measured, for the result file: a URL, or the engine's model."""
        ...

    async def generate(self, request: BenchRequest, record: RequestRecord) -> None:
        """Runs one request to its end and fills in `record`; `record.start` on time.perf_counter's clock.

        What goes wrong with the request becomes `record.error`, with `success` left False, never an
        exception. Cancelling the call aborts the request.
        """
        ...

    async def counters(self) -> dict[str, float]:
        """What the server has counted so far (names of counters.COUNTERS); {} where it does not say."""
        ...

    async def speculation(self) -> dict[str, Any]:
        """What a speculation controller chose last and why; {} where there is none or it does not say."""
        ...

    async def memory(self) -> dict[str, int]:
        """Bytes the server holds, by use; {} where it does not say."""
        ...

    async def close(self) -> None: ...
