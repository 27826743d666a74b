"""The process groups of an engine's ranks: the control line from rank 0, the sums of a stage, the way from stage to
stage and the way back of logits. All of torch.distributed that the hot path calls is here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llmtool.models.part import Peers
from llmtool.parallel.mesh import Mesh, Place
from llmtool.runtime.parallel.shared import SharedPeers, share
from llmtool.runtime.parallel.wire import HEAD, Words

FOREVER = timedelta(
    days=365
)  # a rank without work waits for the next step; the heartbeat says whether it will come
_HIDDEN, _LOGITS = 1, 2  # tags


class StagePeers:
    """`Peers` (llmtool/models/part.py) over the process group of a stage."""

    def __init__(self, group: dist.ProcessGroup, size: int) -> None:
        self._group, self._size = group, size

    def sum(self, x: Tensor) -> Tensor:
        if self._size > 1:
            x = x.contiguous()
            dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        if self._size == 1 or not any(counts):
            return x
        most = max(counts)  # rows of all ranks are as many: some are padding
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        out = x.new_empty(self._size * most, *x.shape[1:])
        dist.all_gather(list(out.split(most)), padded, group=self._group)
        if min(counts) == most:
            return out
        return torch.cat([part[:n] for part, n in zip(out.split(most), counts, strict=True)])

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self._group)
        return out


class Links:
    """What joins this rank to the others. Every rank makes one, at the same time, after `init_process_group`."""

    def __init__(
        self,
        mesh: Mesh,
        place: Place,
        device: torch.device,
        seconds: float,
        store: dist.Store | None = None,
    ) -> None:
        """seconds: how long to wait for another rank. store: for ranks of one machine's CPUs to find memory that
        they share; None does all by sockets."""
        self.mesh, self.place, self.device = mesh, place, device
        self._limit = timedelta(seconds=seconds)
        backend = "nccl" if device.type == "cuda" else "gloo"
        everyone = list(range(mesh.world))
        self._control = _group(everyone, "gloo", FOREVER)
        # Apart, so that neither way waits for the other where a backend keeps their order.
        self._forward = _group(everyone, backend, self._limit)
        self._back = _group(everyone, backend, self._limit)
        stages = [_group(list(mesh.stage_ranks(s)), backend, self._limit) for s in range(mesh.pp)]
        group = stages[place.stage]
        self.peers: Peers = StagePeers(group, mesh.tp)
        ranks = mesh.stage_ranks(place.stage)
        together = len({mesh.place(rank).node for rank in ranks}) == 1
        if store is not None and device.type == "cpu" and together:
            name = f"shared/{place.stage}"
            self.peers = share(self.peers, group, store, name, place.tensor, mesh.tp, seconds)
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # on their way; what is sent must stay as it is
        self._next: tuple[Tensor, dist.Work] | None = None

    def watch_over(self, health: Callable[[], None]) -> None:
        """Have waits that no socket ends ask whether the others are there."""
        if isinstance(self.peers, SharedPeers):
            self.peers.health = health

    # -- control -------------------------------------------------------------------------------------------

    def tell(self, words: Words) -> None:
        """From rank 0 to all, without waiting for them."""
        head = torch.zeros(HEAD, dtype=torch.int32)
        head[: len(words)] = torch.from_numpy(words[:HEAD])
        parts = [head] if len(words) <= HEAD else [head, torch.from_numpy(words[HEAD:].copy())]
        for part in parts:
            self._keep(dist.broadcast(part, 0, group=self._control, async_op=True), part)

    def hear(self) -> Words:
        """The next message of rank 0. The one after it is then listened for already, so that rank 0 need not wait
        until this rank has worked off this one."""
        head, work = self._next or self._listen()
        work.wait()
        length = int(head[0])
        words = head[:length].numpy()
        if length > HEAD:
            rest = torch.empty(length - HEAD, dtype=torch.int32)
            dist.broadcast(rest, 0, group=self._control)
            words = np.concatenate([head.numpy(), rest.numpy()])
        self._next = self._listen()
        return words

    def _listen(self) -> tuple[Tensor, dist.Work]:
        head = torch.empty(HEAD, dtype=torch.int32)
        work = dist.broadcast(head, 0, group=self._control, async_op=True)
        assert work is not None
        return head, work

    # -- from stage to stage, and back ----------------------------------------------------------------------

    def send_on(self, hidden: Tensor) -> None:
        """To the same place of the next stage. hidden may be overwritten afterwards."""
        self._send(hidden.clone(), self.place.rank + self.mesh.tp, self._forward, _HIDDEN)

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """From the same place of the stage before."""
        hidden = torch.empty(shape, dtype=dtype, device=self.device)
        self._receive(hidden, self.place.rank - self.mesh.tp, self._forward, _HIDDEN)
        return hidden

    def send_back(self, logits: Tensor) -> None:
        """To rank 0. One at a time: logits are large."""
        while self._sent:
            self._wait(self._sent.popleft()[0])
        self._send(logits, 0, self._back, _LOGITS)

    def receive_back(self, parts: Sequence[Tensor], ranks: Sequence[int]) -> None:
        """Logits of the last stage's ranks, each into its part."""
        works = [
            dist.irecv(part, rank, group=self._back, tag=_LOGITS)
            for part, rank in zip(parts, ranks, strict=True)
        ]
        for work in works:
            assert work is not None
            self._wait(work)

    def flush(self) -> None:
        """Until everything that was sent has left."""
        while self._sent:
            self._wait(self._sent.popleft()[0])

    def _send(self, x: Tensor, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        self._keep(dist.isend(x, rank, group=group, tag=tag), x)

    def _keep(self, work: dist.Work | None, x: Tensor) -> None:
        assert work is not None
        # What was sent so many steps ago has been used: no step that is not collected is older.
        while len(self._sent) >= 2 * self.mesh.pp + 4 or (self._sent and self._sent[0][0].is_completed()):
            self._wait(self._sent.popleft()[0])
        self._sent.append((work, x))

    def _receive(self, x: Tensor, rank: int, group: dist.ProcessGroup, tag: int) -> None:
        work = dist.irecv(x, rank, group=group, tag=tag)
        assert work is not None
        self._wait(work)

    def _wait(self, work: dist.Work) -> None:
        work.wait(self._limit)


def _group(ranks: list[int], backend: str, limit: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(ranks, timeout=limit, backend=backend)
    assert group is not None
    return group
