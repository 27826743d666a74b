"""Where the engines of a fleet run: each gets its share of this machine's CPUs, or GPUs of its own. No torch: the
serving process decides, the engine's process obeys before torch looks around.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from llmtool.errors import InfeasibleError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Place:
    """Of one of `engines` on this machine. cpus: numbers of the CPUs that it may use, () for all. gpus: what
    CUDA_VISIBLE_DEVICES is to say, None to leave it. engines: how many share the memory that is free. key: of the
    link that KV moves over, None where it stays where it is."""

    number: int = 0
    engines: int = 1
    cpus: tuple[int, ...] = ()
    gpus: str | None = None
    key: bytes | None = None

    def take(self) -> None:
        """Called by the engine's process before it imports torch."""
        if self.cpus:
            os.sched_setaffinity(0, self.cpus)
        if self.gpus is not None:
            os.environ[_VISIBLE] = self.gpus


def places(
    engines: int,
    gpus_each: int,
    device: str,
    cpus: tuple[int, ...] | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Place]:
    """Shares of the machine for so many engines. gpus_each: GPUs of one engine, where there are any. device: as
    in EngineConfig; with `cpu` GPUs are left alone. cpus, environ: this process's own, unless given.

    CPUs are split into runs of neighbours, which share caches; with fewer CPUs than engines, all have all.
    Raises InfeasibleError where CUDA_VISIBLE_DEVICES names too few GPUs.
    """
    allowed = tuple(sorted(os.sched_getaffinity(0))) if cpus is None else cpus
    visible = (os.environ if environ is None else environ).get(_VISIBLE)
    names = None if visible is None else [name for name in visible.split(",") if name.strip()]
    found: list[Place] = []
    for i in range(engines):
        begin, end = (len(allowed) * k // engines for k in (i, i + 1))
        own = allowed[begin:end] if engines > 1 and end > begin else ()
        gpus = None
        if engines > 1 and device != "cpu":
            wanted = range(i * gpus_each, (i + 1) * gpus_each)
            if names and wanted.stop > len(names):
                raise InfeasibleError(
                    f"{engines} replicas of {gpus_each} GPUs each need {engines * gpus_each}, and {_VISIBLE} names "
                    f"{len(names)}.",
                    "Lower --data-parallel-size, or give more GPUs.",
                )
            gpus = ",".join(str(k) if names is None else names[k] for k in wanted) if names != [] else ""
        found.append(Place(i, engines, own, gpus))
    return found
