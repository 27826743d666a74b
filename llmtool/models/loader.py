"""Weights from safetensors into the decoder's fused matrices, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from llmtool_kernels.cpu.native import kernels, mode, supports
from llmtool_kernels.cpu.weights import can_pack
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmtool.errors import ModelError, UsageError
from llmtool.models.bind import QUANTIZATIONS, Binder, bind
from llmtool.models.checkpoint import Cut, Slot, apply_cut, canonical_name, is_ignored, slots
from llmtool.models.cpu_decoder import CpuDecoder, can_run
from llmtool.models.decoder import Decoder, NativeDecoder, StageDecoder
from llmtool.models.dequantise import is_plain, plain_name, plain_tensors
from llmtool.models.kv_scales import is_kv_scale, kv_scales
from llmtool.models.part import Part
from llmtool.models.shard_slots import drop_added_twice, shard_slots, whole_shapes
from llmtool.models.weights import DecoderWeights, allocate, allocate_shard, fill_random, named_tensors
from llmtool.modelspec import ModelSpec
from llmtool.parallel.shard import Shard

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
        weights.kv_scales = _kv_scales(directory)
    return assemble(spec, weights, quantization, max_length)


def _kv_scales(directory: Path) -> dict[int, tuple[float, float]]:
    files = weight_files(directory)
    return kv_scales(
        (canonical_name(name), tensor)
        for name, tensor in _tensors(files, lambda name: is_kv_scale(canonical_name(name)))
    )


def load_part(
    directory: str | Path,
    part: Part,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    load_format: str = "auto",
    seed: int = 0,
    max_length: int | None = None,
    quantization: str | None = None,
) -> StageDecoder:
    """What one rank runs of the decoder of a Hugging Face directory: as `load`, but of the tensors only what the
    rank holds is read. Random weights are others than `load` draws, and the same however many ranks there are.

    A rank's columns of a matrix are rounded (quantization) as the whole matrix's are where they are whole groups.
    """
    shard, directory = part.shard, Path(directory)
    weights = allocate_shard(shard, dtype, torch.device(device))
    if load_format == "dummy":
        _fill_random_shard(shard, weights, seed)
    else:
        shapes = whole_shapes(shard.whole)

        def ignored(name: str) -> bool:
            return name in shapes or is_ignored(name, shard.whole) or is_kv_scale(name)

        fill_slots(
            shard_slots(shard, weights),
            directory,
            progress or (lambda done, total: None),
            canonical_name,
            ignored,
            shapes,
        )
        scales = _kv_scales(directory)
        weights.kv_scales = {i: scales[layer] for i, layer in enumerate(shard.layers) if layer in scales}
    drop_added_twice(shard, weights)
    return assemble(shard.spec, weights, quantization, max_length, part)


def _fill_random_shard(shard: Shard, weights: DecoderWeights, seed: int) -> None:
    """Of every tensor of the checkpoint there would be, a part: ranks that hold the same have the same."""
    shapes, offset = whole_shapes(shard.whole), shard.whole.norms.offset
    for name, slot in shard_slots(shard, weights).items():
        generator = torch.Generator().manual_seed(seed ^ crc32(name.encode()))
        shape, kind = shapes[name], name.rpartition(".")[0]
        if kind.endswith(("norm", "layernorm")):
            tensor = torch.full(shape, 1.0 - offset)
        else:
            small = len(shape) == 1 or name.endswith(("bias", "embed_tokens.weight"))
            tensor = torch.randn(shape, generator=generator) * (0.02 if small else shape[-1] ** -0.5)
        slot.fill(apply_cut(tensor, slot.cut))


def assemble(
    spec: ModelSpec,
    weights: DecoderWeights,
    quantization: str | None = None,
    max_length: int | None = None,
    part: Part | None = None,
) -> StageDecoder:
    """The fastest decoder there is for loaded weights, which it takes over. part: what of a model they are."""
    dtype, device = weights.dtype, weights.norm.device
    native = (
        kernels()
        if supports(dtype, device) and can_run(spec if part is None else part.shard.whole, dtype)
        else None
    )
    bits = None if quantization is None else QUANTIZATIONS[quantization]
    # A tied embedding is rounded with the head, also where a stage has no head beside it.
    apart = part is not None and part.shard.whole.tied_embeddings and not spec.tied_embeddings
    if native is not None and all(
        can_pack(matrix) for _, matrix in named_tensors(weights) if matrix.dim() > 1 and matrix.numel()
    ):
        bind(spec, weights, Binder(native, bits), embedding=apart and bits is not None)
        return CpuDecoder(spec, weights, native, max_length, part)
    if bits is not None:
        bind(spec, weights, Binder(None, bits), embedding=apart)
    return NativeDecoder(spec, weights, max_length, part)


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
    whole: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Fill every slot from the directory's safetensors files. canonical: a slot's name of a tensor's; ignored:
    whether a tensor without a slot, by that name, may be left out. whole: shapes of the tensors in the file, of
    which the slots take parts; nothing else of them is read, and nothing of those without a slot. Raises
    ModelError as `load`."""
    total = sum(slot.nbytes for slot in wanted.values())
    unexpected, wrong, done = [], [], 0
    cuts = {name: slot.cut for name, slot in wanted.items()}
    skipped = set() if whole is None else set(whole) - set(wanted)
    progress(0, total)

    def chosen(stored_name: str) -> bool:
        return plain_name(canonical(stored_name)) not in skipped

    def cut_of(stored_name: str) -> Cut:
        return cuts.get(canonical(stored_name), ())

    for stored_name, tensor in plain_tensors(_tensors(weight_files(directory), chosen, cut_of)):
        name = canonical(stored_name)
        slot = wanted.pop(name, None)
        expected = None if slot is None else slot.file_shape
        if slot is not None and slot.cut and whole is not None and tuple(tensor.shape) == whole[name]:
            tensor = apply_cut(tensor, slot.cut)  # quantised ones are made plain first
        if slot is None:
            if not ignored(name):
                unexpected.append(stored_name)
        elif expected != tuple(tensor.shape):
            wrong.append(
                f"{stored_name} is {list(tensor.shape)}, config.json asks for {list(expected or ())}"
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
    files: list[Path],
    chosen: Callable[[str], bool] = lambda name: True,
    cut_of: Callable[[str], Cut] = lambda name: (),
) -> Iterator[tuple[str, Tensor]]:
    """Every chosen (name, tensor) on CPU, memory-mapped: a tensor is read when it is copied, and dropped then. Of
    one with a cut only that is read, unless it is quantised, where values and scales are cut in different
    places."""
    with ExitStack() as stack:
        for path in files:
            try:
                file = stack.enter_context(safe_open(str(path), framework="pt", device="cpu"))
            except (SafetensorError, OSError) as e:
                raise ModelError(
                    f"{path} is not a readable safetensors file: {e}.", "Download it again."
                ) from None
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if not chosen(name):
                    continue
                cut = cut_of(name)
                if not cut or not is_plain(name, file.get_slice(name).get_dtype()):
                    yield name, file.get_tensor(name)
                else:
                    yield name, _read_cut(file.get_slice(name), cut)


def _read_cut(stored: Any, cut: Cut) -> Tensor:
    """What a cut leaves of a tensor in a file. stored: a slice of safe_open, whose shape may not be what the cut
    was made for: the whole tensor then, for the message about it."""
    shape = tuple(stored.get_shape())
    if any(dim >= len(shape) or r.stop > shape[dim] for dim, ranges in cut for r in ranges):
        return stored[:]
    (dim, ranges), *rest = cut
    index = [slice(None)] * len(shape)
    parts = []
    for r in ranges:
        index[dim] = slice(r.start, r.stop)
        parts.append(stored[tuple(index)])
    return apply_cut(torch.cat(parts, dim) if len(parts) > 1 else parts[0], tuple(rest))
