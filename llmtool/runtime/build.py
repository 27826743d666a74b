"""The engine of a model, whichever kind it is: what the engine's process starts with."""

from __future__ import annotations

from llmtool.config import EngineConfig
from llmtool.errors import UsageError
from llmtool.models.resolve import resolve
from llmtool.modelspec import EncoderSpec
from llmtool.runtime.parts import EngineParts, PoolingParts, Progress


def build(config: EngineConfig, progress: Progress) -> EngineParts | PoolingParts:
    """Load the model of `config`: a decoder generates, an encoder pools.

    Raises ModelError, UsageError, or InfeasibleError when what the model needs does not fit.
    """
    progress("Finding the model", 0.0)

    def converting(done: int, total: int) -> None:
        progress("Converting the model", done / total if total else 1.0)

    directory = resolve(config.model, config.revision, converting)
    if EncoderSpec.is_encoder(directory):
        if config.ranks > 1:
            raise UsageError(
                f"{config.model} is an encoder, which runs on one rank.",
                "Leave out --tensor-parallel-size and --pipeline-parallel-size.",
            )
        from llmtool.runtime.pooling_executor import build_pooling

        return build_pooling(config, directory, progress)
    if config.ranks > 1:
        from llmtool.runtime.parallel.executor import build_parallel

        return build_parallel(config, directory, progress)
    from llmtool.runtime.executor import build_engine

    return build_engine(config, progress)
