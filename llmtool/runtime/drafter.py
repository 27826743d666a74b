"""A model that drafts: another one with the same tokens, or the target with layers left out.

It has pages of its own and catches up lazily: what it has not read of a sequence, because nothing was drafted for
a while or a draft was wrong, is computed with the next draft. It says what it thinks most likely, greedily.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from llmtool_kernels.attention import AttentionBatch

from llmtool.config import EngineConfig
from llmtool.core.memory.allocator import OutOfPages
from llmtool.core.memory.geometry import uniform_group
from llmtool.core.memory.uniform import UniformAllocator
from llmtool.core.speculation.build import model_of
from llmtool.core.speculation.draft import MAX_DEPTH
from llmtool.errors import UsageError
from llmtool.models.decoder import Decoder, KVContext
from llmtool.models.layer_mask import default_layers, layer_mask, parse_layers
from llmtool.models.loader import load
from llmtool.models.resolve import resolve
from llmtool.models.tokenizer import Tokenizer
from llmtool.runtime.device import device_memory
from llmtool.runtime.kv_store import KVStore
from llmtool.runtime.sampler import largest

MEMORY_SHARE = 8  # the drafter's pages take at most one part in so many of the memory that is free


class ModelDrafter:
    """A `BatchProposer`. max_batched_tokens: computed at once while catching up; who needs more waits a step.
    max_length: of a sequence that it drafts for, drafts included."""

    def __init__(
        self, name: str, model: Decoder, store: KVStore, max_batched_tokens: int, max_length: int
    ) -> None:
        self.name = name
        self.model = model
        self.last_seconds = 0.0
        self._store = store
        self._allocator = UniformAllocator(store.group, store.num_pages, prefix_caching=False)
        self._layers = {layer: (layout, 0) for layer, layout in store.layouts().items()}
        self._budget, self._max_length = max_batched_tokens, max_length
        self._computed: dict[str, list[int]] = {}  # tokens whose KV it has; longest unused first

    def draft(
        self, seqs: Sequence[str], tokens: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> list[list[int]]:
        started = time.perf_counter()
        drafts: list[list[int]] = [[] for _ in seqs]
        with torch.inference_mode():
            ready = self._catch_up(seqs, tokens, drafts)
            for depth in range(1, max(lengths, default=0)):
                ready = [i for i in ready if lengths[i] > depth and self._room(seqs[i], seqs)]
                if not ready:
                    break
                self._forward([(seqs[i], [drafts[i][-1]]) for i in ready], [drafts[i] for i in ready])
        self.last_seconds = time.perf_counter() - started
        return drafts

    def finish(self, seq: str) -> None:
        if self._computed.pop(seq, None) is not None:
            self._allocator.end(seq)

    @property
    def pages_used(self) -> int:
        return self._allocator.usage()[0]

    def _catch_up(
        self, seqs: Sequence[str], tokens: Sequence[Sequence[int]], drafts: list[list[int]]
    ) -> list[int]:
        """Read what is not read of each sequence, as far as the budget goes. Returns those with a first token."""
        budget, work, ready, first = self._budget, [], [], []
        for i, (seq, known) in enumerate(zip(seqs, tokens, strict=True)):
            if len(known) + MAX_DEPTH > self._max_length:
                continue
            have = self._resume(seq, known)
            part = list(known[have : have + budget])
            if not part or not self._reserve(seq, known, have + len(part), seqs):
                continue
            budget -= len(part)
            work.append((seq, part))
            whole = have + len(part) == len(known)
            first.append(drafts[i] if whole else [])
            if whole:
                ready.append(i)
        if work:
            self._forward(work, first)
        return ready

    def _resume(self, seq: str, known: Sequence[int]) -> int:
        """How many of the known tokens are computed already, at least one short of all; the rest is given up."""
        have = self._computed.pop(seq, None)
        if have is None:
            return 0
        self._computed[seq] = have
        same = min(len(have), len(known) - 1)
        while same and have[:same] != list(known[:same]):
            same -= 1
        if same < len(have):
            del have[same:]
            self._allocator.truncate(seq, same)
        return same

    def _reserve(self, seq: str, known: Sequence[int], target: int, busy: Sequence[str]) -> bool:
        """Pages for `target` tokens, of sequences that are not `busy` if need be. False: there are none."""
        while True:
            try:
                if seq in self._computed:
                    self._allocator.extend(seq, target)
                else:
                    self._allocator.begin(seq, known[:target], target)
                    self._computed[seq] = []
                return True
            except OutOfPages:
                idle = next((other for other in self._computed if other not in busy), None)
                if idle is None:
                    return False
                self.finish(idle)

    def _room(self, seq: str, busy: Sequence[str]) -> bool:
        computed = self._computed[seq]
        return self._reserve(seq, computed, len(computed) + 1, busy)

    def _forward(self, work: Sequence[tuple[str, list[int]]], drafts: Sequence[list[int]]) -> None:
        """Compute these tokens; append what the model says after each sequence's last to its draft."""
        starts = [len(self._computed[seq]) for seq, _ in work]
        lengths = [len(part) for _, part in work]
        size, device = self._store.group.tokens_per_page, self.model.device
        ends = [start + n for start, n in zip(starts, lengths, strict=True)]
        tables = [self._allocator.table(seq)[0] for seq, _ in work]
        batch = AttentionBatch.build(lengths, ends, tables, size, device)
        ids = torch.tensor([token for _, part in work for token in part], device=device)
        at = [position for start, end in zip(starts, ends, strict=True) for position in range(start, end)]
        kv = KVContext(self._store.arena, self._layers, (batch,))
        hidden = self.model.forward(ids, torch.tensor(at, device=device), kv)
        last = torch.from_numpy(np.cumsum(lengths) - 1).to(device)
        said = largest(self.model.logits(hidden[last]))[1].tolist()
        for (seq, part), draft, token in zip(work, drafts, said, strict=True):
            self._computed[seq] += part
            draft.append(token)


def make_drafter(config: EngineConfig, target: Decoder, tokenizer_dir: Path) -> ModelDrafter | None:
    """The drafter that the settings ask for, or None. Pages for max_num_seqs sequences, if memory allows.

    Raises UsageError for a draft model with other tokens, or layers that the target lacks; what `load` raises.
    """
    needed = None if config.spec in ("off", "0") else model_of(config.proposer)
    if needed is None:
        return None
    kind, argument = needed
    if kind == "pruned":
        count = target.spec.num_layers
        model = layer_mask(target, parse_layers(argument, count) if argument else default_layers(count))
    else:
        directory = resolve(argument)
        _check_tokens(directory, tokenizer_dir)
        model = load(directory, target.dtype, target.device, max_length=config.max_model_len)
        if model.spec.vocab_size != target.spec.vocab_size:
            raise UsageError(
                f"The draft model has {model.spec.vocab_size} tokens, the model itself {target.spec.vocab_size}.",
                "Take one of the same family.",
            )
    length = min(config.max_model_len or target.spec.max_positions, model.spec.max_positions)
    group = uniform_group(model.spec.layer_cache_specs(model.dtype.itemsize), config.block_size)
    room = device_memory(target.device).free // MEMORY_SHARE // group.page_bytes
    pages = max(1, min(room, config.max_num_seqs * group.pages(length)))
    store = KVStore(group, pages, 0, target.device)
    return ModelDrafter(kind, model, store, config.scheduler(1).max_num_batched_tokens, length)


def _check_tokens(draft: Path, target: Path) -> None:
    ours, theirs = (Tokenizer.from_dir(d).backend.get_vocab(with_added_tokens=True) for d in (target, draft))
    if ours != theirs:
        different = sum(ours.get(piece) != number for piece, number in theirs.items())
        raise UsageError(
            f"The draft model has another tokenizer: {different} of its {len(theirs)} tokens differ.",
            "Take a smaller model of the same family.",
        )
