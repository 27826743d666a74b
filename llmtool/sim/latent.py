"""What multi-head latent attention does and reads (DeepSeek-V2, section 2.1), projections included."""

from __future__ import annotations

from llmtool.sim.ops import KV_BYTES, WEIGHT_BYTES

Shape = tuple[int, int, int, int, int]  # q_rank or 0, kv_rank, nope, rope, v


def module_weights(shape: Shape, heads: int, hidden: int) -> float:
    """Parameters of the projections of `heads` heads; the down-projections are whole on every device."""
    q_rank, rank, nope, rope, v = shape
    q = heads * (nope + rope)
    queries = hidden * q_rank + q_rank * q if q_rank else hidden * q
    return queries + hidden * (rank + rope) + heads * ((nope + v) * rank + v * hidden)


def module_work(
    phase: str, n: float, length: float, heads: int, shape: Shape, hidden: int, dtype: str, kv: str
) -> tuple[float, float]:
    """(flops, bytes). prefill: n sequences of `length` new tokens, heads expanded; decode: one token each over
    `length` cached rows, the up-projections absorbed into queries and outputs."""
    _, rank, nope, rope, v = shape
    weights = module_weights(shape, heads, hidden)
    tokens = n * length if phase == "prefill" else n
    flops, nbytes = 2.0 * tokens * weights, weights * WEIGHT_BYTES[dtype] + 4.0 * tokens * hidden
    if phase == "prefill":
        flops += n * length * (length + 1) * heads * (nope + rope + v)
        nbytes += n * length * (rank + rope) * KV_BYTES[kv]
    else:
        flops += 2.0 * n * length * heads * (2 * rank + rope)
        nbytes += n * length * (rank + rope) * KV_BYTES[kv]
    return flops, nbytes
