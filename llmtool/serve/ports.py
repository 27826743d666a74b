"""What the server needs from an engine; `llmtool.runtime.async_engine.AsyncEngine` is the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from llmtool.core.request import SamplingParams, SequenceOutput
from llmtool.core.stats import EngineStats, FleetView, MemoryView
from llmtool.errors import LLMToolError


class PoolingInfo(Protocol):
    """What an encoder gives; see llmtool.runtime.parts."""

    @property
    def task(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def labels(self) -> tuple[str, ...]: ...
    @property
    def normalized(self) -> bool: ...
    @property
    def matryoshka(self) -> bool: ...
    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def prompt(self) -> str: ...
    @property
    def lowercase(self) -> bool: ...


class EngineInfo(Protocol):
    """Facts about the running engine; the served ones only."""

    @property
    def model(self) -> str: ...
    @property
    def served_model_name(self) -> str: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def aot_bytes(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_waiting(self) -> int: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def pooling(self) -> PoolingInfo | None: ...


class RequestStream(Protocol):
    """Outputs of one admitted request until all its answers are finished. Raises EngineDead."""

    def __aiter__(self) -> AsyncIterator[SequenceOutput]: ...

    def abort(self, index: int | None = None) -> None:
        """Synchronous, idempotent and cheap."""
        ...


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def dead(self) -> LLMToolError | None: ...
    @property
    def fleet(self) -> FleetView | None:
        """The engines behind this one, if it is a front of several."""
        ...

    on_step: Callable[[int], None] | None
    """Called with the number of batched tokens of every committed step."""

    async def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestStream:
        """Returns once admitted. Raises RequestTooLong, RequestError, QueueFull, EngineDead."""
        ...

    async def pool(
        self,
        request_id: str,
        inputs: Sequence[Sequence[int]],
        *,
        segments: Sequence[int] = (),
        priority: int = 0,
    ) -> RequestStream:
        """An encoder's vectors of the inputs, by index. Raises as `add`."""
        ...

    async def memory(self) -> MemoryView:
        """The KV memory's ledger. Raises EngineDead."""
        ...

    async def wait_dead(self) -> LLMToolError:
        """Returns when the engine can serve no more, with the reason."""
        ...

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait for the running ones, abort what is left. True when nothing was."""
        ...

    async def close(self) -> None: ...
