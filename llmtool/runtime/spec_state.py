"""What a speculation controller has learned, kept between runs: per device, model and dtype, in the cache."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from llmtool.core.speculation.controllers import Controller
from llmtool.errors import LLMToolError
from llmtool.runtime.parts import EngineInfo


class Learned:
    """A controller's state under `root`, from which it starts if there is one. The device is known by its kind and
    threads; a file that is of no use is ignored, and what it held learned anew."""

    def __init__(self, root: Path, info: EngineInfo, controller: Controller, proposer: str) -> None:
        parts = (info.device, str(info.num_threads), info.dtype, info.kv_cache_dtype, info.model, proposer)
        name = "-".join(re.sub(r"[^\w.]+", "_", part) for part in (controller.name, *parts))
        self.path = root / "speculation" / f"{name[-180:]}.json"
        self._controller = controller
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, LLMToolError):
            controller.load_state_dict(json.loads(self.path.read_text(encoding="utf-8")))

    def keep(self) -> None:
        """Write it down, in one step; a disk that cannot be written costs no more than the state."""
        state = self._controller.state_dict()
        if len(state) == 1:
            return  # it learns nothing
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(state), encoding="utf-8")
            partial.replace(self.path)
