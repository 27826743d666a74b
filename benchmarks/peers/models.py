"""One checkpoint in every peer's format: llmtool's own bfloat16 directory, and what is converted from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers.environments import _run, ensure, peers_dir, python_of
from llmtool.models.resolve import resolve

MODEL = "smollm2-135m"
OPENVINO = {
    # The group size must divide the hidden size, 576, which the default of 128 does not.
    "fp16": (),
    "int8": (),
    "int4": ("--group-size", "64", "--ratio", "1.0", "--sym"),
}
GGUF = ("bf16", "q8_0", "q4_0")


def checkpoint() -> Path:
    """The bfloat16 directory that llmtool serves, and vLLM and transformers too."""
    return resolve(MODEL)


def openvino(weights: str) -> Path:
    """weights: fp16, int8 or int4. The name carries the checkpoint's, so that a new one is converted anew."""
    return peers_dir() / "models" / checkpoint().name / f"openvino-{weights}"


def gguf(weights: str) -> Path:
    """weights: bf16, q8_0 or q4_0."""
    return peers_dir() / "models" / checkpoint().name / f"{weights}.gguf"


def convert_openvino(note: Callable[[str], None] = print) -> None:
    missing = [w for w in OPENVINO if not openvino(w).is_dir()]
    if not missing:
        return
    ensure("openvino-convert", note=note)
    tool = python_of("openvino-convert").with_name("optimum-cli")
    for weights in missing:
        target = openvino(weights)
        note(f"converting to OpenVINO {weights} ...")
        scratch = target.with_name(target.name + ".part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
        task = ("--task", "text-generation-with-past", "--weight-format", weights)
        command = [tool, "export", "openvino", "--model", checkpoint(), *task, *OPENVINO[weights], scratch]
        _run(command, target.parent / "convert.log")
        scratch.rename(target)


def convert_gguf(note: Callable[[str], None] = print) -> None:
    """llama.cpp's own converter, run in the environment that has transformers, then its own quantiser."""
    directory = ensure("llamacpp", note=note)
    (script,) = (directory / "sources").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    log = gguf("bf16").parent / "convert.log"
    for weights in GGUF:
        target = gguf(weights)
        if target.is_file():
            continue
        note(f"converting to GGUF {weights} ...")
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_suffix(".part")
        if weights == "bf16":
            ensure("transformers", note=note)
            _run(
                [python_of("transformers"), script, checkpoint(), "--outtype", "bf16", "--outfile", scratch],
                log,
            )
        else:
            quantise = directory / "build" / "bin" / "llama-quantize"
            _run([quantise, gguf("bf16"), scratch, weights], log)
        scratch.rename(target)
