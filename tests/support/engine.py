"""An engine without a model, for the process around it: tokens follow from what was said before."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

from llmtool.config import EngineConfig
from llmtool.core.ports import SchedulerOutput
from llmtool.errors import ModelError
from llmtool.runtime.parts import EngineInfo, EngineParts, Progress
from tests.support.core import VOCAB, MemoryExecutor, group

STEP_SECONDS = 0.002
GATE = "TEST_ENGINE_GATE"
IDLE = "TEST_ENGINE_IDLE"  # names a file that gets a line for every preparation in a pause


class PacedExecutor(MemoryExecutor):
    """Takes a little real time per step. Token 96 first in a prompt kills the process; 95 fails the engine; 94
    makes it wait for the file that TEST_ENGINE_GATE names, next to which it says so with one called "reached"."""

    def submit(self, out: SchedulerOutput) -> None:
        for new in out.new:
            if new.token_ids[0] == 96:
                os._exit(9)
            if new.token_ids[0] == 95:
                raise RuntimeError("this executor is broken")
            if new.token_ids[0] == 94:
                Path(os.environ[GATE]).with_name("reached").touch()
            while new.token_ids[0] == 94 and not Path(os.environ[GATE]).exists():
                time.sleep(0.01)
        time.sleep(STEP_SECONDS)
        super().submit(out)


def build(config: EngineConfig, progress: Progress) -> EngineParts:
    progress("Loading nothing", 0.5)
    if config.model == "missing":
        raise ModelError("There is no model 'missing'.", "Give another one.")
    pages = 64 if config.kv_cache_memory_bytes is None else config.kv_cache_memory_bytes // group().page_bytes
    scheduler = replace(config.scheduler(config.max_model_len or 128), max_num_batched_tokens=64)
    info = EngineInfo(
        model="fake",
        served_model_name="fake",
        tokenizer_dir="",
        device="cpu",
        dtype="float32",
        max_model_len=scheduler.max_model_len,
        vocab_size=VOCAB,
        eos_token_ids=(),
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_waiting=scheduler.max_waiting,
        num_pages=pages,
        tokens_per_page=group().tokens_per_page,
        page_bytes=group().page_bytes,
        host_pages=0,
        num_parameters=0,
        weight_bytes=0,
        activation_bytes=0,
        num_threads=1,
    )

    def when_idle() -> None:
        with Path(os.environ[IDLE]).open("a") as file:
            file.write("idle\n")

    prepare = when_idle if IDLE in os.environ else None
    return EngineParts(PacedExecutor(group()), group(), pages, 0, scheduler, info, prepare)


def tell_openmp(config: EngineConfig, progress: Progress) -> EngineParts:
    """Says first how this process's OpenMP threads wait."""
    progress(f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', '')}", 0.0)
    return build(config, progress)
