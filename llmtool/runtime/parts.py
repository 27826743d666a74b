"""What an engine is made of, and what it says about itself. No torch: the serving process reads this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llmtool.config import EngineConfig, SchedulerConfig
from llmtool.core.memory.allocator import KVAllocator
from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.memory.select import make_allocator
from llmtool.core.pooling import PoolingExecutor
from llmtool.core.ports import Executor
from llmtool.core.speculation.speculator import BatchProposer
from llmtool.core.stats import EngineStats

Progress = Callable[[str, float], None]
"""(what is being done, fraction in [0, 1])"""

EngineFactory = Callable[[EngineConfig, Progress], "EngineParts | PoolingParts"]


@dataclass(frozen=True, slots=True)
class PoolingInfo:
    """What an encoder gives for a text. task: embed | classify. size: numbers of a vector: of an embedding, or one
    probability per label. matryoshka: embeddings may be cut, to `sizes` or, without any, to every length.
    normalized: embeddings have length 1. prompt, lowercase: what happens to a text first.
    """

    task: str
    size: int
    labels: tuple[str, ...] = ()
    normalized: bool = False
    matryoshka: bool = False
    sizes: tuple[int, ...] = ()
    prompt: str = ""
    lowercase: bool = False


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a running engine. Sizes in bytes; load_seconds: from start to ready. pooling: of an encoder, None
    for what generates. kv_cache_dtype: of keys and values in their pages; "" where nothing is cached. aot_bytes:
    set aside for steps captured ahead of time. large_pages: a page holds small ones of several kinds of layers.
    kv_address: where KV of other engines is sent to, None of one that works alone."""

    model: str
    served_model_name: str
    tokenizer_dir: str
    device: str
    dtype: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_waiting: int
    num_pages: int
    tokens_per_page: int
    page_bytes: int
    host_pages: int
    num_parameters: int
    weight_bytes: int
    activation_bytes: int
    num_threads: int
    load_seconds: float = 0.0
    pid: int = 0
    pooling: PoolingInfo | None = None
    kv_cache_dtype: str = ""
    aot_bytes: int = 0
    large_pages: bool = False
    kv_address: tuple[str, int] | None = None

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_bytes


class Sizes(Protocol):
    """The part of EngineInfo that says how large things are."""

    @property
    def weight_bytes(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def aot_bytes(self) -> int: ...


def memory_bytes(info: Sizes, stats: EngineStats) -> dict[str, int]:
    """By use: weights; KV pages in all, and the most in use at once; steps captured ahead of time, where
    there are any; resident memory of the engine's process."""
    captured = {"aot_arena": info.aot_bytes} if info.aot_bytes else {}
    return captured | {
        "weights": info.weight_bytes,
        "kv_cache": info.num_pages * info.page_bytes,
        "kv_peak": stats.pages_peak * info.page_bytes,
        "rss": stats.rss_bytes,
    }


@dataclass(slots=True)
class EngineParts:
    """An executor, ready to run, and what the policy must know to drive it. pages: what num_pages and host_pages
    count: pages of a group, or large pages of a plan. when_idle: called once, in the first pause between requests,
    to get ready what only some of them need. drafter: a model that drafts. health: raises EngineDead where the
    executor cannot go on, also while nothing runs. close: ends what the executor has started.
    """

    executor: Executor
    pages: KVCacheGroup | PagePlan
    num_pages: int
    host_pages: int
    scheduler: SchedulerConfig
    info: EngineInfo
    when_idle: Callable[[], None] | None = None
    drafter: BatchProposer | None = None
    health: Callable[[], None] | None = None
    close: Callable[[], None] | None = None

    def allocator(self, prefix_caching: bool = True) -> KVAllocator:
        """For a new scheduler over these pages."""
        step = self.scheduler.max_num_batched_tokens
        return make_allocator(self.pages, self.num_pages, self.host_pages, prefix_caching, step)


@dataclass(slots=True)
class PoolingParts:
    """The same of an encoder: no pages, no tokens to sample."""

    executor: PoolingExecutor
    scheduler: SchedulerConfig
    info: EngineInfo
    when_idle: Callable[[], None] | None = None
