"""One checkpoint in every peer's format: llmtool's own bfloat16 directory, and what is converted from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.environments import ensure, peers_dir, python_of, run_step
from llmtool.models.resolve import resolve

MODEL = "smollm2-135m"
OPENVINO = {
    # The group size must divide the hidden size, 576, which the default of 128 does not.
    "fp16": (),
    "int8": (),
    "int4": ("--group-size", "64", "--ratio", "1.0", "--sym"),
}


def checkpoint() -> Path:
    """The bfloat16 directory that llmtool serves, and vLLM and transformers too."""
    return resolve(MODEL)


def openvino(weights: str) -> Path:
    """weights: fp16, int8 or int4. The name carries the checkpoint's, so that a new one is converted anew."""
    return peers_dir() / "models" / checkpoint().name / f"openvino-{weights}"


def gguf(weights: str) -> Path:
    """weights: bf16, q8_0 or q4_0."""
    return peers_dir() / "models" / checkpoint().name / f"{weights}.gguf"


def convert_openvino(weights: str, note: Callable[[str], None] = print) -> None:
    """By optimum-intel. Does nothing where it is there."""
    target = openvino(weights)
    if target.is_dir():
        return
    ensure("openvino-convert", note=note)
    note(f"converting to OpenVINO {weights} ...")
    scratch = _scratch(target)
    tool = python_of("openvino-convert").with_name("optimum-cli")
    task = ("--task", "text-generation-with-past", "--weight-format", weights)
    command = [tool, "export", "openvino", "--model", checkpoint(), *task, *OPENVINO[weights], scratch]
    run_step(command, target.parent / "convert.log")
    scratch.rename(target)


def convert_gguf(weights: str, note: Callable[[str], None] = print) -> None:
    """By llama.cpp's own converter, run in the environment that has transformers, then its own quantiser."""
    target = gguf(weights)
    if target.is_file():
        return
    directory = ensure("llamacpp", note=note)
    if weights != "bf16":
        convert_gguf("bf16", note)
    note(f"converting to GGUF {weights} ...")
    scratch = _scratch(target)
    log = target.parent / "convert.log"
    if weights == "bf16":
        ensure("transformers", note=note)
        (script,) = (directory / "sources").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
        outputs = ("--outtype", "bf16", "--outfile", scratch)
        run_step([python_of("transformers"), script, checkpoint(), *outputs], log)
    else:
        quantise = directory / "build" / "bin" / "llama-quantize"
        run_step([quantise, gguf("bf16"), scratch, weights], log)
    scratch.rename(target)


def _scratch(target: Path) -> Path:
    """Where `target` is built: renamed when it is whole, so that one that was cut is not taken for it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{os.getpid()}.{target.name}")
