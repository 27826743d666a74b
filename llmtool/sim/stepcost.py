"""StepCost of a parallel plan: what one step of one engine takes, composed from its operations.

All that depends on the number of tokens alone is added up once per plan, over a list of token counts; attention of
decoding sequences over a list of (sequences, mean context). A step then is a few interpolations, linear between
the entries: the same for one step as for many at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

from llmtool.hardware import Cluster
from llmtool.sim.collectives import Collectives
from llmtool.sim.deployment import Deployment
from llmtool.sim.ir import Attention, Block, Dense, MoE, Recurrent
from llmtool.sim.latent import module_weights, module_work
from llmtool.sim.ops import Cost, Ops

TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 768, 1024, 1536, 2048,
          3072, 4096, 6144, 8192, 16384, 32768, 65536)  # fmt: skip
BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
CONTEXTS = (16, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768, 65536, 131072, 1048576)
BOUNDS = ("compute", "memory", "network", "host")


@dataclass(slots=True)
class Batch:
    """A step's work for one attention group. decodes: sequences with one token; decode_context: tokens they
    attend to, summed. chunks: (tokens, computed before) of prompt chunks. samples: sequences whose logits are
    wanted."""

    decodes: int = 0
    decode_context: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)
    samples: int = 0

    @property
    def tokens(self) -> int:
        return self.decodes + sum(count for count, _ in self.chunks)


@dataclass(slots=True)
class Breakdown:
    """Seconds of a step by what bounds them, and its work on one device."""

    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0
    host: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.network + self.host

    @property
    def bound(self) -> str:
        return max(BOUNDS, key=lambda name: getattr(self, name))

    def add(self, cost: Cost, times: float = 1.0) -> None:
        setattr(self, cost.bound, getattr(self, cost.bound) + cost.seconds * times)
        self.flops += cost.flops * times
        if cost.bound != "network":
            self.bytes += cost.bytes * times


class PlanCost:
    """Costs of the steps of one engine of a deployment on a cluster."""

    def __init__(self, deployment: Deployment, cluster: Cluster, ops: Ops) -> None:
        self.deployment = d = deployment
        self.cluster = cluster
        self.ops = ops
        self._wires = Collectives(cluster, ops)
        self._stages: list[Counter[Block]] = []
        first = 0
        for count in d.plan.stages(d.ir.num_layers):
            self._stages.append(Counter(d.ir.blocks[first : first + count]))
            first += count
        self._linear = [[self._sum_linear(i, m) for m in TOKENS] for i in range(d.plan.pp)]
        self._head = [self._head_cost(m) for m in TOKENS]
        self._decode_rows: dict[tuple[int, int], list[float]] = {}
        self._columns: dict[tuple[int, int], list[float]] = {}
        self._fixed: dict[tuple[int, int], float] = {}
        self._windows: dict[int, Counter[Attention]] = {
            i: self._attentions(stage) for i, stage in enumerate(self._stages)
        }

    def for_deployment(self, deployment: Deployment) -> PlanCost:
        """The same costs, seen from a deployment that differs in its budget or sequences alone."""
        d = self.deployment
        same = (d.ir, d.plan, d.engine, d.dtype, d.kv_dtype)
        assert same == (
            deployment.ir, deployment.plan, deployment.engine, deployment.dtype, deployment.kv_dtype
        )  # fmt: skip
        twin = copy(self)
        twin.deployment = deployment
        return twin

    # -- operations --------------------------------------------------------------------------------------------

    def _gemm(self, m: float, n: float, k: float, dtype: str = "") -> Cost:
        dtype = dtype or self.deployment.dtype
        cost = self.ops.gemm(m, max(1, round(n)), max(1, round(k)), dtype)
        if dtype.endswith("_block"):  # activations are quantised in blocks by a kernel of their own
            extra = self.ops.stream(3.0 * m * k)
            slack = cost.slack + extra.seconds if cost.slack else 0.0
            cost = Cost(cost.seconds + extra.seconds, cost.bound, cost.flops, cost.bytes + extra.bytes, slack)
        return cost

    def linear(self, stage: int, m: float) -> Breakdown:
        """Everything of a stage but attention over the KV cache, the head and the host, for m tokens."""
        d, total = self.deployment, Breakdown()
        for block, times in self._stages[stage].items():
            for cost in self._mixers(block, m) + self._mlp(block, m):
                total.add(self._bound(cost), times)
        if stage:
            total.add(self._wires.send(m * d.ir.hidden * 2.0 / d.plan.tp, d.plan.stage))
        return self._scaled(total)

    def _scaled(self, total: Breakdown) -> Breakdown:
        """With the engine's factors."""
        engine = self.deployment.engine
        total.compute *= engine.compute
        total.memory *= engine.memory
        total.network *= engine.network
        return total

    def _bound(self, cost: Cost) -> Cost:
        return cost.under(self.deployment.engine.compute, self.deployment.engine.memory)

    def _factor(self, cost: Cost) -> float:
        return self.deployment.engine.compute if cost.bound == "compute" else self.deployment.engine.memory

    def _sum_linear(self, stage: int, m: float) -> float:
        return self.linear(stage, m).seconds

    def _mixers(self, block: Block, m: float) -> list[Cost]:
        hidden, tp = self.deployment.ir.hidden, self.deployment.plan.tp
        # Text alone: layers that attend to images are skipped.
        mixers = [x for x in block.mixers if not (isinstance(x, Attention) and x.cross)]
        if not mixers:
            return []
        costs = [self.ops.stream(6.0 * m * hidden)]  # norm and residual
        for mixer in mixers:
            costs += self._mixer(mixer, m)
        costs.append(self._wires.cost("all_reduce", 2.0 * m * hidden, tp))
        return costs

    def _mixer(self, mixer: Attention | Recurrent, m: float) -> list[Cost]:
        tp, hidden = self.deployment.plan.tp, self.deployment.ir.hidden
        costs: list[Cost] = []
        if isinstance(mixer, Recurrent):
            state = mixer.state_bytes / tp
            costs += [
                self._gemm(m, mixer.in_width / tp, hidden),
                self._gemm(m, hidden, mixer.out_width / tp),
                # A decoding sequence reads and writes its state; a prompt does so once per chunk of 64 tokens.
                self.ops.stream(2.0 * min(m, 32 + m / 64) * state + 8.0 * m * mixer.in_width / tp),
            ]
        elif mixer.latent is not None:
            if not self._latent_is_whole(mixer):
                q_rank, rank, nope, rope, v = mixer.latent
                heads = mixer.heads / tp
                q = heads * (nope + rope)
                costs += [
                    self._gemm(m, q_rank + rank + rope, hidden),
                    self._gemm(m, q, q_rank or hidden),
                    self._gemm(m, heads * (nope + v), rank),
                    self._gemm(m, hidden, heads * v),
                ]
        else:
            q, kv, out = mixer.widths
            here = kv / min(tp, mixer.kv_heads)
            costs += [
                self._gemm(m, q / tp + here, hidden),
                self._gemm(m, hidden, out / tp),
                # rotary, norms of heads, cache write
                self.ops.stream(4.0 * m * (mixer.heads * mixer.head_dim / tp + here), "rotary"),
            ]
        return costs

    def _latent_is_whole(self, mixer: Attention) -> bool:
        """Whether a table has the whole attention module, its projections among them."""
        return self.ops.knows(f"latent_decode/{self.deployment.kv_dtype}") and mixer.latent is not None

    def _mlp(self, block: Block, m: float) -> list[Cost]:
        d, mlp, plan = self.deployment, block.mlp, self.deployment.plan
        hidden = d.ir.hidden
        if mlp is None:
            return []
        costs = [self.ops.stream(6.0 * m * hidden)]
        shared = m * plan.attention_dp  # tokens that the stage's MLP sees
        inner = mlp.inner if isinstance(mlp, Dense) else mlp.shared
        if inner:
            part = inner / plan.stage
            first = mlp.matrices - 1 if isinstance(mlp, Dense) else 2
            costs += [
                self._gemm(shared, first * part, hidden),
                self.ops.stream(6.0 * shared * part, "act"),
                self._gemm(shared, hidden, part),
            ]
        if isinstance(mlp, MoE):
            costs += [
                self._gemm(m, mlp.experts, hidden, "bf16"),
                # Choosing experts, sorting tokens by expert, adding their results up: kernels of their own.
                self.ops.stream(8.0 * m * mlp.experts),
                self.ops.stream(4.0 * m * mlp.top_k * 8),
                self.ops.stream(2.0 * m * hidden * (mlp.top_k + 1) / plan.ep),
                self.ops.moe(
                    shared,
                    hidden,
                    mlp.inner / plan.expert_tp,
                    mlp.experts / plan.ep,
                    mlp.experts,
                    mlp.top_k,
                    d.dtype,
                ),
            ]
        return costs + self._mlp_wires(mlp, m)

    def _mlp_wires(self, mlp: Dense | MoE, m: float) -> list[Cost]:
        plan, wires = self.deployment.plan, self._wires
        vector = 2.0 * m * self.deployment.ir.hidden
        if plan.attention_dp == 1:
            return [wires.cost("all_reduce", vector, plan.stage)]
        whole = vector * plan.attention_dp
        gathered = [
            wires.cost("all_gather", whole, plan.attention_dp, plan.tp),
            wires.cost("reduce_scatter", whole, plan.stage),
        ]
        if not isinstance(mlp, MoE) or plan.ep < plan.stage:
            return gathered
        # Experts' tokens go to them and back: each rank sends its tokens to at most top_k others.
        sent = vector * min(mlp.top_k, plan.ep) / plan.tp
        routed = [wires.cost("all_to_all", sent, plan.ep)] * 2
        return min(gathered, routed, key=lambda costs: sum(c.seconds for c in costs))

    def _head_cost(self, samples: float) -> float:
        return self.head(samples).seconds

    def head(self, samples: float) -> Breakdown:
        """The last norm, the vocabulary's matrix and sampling."""
        d, total = self.deployment, Breakdown()
        part = d.ir.vocab / d.plan.tp
        total.add(self._bound(self._gemm(samples, part, d.ir.hidden, "bf16")))
        total.add(self._wires.cost("all_gather", 2.0 * samples * d.ir.vocab, d.plan.tp))
        total.add(self.ops.stream(8.0 * samples * d.ir.vocab, "sampler"))
        return self._scaled(total)

    @staticmethod
    def _attentions(stage: Counter[Block]) -> Counter[Attention]:
        kinds: Counter[Attention] = Counter()
        for block, times in stage.items():
            if isinstance(block.mixer, Attention) and not block.mixer.cross:
                kinds[block.mixer] += times
        return kinds

    def decode_attention(self, mixer: Attention, n: float, context: float) -> Cost:
        """One layer's attention of n decoding sequences, each over `context` tokens (or its window)."""
        d, tp = self.deployment, self.deployment.plan.tp
        seen = mixer.seen(context)
        if mixer.latent is not None:
            return self._bound(self._latent("decode", mixer, n, seen))
        kv_heads = max(1, mixer.kv_heads // tp)
        return self._bound(self.ops.decode(n, seen, mixer.heads // tp, kv_heads, mixer.head_dim, d.kv_dtype))

    def prefill_attention(self, mixer: Attention, chunks: Sequence[tuple[int, int]]) -> Cost:
        """One layer's attention of prompt chunks. The kernel's efficiency is that of as many whole sequences of the
        chunks' mean length."""
        d, tp = self.deployment, self.deployment.plan.tp
        pairs, length, tokens = 0.0, 0.0, 0
        for count, start in chunks:
            full = count * (start + (count + 1) / 2.0)
            reach = mixer.window or (mixer.chunk / 2 if mixer.chunk else None)
            pairs += full if reach is None else min(full, float(count * reach))
            length += start + count
            tokens += count
        n = len(chunks)
        mean = length / n
        if mixer.latent is not None:
            cost = self._latent("prefill", mixer, n, mean)
        else:
            kv_heads = max(1, mixer.kv_heads // tp)
            cost = self.ops.prefill(n, mean, mixer.heads // tp, kv_heads, mixer.head_dim, d.kv_dtype)
        cost = self._bound(cost)
        whole = n * mean * (mean + 1) / 2.0
        if mixer.latent is not None and self._latent_is_whole(mixer):
            share = tokens / (n * mean)  # projections dominate: by tokens
        else:
            share = pairs / whole
        return Cost(max(cost.seconds * share, 3e-6), cost.bound, cost.flops * share, cost.bytes * share)

    def _latent(self, phase: str, mixer: Attention, n: float, length: float) -> Cost:
        d, heads = self.deployment, mixer.heads // self.deployment.plan.tp
        assert mixer.latent is not None
        work = module_work(phase, n, length, heads, mixer.latent, d.ir.hidden, d.dtype, d.kv_dtype)
        if self._latent_is_whole(mixer):
            return self.ops.latent(phase, n, length, heads, work, d.kv_dtype)
        weights = module_weights(mixer.latent, heads, d.ir.hidden)
        tokens = n * length if phase == "prefill" else n
        flops = work[0] - 2.0 * tokens * weights
        rows = n * length * (mixer.latent[1] + mixer.latent[3]) * (1 if d.kv_dtype == "fp8" else 2)
        return self.ops.latent(phase, n, length, heads, (max(0.0, flops), rows), d.kv_dtype)

    # -- steps -------------------------------------------------------------------------------------------------

    def stage_seconds(self, stage: int, batch: Batch) -> float:
        """Kernels and collectives of one stage for one step."""
        d = self.deployment
        tokens = batch.tokens
        seconds = _interpolate(TOKENS, self._linear[stage], tokens)
        # In the order of decode_run, so that both round alike.
        if stage == d.plan.pp - 1 and batch.samples:
            seconds += _interpolate(TOKENS, self._head, batch.samples)
        if batch.chunks:
            for mixer, times in self._windows[stage].items():
                cost = self.prefill_attention(mixer, batch.chunks)
                seconds += times * cost.seconds * self._factor(cost) * d.engine.attention
        if batch.decodes:
            context = batch.decode_context / batch.decodes
            alone = _interpolate(CONTEXTS, self._row(stage, batch.decodes), context)
            seconds += alone * self._beside(batch) if batch.chunks else alone
        return seconds

    def _beside(self, batch: Batch) -> float:
        """Factor on the attention of decoding sequences in a step that has prompt chunks too."""
        prompt = sum(count for count, _ in batch.chunks)
        return self.ops.mixed(prompt, batch.decodes, batch.decode_context / batch.decodes)

    def host(self, sequences: int) -> float:
        return self.deployment.engine.host_step + self.deployment.engine.host_seq * sequences

    def seconds(self, batch: Batch) -> float:
        """A step from its decision to its result, alone in the engine."""
        stages = sum(self.stage_seconds(i, batch) for i in range(self.deployment.plan.pp))
        return stages + self.host(batch.decodes + len(batch.chunks))

    def decode_run(self, n: int, context: int, steps: int) -> list[float]:
        """Seconds of `steps` steps in a row of n decoding sequences, which see `context` tokens in all in the first
        step and n more in each further one. The same numbers as `seconds` gives one by one."""
        host, stages = self.host(n), self.decode_stages(n)
        return [sum(stages(context + step * n)) + host for step in range(steps)]

    def decode_stages(self, n: int) -> Callable[[int], list[float]]:
        """Seconds of each stage for n decoding sequences, by the tokens they see in all. The same numbers as
        `stage_seconds` gives, sooner where one call sees hardly more than the one before."""
        parts = [(self._fixed_part(i, n), self._row(i, n)) for i in range(self.deployment.plan.pp)]
        low, first, last, span = 0, 1.0, 0.0, 1.0  # of the segment of CONTEXTS: none yet
        segment: list[tuple[float, float, float]] = []

        def stages(context: int) -> list[float]:
            nonlocal low, first, last, span, segment
            x = context / n
            if not first <= x < last:
                low = max(0, min(bisect_right(CONTEXTS, x), len(CONTEXTS) - 1) - 1)
                first, last = CONTEXTS[low], CONTEXTS[low + 1]
                span = last - first
                segment = [(fixed, row[low], row[low + 1] - row[low]) for fixed, row in parts]
            if x <= CONTEXTS[0]:
                return [fixed + value for fixed, value, _ in segment]
            return [fixed + (value + rise * (x - first) / span) for fixed, value, rise in segment]

        return stages

    def _fixed_part(self, stage: int, n: int) -> float:
        key = (stage, n)
        if key not in self._fixed:
            seconds = _interpolate(TOKENS, self._linear[stage], n)
            if stage == self.deployment.plan.pp - 1:
                seconds += _interpolate(TOKENS, self._head, n)
            self._fixed[key] = seconds
        return self._fixed[key]

    def _row(self, stage: int, n: int) -> list[float]:
        """Decoding attention of a stage for n sequences, over CONTEXTS: between two batch sizes of the list."""
        key = (stage, n)
        row = self._decode_rows.get(key)
        if row is None:
            low = max(0, min(bisect_right(BATCHES, n) - 1, len(BATCHES) - 2))
            part = (n - BATCHES[low]) / (BATCHES[low + 1] - BATCHES[low])
            a = self._column(stage, BATCHES[low])
            row = a
            if part:
                b = self._column(stage, BATCHES[low + 1])
                row = [x + (y - x) * part for x, y in zip(a, b, strict=True)]
            self._decode_rows[key] = row
        return row

    def _column(self, stage: int, n: int) -> list[float]:
        key = (stage, n)
        if key not in self._columns:
            column = []
            for context in CONTEXTS:
                seconds = 0.0
                for mixer, times in self._windows[stage].items():
                    cost = self.decode_attention(mixer, n, context)
                    seconds += times * cost.seconds * self._factor(cost)
                column.append(seconds)
            self._columns[key] = column
        return self._columns[key]

    def breakdown(self, batch: Batch) -> Breakdown:
        """A step's seconds by what bounds them, all stages in turn; flops and bytes of one device of each stage."""
        total = Breakdown()
        for i in range(self.deployment.plan.pp):
            part = self.linear(i, max(1, batch.tokens))
            for name in ("compute", "memory", "network", "flops", "bytes"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
            for mixer, times in self._windows[i].items():
                if batch.decodes:
                    context = batch.decode_context / batch.decodes
                    beside = self._beside(batch) if batch.chunks else 1.0
                    total.add(self.decode_attention(mixer, batch.decodes, context), times * beside)
                if batch.chunks:
                    total.add(self.prefill_attention(mixer, batch.chunks), times)
        if batch.samples:
            part = self.head(batch.samples)
            for name in ("compute", "memory", "network", "flops", "bytes"):
                setattr(total, name, getattr(total, name) + getattr(part, name))
        total.host = self.host(batch.decodes + len(batch.chunks))
        return total


def _interpolate(axis: Sequence[float], values: Sequence[float], x: float) -> float:
    """Piecewise linear; the first value below the axis, the last slope beyond it."""
    if x <= axis[0]:
        return values[0]
    high = min(bisect_right(axis, x), len(axis) - 1)
    low = high - 1
    return values[low] + (values[high] - values[low]) * (x - axis[low]) / (axis[high] - axis[low])
