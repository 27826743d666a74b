"""llmtool's engine as a Ray Serve deployment with autoscaling replicas: a fleet over as many machines as Ray has.

    pip install 'llmtool[ray]'
    cd recipes/ray-serve && serve run deployment:build model=smollm2-135m max_replicas=4

Every replica is what `llmtool serve` is: the whole engine in a process of its own, with OpenAI's HTTP API in front,
under the replica's Ray actor. Arguments are settings of the engine and of the server, under the names that
`llmtool serve --print-config` shows, and those of `Scaling`. Ray starts replicas as requests queue up, ends idle
ones, and replaces those whose engine has died. /metrics is that of the replica that happens to answer: scrape Ray's
for the fleet. Ray routes by queue length, not by prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve

from llmtool.config import ENV_PREFIX, EngineConfig, ServerConfig, field_names, resolve


@dataclass(frozen=True, slots=True)
class Scaling:
    """Ray's side. requests: unfinished ones that a replica should have on average; more start another. cpus, gpus:
    that Ray sets aside for each; cpus are the engine's threads, unless num_threads says otherwise. upscale_delay,
    downscale_delay: seconds that the load must have lasted.
    """

    min_replicas: int = 1
    max_replicas: int = 4
    requests: float = 16.0
    cpus: float = 1.0
    gpus: float = 0.0
    upscale_delay: float = 10.0
    downscale_delay: float = 300.0


@serve.deployment(name="llmtool")
@serve.ingress()
class Replica:
    """One engine and its HTTP application."""

    async def __init__(self, engine_config: EngineConfig, server_config: ServerConfig) -> None:
        from llmtool.models.tokenizer import Tokenizer
        from llmtool.runtime.fleet import start_engine
        from llmtool.serve.app import create_app

        self._engine = await start_engine(engine_config)
        tokenizer = Tokenizer.from_dir(self._engine.info.tokenizer_dir)
        self._application = create_app(self._engine, tokenizer, server_config)

    def __serve_build_asgi_app__(self) -> Any:
        """Ray asks for it once `__init__` is through."""
        return self._application

    async def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self._engine.dead is not None:
            raise self._engine.dead

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.drain(self._application.state.context.config.drain_seconds)
            await self._engine.close()


def build(arguments: Mapping[str, Any]) -> serve.Application:
    """The application that `serve run deployment:build name=value ...` runs. Raises UsageError for an argument that
    there is not, or whose value makes no sense."""
    environ = {f"{ENV_PREFIX}{name.upper()}": str(value) for name, value in arguments.items()}
    classes = (EngineConfig, ServerConfig, Scaling)
    known = frozenset[str]().union(*(field_names(cls) for cls in classes))
    scaling = resolve(Scaling, {}, environ=environ, other_keys=known - field_names(Scaling))
    threads = max(1, round(scaling.cpus)) if "num_threads" not in arguments and not scaling.gpus else None
    engine = resolve(
        EngineConfig, {"num_threads": threads}, environ=environ, other_keys=known - field_names(EngineConfig)
    )
    key = {"api_key": arguments.get("api_key")}  # no setting of the environment
    server = resolve(ServerConfig, key, environ=environ, other_keys=known - field_names(ServerConfig))
    return Replica.options(
        ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        autoscaling_config={
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": scaling.requests,
            "upscale_delay_s": scaling.upscale_delay,
            "downscale_delay_s": scaling.downscale_delay,
        },
        # The engine has a queue of its own, which refuses with a 429 what is too much.
        max_ongoing_requests=engine.max_num_seqs + engine.max_waiting,
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=server.drain_seconds + 10.0,
    ).bind(engine, server)
