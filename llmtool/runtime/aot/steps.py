"""A served decoder's steps, captured by shape: decoding, verification and small mixed steps replay a CUDA graph.

A step's shape is how many new tokens each sequence has. Where all have the same number (1 decodes, k + 1 verify k
drafts), the number of sequences is rounded up to a bucket and the step padded with copies of its shortest sequence,
which write nothing; buckets follow the sizes that come. Any other small step is a shape of its own. Shapes are
captured when they are hot, one at a time, and run eagerly until then. Everything else a launch depends on lies in
memory that is filled before each replay: ids, positions, pages, and the attention's work list, whose size depends
on the shape alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from llmtool_kernels.attention import AttentionBatch
from torch import Tensor

from llmtool.config import MAX_CAPTURED_TOKENS as MAX_TOKENS
from llmtool.models.decoder import Decoder, KVContext, LayerPlace
from llmtool.runtime.aot.buckets import Hotness, Ladder
from llmtool.runtime.batch import StepInputs

log = logging.getLogger("llmtool.aot")
Shape = tuple[int, ...]  # new tokens of each sequence
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MAX_SHAPES = 32
THRESHOLD = 3


class Capture(Protocol):
    """Runs a step once and returns its result, a tensor at an address that stays, and what runs it again."""

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]: ...


class CudaCapture:
    """CUDA graphs that share a memory pool: no two steps run at once, and a result is read before the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # compiles kernels and makes plans, which a capture must not
            step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = step()
        return result, graph.replay


@dataclass(slots=True)
class _Captured:
    ids: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]
    batches: tuple[AttentionBatch, ...]
    hidden: Tensor  # [N, hidden]
    replay: Callable[[], None]


class StepGraphs:
    """Runs what is captured, captures what is hot.

    widths: entries of a block table of each KV group for the longest sequence. max_num_seqs: bounds the buckets.
    """

    def __init__(
        self,
        model: Decoder,
        arena: Tensor,
        layers: Mapping[int, LayerPlace],
        widths: Sequence[int],
        max_num_seqs: int,
        capture: Capture,
        threshold: int = THRESHOLD,
    ) -> None:
        self.model, self._arena, self._layers, self._widths = model, arena, layers, tuple(widths)
        self._buckets = (*(b for b in BUCKETS if b < max_num_seqs), max_num_seqs)
        self._ladders: dict[int, Ladder] = {}  # by new tokens of a sequence
        self._capture = capture
        self._captured: dict[Shape, _Captured] = {}
        self._refused: set[Shape] = set()
        self._numbers: dict[Shape, int] = {}
        self._hot = Hotness(threshold)
        self._broken = ""
        self.capture_seconds: dict[Shape, float] = {}

    def forward(self, inputs: StepInputs) -> Tensor:
        """`model.forward` of the step, [N, hidden]; it may be overwritten by the next call."""
        shape = self.shape_of(inputs)
        if shape is None or self._broken or shape in self._refused:
            return self._eager(inputs)
        self._note(shape[0], inputs)
        captured = self._captured.get(shape)
        if captured is None:
            number = self._numbers.setdefault(shape, len(self._numbers))
            started = time.perf_counter()
            hidden = self._eager(inputs)
            self._hot.note(number, time.perf_counter() - started)
            if self._hot.hottest() == number and len(self._captured) < MAX_SHAPES:
                self._hot.forget(number)
                hidden = hidden.clone()  # a capture runs the step again
                self._add(shape, inputs)
            return hidden
        _fill(captured, inputs, shape, self._device)
        captured.replay()
        return captured.hidden[: len(inputs.input_ids)]

    @property
    def shapes(self) -> list[Shape]:
        return list(self._captured)

    @property
    def _device(self) -> torch.device:
        return self.model.device

    def shape_of(self, inputs: StepInputs) -> Shape | None:
        """The shape that a step runs in; None if it is too large."""
        lengths = inputs.lengths.tolist()
        shape: Shape = tuple(lengths)
        if len(set(lengths)) == 1:
            count = self._ladder(lengths[0]).bucket_of(len(lengths))
            shape = shape[:1] * (count or 0)
        return shape if 0 < sum(shape) <= MAX_TOKENS and len(shape) >= len(lengths) else None

    def _ladder(self, each: int) -> Ladder:
        if each not in self._ladders:
            self._ladders[each] = Ladder(self._buckets)
        return self._ladders[each]

    def _note(self, each: int, inputs: StepInputs) -> None:
        """A step of sequences with `each` new tokens came, if it is of such."""
        lengths = inputs.lengths.tolist()
        if len(set(lengths)) == 1 and len(self._captured) < MAX_SHAPES:
            made = [len(shape) for shape in self._captured if set(shape) == {each}]
            self._ladder(each).note(len(lengths), made)

    def _eager(self, inputs: StepInputs) -> Tensor:
        kv = KVContext(self._arena, self._layers, inputs.batches)
        return self.model.forward(inputs.input_ids, inputs.positions, kv)

    def _add(self, shape: Shape, inputs: StepInputs) -> None:
        if any(batch.tree is not None for batch in _attention(inputs)):
            self._refused.add(shape)  # a tree's words are another launch
            return
        started = time.perf_counter()
        captured = _buffers(shape, self._widths, self._device)
        _fill(captured, inputs, shape, self._device)
        kv = KVContext(self._arena, self._layers, captured.batches)
        try:
            captured.hidden, captured.replay = self._capture(
                lambda: self.model.forward(captured.ids, captured.positions, kv)
            )
        except torch.OutOfMemoryError:
            self._stop("there is no memory for more captured steps", shape)
        except RuntimeError as error:
            # What waits for the device, as some choices of experts do, can be captured in no shape.
            self._stop(f"a step cannot be captured: {str(error).splitlines()[0]}", shape)
        else:
            self._captured[shape] = captured
            self.capture_seconds[shape] = time.perf_counter() - started

    def _stop(self, why: str, shape: Shape) -> None:
        """Keep what is captured; the rest runs eagerly from now on."""
        self._refused.add(shape)
        if not self._broken:
            log.warning("Steps of new shapes run eagerly: %s.", why)
        self._broken = why if not self._captured else self._broken
        self._hot = Hotness(1 << 62)


def _attention(inputs: StepInputs) -> list[AttentionBatch]:
    """The step's groups, none of which keeps a state: graphs hold none."""
    batches = [batch for batch in inputs.batches if isinstance(batch, AttentionBatch)]
    assert len(batches) == len(inputs.batches)
    return batches


def _buffers(shape: Shape, widths: Sequence[int], device: torch.device) -> _Captured:
    n, count = sum(shape), len(shape)

    def zeros(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    batches = tuple(
        AttentionBatch(
            query_start=zeros(count + 1, dtype=torch.int32),
            seq_lens=zeros(count, dtype=torch.int32),
            block_tables=zeros(count, width, dtype=torch.int32),
            token_units=zeros(n),
            token_slots=zeros(n),
            query_lens=list(shape),
            kv_lens=list(shape),
        )
        for width in widths
    )
    return _Captured(zeros(n), zeros(n), batches, torch.empty(0), lambda: None)


def _fill(captured: _Captured, inputs: StepInputs, shape: Shape, device: torch.device) -> None:
    """The step's inputs to where the graph reads them, padded with copies of the shortest sequence."""
    n, count = len(inputs.input_ids), len(inputs.lengths)
    missing = len(shape) - count
    each = shape[0]
    for batch, given in zip(captured.batches, _attention(inputs), strict=True):
        width = given.block_tables.shape[1]
        batch.block_tables[:count, :width].copy_(given.block_tables)
        batch.seq_lens[:count].copy_(given.seq_lens)
        batch.query_start[: count + 1].copy_(given.query_start)
        batch.token_units[:n].copy_(given.token_units)
        batch.token_slots[:n].copy_(given.token_slots)
        lengths = list(given.kv_lens)
        if missing:
            shortest = min(range(count), key=lengths.__getitem__)
            own = slice(shortest * each, (shortest + 1) * each)
            batch.block_tables[count:].copy_(batch.block_tables[shortest].expand(missing, -1))
            batch.seq_lens[count:].copy_(given.seq_lens[shortest].expand(missing))
            tail = torch.arange(count + 1, len(shape) + 1, dtype=torch.int32, device=device) * each
            batch.query_start[count + 1 :].copy_(tail)
            batch.token_units[n:].copy_(given.token_units[own].repeat(missing))
            # Slot -1 writes nothing on a GPU; torch's writing on a CPU knows none, and writes the same again.
            if device.type == "cuda":
                batch.token_slots[n:].fill_(-1)
            else:
                batch.token_slots[n:].copy_(given.token_slots[own].repeat(missing))
            lengths += [lengths[shortest]] * missing
        batch.kv_lens = lengths
        for works in batch._plans.values():
            for work in works:
                _refresh(work, list(shape), lengths)
    captured.ids[:n].copy_(inputs.input_ids)
    captured.positions[:n].copy_(inputs.positions)
    if missing:
        shortest = min(range(count), key=list(_attention(inputs)[0].kv_lens).__getitem__)
        own = slice(shortest * each, (shortest + 1) * each)
        captured.ids[n:].copy_(inputs.input_ids[own].repeat(missing))
        captured.positions[n:].copy_(inputs.positions[own].repeat(missing))


def _refresh(work: Any, query_lens: list[int], kv_lens: list[int]) -> None:
    refresh = getattr(work, "refresh", None)
    if refresh is not None:  # the torch path plans anew in each call
        refresh(query_lens, kv_lens)
