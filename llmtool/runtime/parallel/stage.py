"""Stage: one rank's part of every step: its sequences' tables, its pages, its layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtool.core.ports import SchedulerOutput
from llmtool.models.decoder import KVContext, StageDecoder
from llmtool.parallel.shard import Shard
from llmtool.runtime.batch import SequenceTable, StepInputs
from llmtool.runtime.executor import wanted_rows
from llmtool.runtime.kv_store import KVStore
from llmtool.runtime.parallel.links import Links

Ints = NDArray[np.int64]


class StageRun:
    """Runs a rank's layers over inputs; hidden states come and go by `links`."""

    def __init__(self, model: StageDecoder, shard: Shard, store: KVStore, links: Links) -> None:
        self.model, self.shard, self.links = model, shard, links
        self._store, self._layers, self._states = store, store.places(), store.states()

    def forward(self, inputs: StepInputs, wanted: Sequence[Ints]) -> Tensor | None:
        """Hidden states [R, hidden] of the wanted rows, chunk after chunk, after the model's last layer; None where
        they go to another stage."""
        n, hidden = len(inputs.input_ids), None
        if not self.shard.first:
            hidden = self.links.receive((n, self.shard.spec.hidden_size), self.model.stream)
        kv = KVContext(self._store.arena, self._layers, inputs.batches, self._states)
        rows = None
        if self.shard.last:  # whose ranks all leave the same rows out
            rows = torch.from_numpy(wanted_rows(wanted)).to(self.model.device)
        narrow = rows if rows is not None and len(rows) < n else None
        out = self.model.forward(inputs.input_ids, inputs.positions, kv, narrow, hidden)
        if rows is not None:
            return out if narrow is not None else out[rows]
        self.links.send_on(out)
        return None


class Follower:
    """A rank that is told what to do: it keeps tables as rank 0 does, and has no sampler."""

    def __init__(self, run: StageRun, store: KVStore, max_num_seqs: int, max_model_len: int) -> None:
        self._run, self._store = run, store
        self._sequences = SequenceTable(store.groups, max_num_seqs, max_model_len)

    @torch.inference_mode()
    def step(self, out: SchedulerOutput, wanted: Sequence[Ints]) -> None:
        """out: about this rank's pages."""
        for seq in (*out.finished, *out.preempted):
            self._sequences.remove(seq)
        self._store.swap_out(out.swap_out)
        self._store.swap_in(out.swap_in)
        self._store.copy(out.copies)
        for new in out.new:
            self._sequences.remove(new.id)
            self._sequences.add(new)
        if not out.scheduled:
            return
        rows = self._sequences.apply(out.scheduled)
        run = self._run
        hidden = run.forward(self._sequences.inputs(out.scheduled, rows, run.model.device), wanted)
        if hidden is not None and wanted:
            for part in hidden.split([len(chunk) for chunk in wanted]):
                run.links.send_back(run.model.logits(part).contiguous())
