"""What the models of the catalogue cache: their published config.json, read as `plan` and `memprofile` read any."""

from __future__ import annotations

from functools import cache

from llmtool.core.memory.model import ModelGeometry
from llmtool.modelspec.catalogue import read_config
from llmtool.sim.ir import read_ir
from llmtool.sim.memory import geometry


@cache
def geometry_of(name: str) -> ModelGeometry:
    """In bf16 on one device. name: in the catalogue, a directory or a config.json. Raises ModelError for one that
    is none of these or cannot be read."""
    return geometry(read_ir(read_config(name), name))
