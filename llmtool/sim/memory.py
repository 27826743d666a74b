"""Where the bytes of one device go under a plan: weights exactly, KV by the allocator that `serve` uses."""

from __future__ import annotations

from dataclasses import dataclass

from llmtool.core.memory.geometry import STATES, KVCacheGroup, LayerCacheSpec, uniform_group
from llmtool.core.memory.model import ModelGeometry
from llmtool.hardware import DeviceSpec
from llmtool.sim.deployment import Deployment
from llmtool.sim.ir import Attention, Block, Dense, ModelIR, MoE, Recurrent
from llmtool.sim.latent import module_weights
from llmtool.sim.ops import KV_BYTES, WEIGHT_BYTES
from llmtool.sim.parallel import ParallelPlan


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on the fullest device. states: of recurrent layers, for max_seqs sequences. pages: KV pages of `group`
    that are left; 0 or less: the plan does not fit."""

    weights: int
    activations: int
    states: int
    reserve: int
    pages: int
    group: KVCacheGroup

    @property
    def kv(self) -> int:
        return max(0, self.pages) * self.group.page_bytes

    @property
    def tokens(self) -> int:
        """Tokens of KV that one engine's attention group holds."""
        return max(0, self.pages) * self.group.tokens_per_page


def mixer_weights(ir: ModelIR, mixer: Attention | Recurrent, tp: int) -> float:
    """Parameters of a mixer on one of tp devices. KV heads and latent down-projections that are fewer than devices
    are repeated."""
    if isinstance(mixer, Recurrent):
        return ir.hidden * (mixer.in_width + mixer.out_width) / tp
    if mixer.latent is not None:
        return module_weights(mixer.latent, mixer.heads // tp, ir.hidden)
    q, kv, out = mixer.widths
    return ir.hidden * ((q + out) / tp + kv / min(tp, mixer.kv_heads))


def mlp_weights(ir: ModelIR, block: Block, plan: ParallelPlan) -> float:
    mlp = block.mlp
    if mlp is None:
        return 0.0
    if isinstance(mlp, Dense):
        return float(mlp.matrices) * ir.hidden * mlp.inner / plan.stage
    return ir.hidden * (3.0 * (mlp.experts * mlp.inner + mlp.shared) / plan.stage + mlp.experts)


def stage_weights(ir: ModelIR, plan: ParallelPlan, first: int, count: int, dtype: str) -> float:
    """Bytes on one device of the stage of layers [first, first + count). Embedding, head, norms and routers stay in
    16 bits when weights are narrower."""
    narrow, wide = WEIGHT_BYTES[dtype], 2.0
    total = 0.0
    for block in ir.blocks[first : first + count]:
        mixers = sum(mixer_weights(ir, mixer, plan.tp) for mixer in block.mixers)
        total += (mixers + mlp_weights(ir, block, plan)) * narrow + block.extra * wide
        if isinstance(block.mlp, MoE):
            total += ir.hidden * block.mlp.experts * (wide - narrow)
    vocabulary = ir.embedding_parameters / plan.stage * wide
    if first == 0:
        total += vocabulary
    if first + count == ir.num_layers:
        total += ir.hidden * wide
        if not (ir.tied and first == 0):
            total += vocabulary
    return total


def kv_layers(ir: ModelIR, plan: ParallelPlan, first: int, count: int, kv_dtype: str) -> list[LayerCacheSpec]:
    """What the attention layers of a stage cache per token on one device; layers are numbered from `first`."""
    specs = cache_specs(ir, plan.tp, kv_dtype)
    return [s for s in specs if first <= s.layer < first + count and s.kind not in STATES]


def cache_specs(ir: ModelIR, tp: int = 1, kv_dtype: str = "bf16") -> list[LayerCacheSpec]:
    """What every layer caches on one of tp devices; a layer with two mixers has two. Narrow KV leaves states as
    they are; fp32 is the type of the whole model."""
    specs, size = [], KV_BYTES[kv_dtype]
    for i, block in enumerate(ir.blocks):
        for mixer in block.mixers:
            if isinstance(mixer, Recurrent):
                whole = mixer.bytes_with(max(2, size))
                specs.append(LayerCacheSpec(i, 0, 0, 0, 2, mixer.kind, state_bytes=-(-whole // tp)))
            elif mixer.latent is not None:
                specs.append(LayerCacheSpec(i, 1, mixer.latent[1] + mixer.latent[3], 0, size, "mla"))
            else:
                heads = max(1, mixer.kv_heads // tp)
                dims = (heads, mixer.head_dim, mixer.v_dim, size)
                specs.append(LayerCacheSpec(i, *dims, _kind(mixer), window=mixer.window, chunk=mixer.chunk))
    return specs


def _kind(mixer: Attention) -> str:
    if mixer.shared:
        return "shared"
    if mixer.cross:
        return "cross_attention"
    if mixer.chunk is not None:
        return "chunked"
    return "full" if mixer.window is None else "sliding_window"


def geometry(ir: ModelIR, tp: int = 1, kv_dtype: str = "bf16") -> ModelGeometry:
    """What a whole model caches on one of tp devices."""
    return ModelGeometry(ir.name, tuple(cache_specs(ir, tp, kv_dtype)))


def state_bytes(ir: ModelIR, plan: ParallelPlan, first: int, count: int) -> float:
    """Of one sequence's recurrent states, on one device of the stage."""
    blocks = ir.blocks[first : first + count]
    return sum(m.state_bytes / plan.tp for b in blocks for m in b.mixers if isinstance(m, Recurrent))


def activation_bytes(ir: ModelIR, plan: ParallelPlan, budget: int, max_seqs: int) -> float:
    """Of the widest layer for a full step: residual stream, projections and MLP in 16 bits, logits in 32."""
    widest = 0.0
    for block in dict.fromkeys(ir.blocks):
        mixer, mlp = block.mixer, block.mlp
        wide = 0.0
        if isinstance(mixer, Attention):
            wide = sum(mixer.widths[:2]) / plan.tp
        inner = mlp.inner / plan.stage if isinstance(mlp, Dense) else 0.0
        if isinstance(mlp, MoE):
            inner = (mlp.top_k * mlp.inner / plan.expert_tp + mlp.shared / plan.stage) / max(1, plan.ep // 2)
        widest = max(widest, wide, 3 * inner * plan.attention_dp)
    logits = min(max_seqs, budget) * ir.vocab * 4.0 / plan.stage * 2
    return budget * (4 * ir.hidden + widest) * 2.0 + logits


def device_memory(d: Deployment, device: DeviceSpec) -> DeviceMemory:
    """The fullest device of the fullest stage: the one with the fewest pages."""
    best: DeviceMemory | None = None
    first = 0
    for count in d.plan.stages(d.ir.num_layers):
        layers = kv_layers(d.ir, d.plan, first, count, d.kv_dtype)
        group = (
            uniform_group(layers, d.block_size)
            if layers
            else uniform_group([LayerCacheSpec(0, 1, 1, 0, 1)], d.block_size)
        )
        weights = stage_weights(d.ir, d.plan, first, count, d.dtype)
        states = state_bytes(d.ir, d.plan, first, count) * d.max_seqs
        activations = activation_bytes(d.ir, d.plan, d.budget, d.max_seqs)
        room = device.memory * d.engine.utilization - weights - states - activations - d.engine.reserve
        pages = int(room // group.page_bytes)
        memory = DeviceMemory(int(weights), int(activations), int(states), d.engine.reserve, pages, group)
        if best is None or memory.pages < best.pages:
            best = memory
        first += count
    assert best is not None
    return best
