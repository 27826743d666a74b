"""Weights from safetensors into the decoder's fused matrices, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from llmtool_kernels.cpu.native import kernels, mode, supports
from llmtool_kernels.cpu.weights import can_pack
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtool.errors import ModelError, UsageError
from llmtool.models.bind import QUANTIZATIONS, Binder, bind
from llmtool.models.checkpoint import Slot, canonical_name, is_ignored, slots
from llmtool.models.cpu_decoder import CpuDecoder, can_run
from llmtool.models.decoder import Decoder, NativeDecoder
from llmtool.models.dequantise import plain_tensors
from llmtool.models.kv_scales import is_kv_scale, kv_scales
from llmtool.models.weights import DecoderWeights, allocate, fill_random, named_tensors
from llmtool.modelspec import ModelSpec

Progress = Callable[[int, int], None]  # bytes done, bytes in all

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    directory: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    load_format: str = "auto",
    seed: int = 0,
    max_length: int | None = None,
    quantization: str | None = None,
) -> Decoder:
    """The decoder of a Hugging Face directory, its weights cast to dtype on device: native where its family is,
    through transformers where not.

    load_format: auto reads *.safetensors; dummy draws random weights from `seed` and needs config.json only.
    max_length: tokens of the longest sequence to come, if it is less than the model was made for.
    quantization: int8 or int4 rounds the matrices to so many bits as they come; native families only.
    Peak memory is the fused weights plus the one tensor being copied. Raises ModelError naming every tensor
    that is missing, unexpected or of the wrong shape, UsageError where LLMTOOL_CPU_KERNELS makes no sense.
    """
    directory = Path(directory)
    try:
        mode()
    except ValueError as error:
        raise UsageError(f"{error}.") from None
    if not ModelSpec.is_native(directory):
        from llmtool.models.transformers_backend import load_with_transformers  # seconds of imports

        if quantization is not None:
            raise ModelError(
                f"The model in {directory} runs through transformers, where --quantization has no effect.",
                "Leave it out, or take a model of a native family.",
            )
        return load_with_transformers(directory, dtype, torch.device(device), load_format, seed)
    spec = ModelSpec.from_dir(directory)
    weights = allocate(spec, dtype, torch.device(device))
    if load_format == "dummy":
        fill_random(weights, seed)
    else:
        _fill(spec, weights, directory, progress or (lambda done, total: None))
        weights.kv_scales = kv_scales(
            (canonical_name(name), tensor)
            for name, tensor in _tensors(
                weight_files(directory), lambda name: is_kv_scale(canonical_name(name))
            )
        )
    return assemble(spec, weights, quantization, max_length)


def assemble(
    spec: ModelSpec, weights: DecoderWeights, quantization: str | None = None, max_length: int | None = None
) -> Decoder:
    """The fastest decoder there is for loaded weights, which it takes over."""
    dtype, device = weights.dtype, weights.norm.device
    native = kernels() if supports(dtype, device) and can_run(spec, dtype) else None
    bits = None if quantization is None else QUANTIZATIONS[quantization]
    if native is not None and all(
        can_pack(matrix) for _, matrix in named_tensors(weights) if matrix.dim() > 1 and matrix.numel()
    ):
        bind(spec, weights, Binder(native, bits))
        return CpuDecoder(spec, weights, native, max_length)
    if bits is not None:
        bind(spec, weights, Binder(None, bits))
    return NativeDecoder(spec, weights, max_length)


def weight_files(directory: Path) -> list[Path]:
    """A model's safetensors files: those its index names, else all. Raises ModelError when there are none."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as e:
            raise ModelError(f"{index} is not a safetensors index: {e!r}.") from None
        files = [directory / name for name in names]
        absent = [f.name for f in files if not f.is_file()]
        if absent:
            raise ModelError(
                f"{directory} lacks {', '.join(absent)}, which its index names.", "Download it again."
            )
        return files
    single = directory / "model.safetensors"
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{directory} holds no *.safetensors weights.",
            "Convert them (transformers' save_pretrained writes safetensors), or use --load-format dummy.",
        )
    return files


def _fill(spec: ModelSpec, weights: DecoderWeights, directory: Path, progress: Progress) -> None:
    def ignored(name: str) -> bool:
        return is_ignored(name, spec) or is_kv_scale(name)

    fill_slots(slots(spec, weights), directory, progress, canonical_name, ignored)


def fill_slots(
    wanted: dict[str, Slot],
    directory: Path,
    progress: Progress,
    canonical: Callable[[str], str],
    ignored: Callable[[str], bool],
) -> None:
    """Fill every slot from the directory's safetensors files. canonical: a slot's name of a tensor's; ignored:
    whether a tensor without a slot, by that name, may be left out. Raises ModelError as `load`."""
    total = sum(slot.nbytes for slot in wanted.values())
    unexpected, wrong, done = [], [], 0
    progress(0, total)
    for stored_name, tensor in plain_tensors(_tensors(weight_files(directory))):
        name = canonical(stored_name)
        slot = wanted.pop(name, None)
        if slot is None:
            if not ignored(name):
                unexpected.append(stored_name)
        elif slot.file_shape != tuple(tensor.shape):
            wrong.append(
                f"{stored_name} is {list(tensor.shape)}, config.json asks for {list(slot.file_shape)}"
            )
        else:
            slot.fill(tensor)
            done += slot.nbytes
            progress(done, total)
    problems = [
        f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for what, names in (("missing", list(wanted)), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise ModelError(
            f"The weights in {directory} do not fit its config.json: {'; '.join(problems)}.",
            "Check that config.json and the safetensors files come from the same model.",
        )


def _tensors(
    files: list[Path], chosen: Callable[[str], bool] = lambda name: True
) -> Iterator[tuple[str, Tensor]]:
    """Every chosen (name, tensor) on CPU, memory-mapped: a tensor is read when it is copied, and dropped then."""
    with ExitStack() as stack:
        for path in files:
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as e:
                raise ModelError(
                    f"{path} is not a readable safetensors file: {e}.", "Download it again."
                ) from None
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if chosen(name):
                    yield name, file.get_tensor(name)
