"""ParallelExecutor: rank 0 of an engine over several processes, and how such an engine is put together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmtool.config import EngineConfig
from llmtool.core.memory.geometry import KVCacheGroup
from llmtool.core.memory.page_plan import PagePlan
from llmtool.core.ports import SchedulerOutput, StepResult
from llmtool.core.speculation.build import model_of
from llmtool.errors import EngineDead, LLMToolError, UsageError
from llmtool.models.decoder import KVContext
from llmtool.models.tokenizer import Tokenizer
from llmtool.modelspec import ModelSpec
from llmtool.parallel.mesh import split
from llmtool.parallel.pages import LocalPages
from llmtool.parallel.shard import check
from llmtool.runtime.batch import StepInputs
from llmtool.runtime.drafter import make_drafter
from llmtool.runtime.executor import (
    Ints,
    TorchExecutor,
    describe,
    fraction,
    grammar_factory,
    tokenizer_dir_of,
)
from llmtool.runtime.kv_store import KVStore
from llmtool.runtime.parallel.rank import agree, mesh_of, prepare, whole_spec
from llmtool.runtime.parallel.rendezvous import gather_nodes, host
from llmtool.runtime.parallel.stage import StageRun
from llmtool.runtime.parallel.watch import Order, Watch, Workers
from llmtool.runtime.parallel.wire import Numbers, encode, localise, stop
from llmtool.runtime.parallel.worker import lost_peer
from llmtool.runtime.parts import EngineParts, Progress

WHY = 5.0  # seconds to find out why a rank is gone, once it is known that one is
END = 5.0  # and for workers to end


@dataclass(frozen=True, slots=True)
class WholeModel:
    """What the executor must know of a model of which it has a part. Sizes are this rank's."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    weight_bytes: int
    kv_scales: dict[int, tuple[float, float]]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv: KVContext,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        raise AssertionError("a part of a model runs in its stage")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a part of a model runs in its stage")


class ParallelExecutor(TorchExecutor):
    """An `Executor` over all ranks of a mesh: decisions go out as integers, logits come back from the last stage,
    and are sampled here. As many steps are in flight as there are stages.

    Raises EngineDead, with the reason, where a rank is lost.
    """

    def __init__(
        self,
        model: WholeModel,
        store: KVStore,
        run: StageRun,
        plan: KVCacheGroup | PagePlan,
        pages: LocalPages,
        watch: Watch,
        max_num_seqs: int,
        max_model_len: int,
        **options: Any,
    ) -> None:
        super().__init__(model, store, max_num_seqs, max_model_len, **options)
        self.max_in_flight = run.shard.mesh.pp
        self.plan_groups = (plan,) if isinstance(plan, KVCacheGroup) else plan.groups
        self._run, self._pages, self._watch = run, pages, watch
        self._numbers = Numbers()
        self._decision: SchedulerOutput | None = None  # to be told, in the plan's own table entries
        mesh = run.shard.mesh
        self._last_ranks = mesh.stage_ranks(mesh.pp - 1)
        self._vocabulary = split(run.shard.whole.vocab_size, mesh.tp)

    def submit(self, out: SchedulerOutput) -> None:
        with self._together():
            super().submit(out)

    def collect(self) -> StepResult:
        with self._together():
            return super().collect()

    def close(self) -> None:
        """Tell the others to stop."""
        if self._watch.failure is None:
            with self._together():
                self._run.links.tell(stop())
                self._run.links.flush()

    def _begin(self, out: SchedulerOutput) -> Any:
        self._decision = out
        step = super()._begin(localise(out, self._pages))
        if self._decision is not None:  # nothing to compute, but pages to move or sequences to forget
            self._tell([])
        return step

    def _forward(self, step: Any, inputs: StepInputs) -> torch.Tensor | None:
        self._tell(step.wanted)
        return self._run.forward(inputs, step.wanted)

    def _tell(self, wanted: list[Ints]) -> None:
        assert self._decision is not None
        self._run.links.tell(encode(self._decision, wanted, self._numbers))
        self._decision = None

    def _logits(self, hidden: torch.Tensor | None, begin: int, count: int) -> torch.Tensor:
        device, me = self.model.device, self._run.shard.place.rank
        parts, ranks, own = [], [], None
        for rank, vocabulary in zip(self._last_ranks, self._vocabulary, strict=True):
            if rank == me:
                assert hidden is not None
                own = self._run.model.logits(hidden[begin : begin + count])
                parts.append(own)
            else:
                parts.append(torch.empty(count, len(vocabulary), device=device))
                ranks.append(rank)
        self._run.links.receive_back([part for part in parts if part is not own], ranks)
        return torch.cat(parts, dim=1)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Errors of the line to other ranks become what is wrong with them."""
        self._watch.health()
        try:
            yield
        except LLMToolError:
            raise
        except Exception as error:
            if not lost_peer(error):
                raise
            raise self._watch.why(WHY) or EngineDead(
                f"A rank of the engine is gone or too slow: {error}.", "Restart the server; see its log."
            ) from error


def build_parallel(config: EngineConfig, directory: Path, progress: Progress) -> EngineParts:
    """Start the other ranks, load this one's part, and size the pages for all. Raises as `build_engine`, and
    EngineDead where a rank is lost meanwhile."""
    mesh, whole = mesh_of(config), whole_spec(directory)
    check(whole, mesh)
    if config.spec not in ("off", "0") and (model_of(config.proposer) or ("", ""))[0] == "pruned":
        raise UsageError(
            "The proposer pruned takes layers of a whole model, and this rank has a part of it.",
            "Use --proposer suffix, or draft:MODEL.",
        )
    store, port = host(config)
    if mesh.nodes > 1:
        progress(f"Waiting for {mesh.nodes - 1} more nodes", 0.0)
        gather_nodes(store, config)
    address = config.master_addr
    mine, *others = mesh.node_ranks(0)
    workers = Workers(others, Order(config, mine, directory, address, port, 0))
    try:
        watch = Watch(workers, mesh.world, address, port, config)
    except BaseException:
        workers.kill()
        raise

    def close(executor: ParallelExecutor | None = None) -> None:
        try:
            watch.close()  # from here on, ranks may end
            if executor is not None:
                executor.close()
                workers.join(END)
        except LLMToolError:
            pass  # whatever is wrong with a rank, it ends now
        finally:
            workers.kill()
            if dist.is_initialized():
                dist.destroy_process_group()

    try:
        rank = prepare(config, directory, mine, store, fraction(progress, "Loading weights"))
        tokens = directory if config.tokenizer is None else tokenizer_dir_of(config)
        spec, model = whole, rank.model
        view = WholeModel(spec, model.device, model.dtype, model.weight_bytes, dict(model.kv_scales))
        rank.links.watch_over(watch.health)
        drafter = make_drafter(config, view, tokens)
        budget = agree(config, rank, store, watch.health)
        eos = spec.eos_ids or tuple(i for i in [Tokenizer.from_dir(tokens).eos_id] if i is not None)
        pages = rank.store(budget)
        executor = ParallelExecutor(
            view,
            pages,
            StageRun(model, rank.shard, pages, rank.links),
            rank.plan,
            rank.pages,
            watch,
            config.max_num_seqs,
            budget.max_model_len,
            eos_token_ids=eos,
            grammars=grammar_factory(tokens, spec.vocab_size, eos),
        )
        progress("Warming up", 1.0)
        executor.warmup()
    except Exception as error:
        failure = watch.failure or (watch.why(WHY) if lost_peer(error) else None)
        close()
        if failure is not None:
            raise failure from error
        raise
    scheduler = config.scheduler(budget.max_model_len)
    info = describe(config, executor, scheduler, str(tokens), eos, rank.activations, rank.num_threads, 0)
    return EngineParts(
        executor,
        rank.plan,
        budget.num_pages,
        budget.host_pages,
        scheduler,
        info,
        executor.prepare_grammars,
        drafter,
        watch.health,
        lambda: close(executor),
    )
