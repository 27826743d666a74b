"""What an engine is made of, and what it says about itself. No torch: the serving process reads this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmtool.config import EngineConfig, SchedulerConfig
from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.ports import Executor

Progress = Callable[[str, float], None]
"""(what is being done, fraction in [0, 1])"""

EngineFactory = Callable[[EngineConfig, Progress], "EngineParts"]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Facts of a running engine. Sizes in bytes; load_seconds: from start to ready."""

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

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.page_bytes


@dataclass(slots=True)
class EngineParts:
    """An executor, ready to run, and what the policy must know to drive it."""

    executor: Executor
    group: KVCacheGroup
    num_pages: int
    host_pages: int
    scheduler: SchedulerConfig
    info: EngineInfo
