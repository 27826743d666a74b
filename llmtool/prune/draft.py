"""A draft model for speculative decoding: the same tokenizer, fewer whole layers.

Depth goes first because a draft runs one token at a time, where time goes by the number of layers. Layers whose
removal changes the residual stream least go (1 - cosine between what enters and what leaves, ShortGPT, arXiv
2403.03853), the rest are refitted, and the depth with the largest expected gain is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llmtool.errors import UsageError
from llmtool.prune import latency
from llmtool.prune.batches import Batch, batches
from llmtool.prune.calibrate import token_weights
from llmtool.prune.config import PruneConfig
from llmtool.prune.data import Data
from llmtool.prune.export import huggingface
from llmtool.prune.layerwise import Moments, side_by_side
from llmtool.prune.least_squares import refit
from llmtool.prune.model import Loaded
from llmtool.prune.modeling import base_of, layers_of
from llmtool.prune.obs import erase
from llmtool.prune.units import Sublayer, consumer_of

SHARES = (0.2, 0.33, 0.5, 0.67)  # depths that are tried
MOST_TOKENS = 8
Progress = Callable[[str, float | None], None]


def expected_gain(acceptance: float, cost: float, tokens: int) -> float:
    """Speed-up of drafting so many tokens: (1 - a^(k+1)) / ((1 - a) (k c + 1)) (Leviathan et al., arXiv 2211.17192,
    theorem 3.8), a the chance that a token is accepted, c the draft's cost over the model's."""
    if acceptance >= 1:
        return (tokens + 1) / (tokens * cost + 1)
    return (1 - acceptance ** (tokens + 1)) / ((1 - acceptance) * (tokens * cost + 1))


def write_draft(
    loaded: Loaded, found: Data, config: PruneConfig, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Write `draft/`, and say what it is worth: layers, acceptance, cost_ratio, gain, tokens. Raises UsageError for
    a model that is no decoder."""
    if not loaded.causal:
        raise UsageError("A draft is for decoders, and this model is none.", "Leave --draft out.")
    parts = batches(found.items, 8, loaded.pad_id)
    scores = influence(loaded, parts)
    total = len(scores)
    tried = []
    for i, depth in enumerate(sorted({max(1, round(total * share)) for share in SHARES})):
        progress(f"Draft of {depth} layers", i / len(SHARES))
        keep = keep_layers(scores, depth)
        model = shallow(loaded, parts, keep)
        rate = acceptance(loaded, model, batches(found.held_out or found.items[:16], 4, loaded.pad_id))
        seconds = latency.compare(loaded, {"dense": loaded.model, "draft": model}, (1,), 1, rounds=5)[1]
        cost = seconds["draft"] / seconds["dense"]
        gain, tokens = max((expected_gain(rate, cost, k), -k) for k in range(1, MOST_TOKENS + 1))
        tried.append((gain, keep, rate, cost, -tokens, model))
    gain, keep, rate, cost, tokens, model = max(tried, key=lambda row: row[0])
    facts = {
        "layers": len(keep), "dense_layers": total, "kept_layers": keep, "acceptance": rate, "cost_ratio": cost,
        "gain": gain, "tokens": tokens, "tried": [
            {"layers": len(k), "acceptance": r, "cost_ratio": c, "gain": g} for g, k, r, c, _, _ in tried
        ],
    }  # fmt: skip
    write_shallow(loaded, model, keep, directory / "draft")
    return facts


@torch.no_grad()
def influence(loaded: Loaded, parts: Sequence[Batch]) -> list[float]:
    """Of each layer 1 - the mean cosine between the streams before and after it."""
    layers = layers_of(loaded.model, loaded.layout)
    sums, count, tokens = [0.0] * len(layers), 0, [torch.empty(0)]

    def watcher(i: int) -> Any:
        def on_layer(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            alike = F.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            sums[i] += float((1 - alike)[tokens[0]].sum())

        return on_layer

    hooks = [layer.register_forward_hook(watcher(i)) for i, layer in enumerate(layers)]
    device = next(loaded.model.parameters()).device
    try:
        for part in parts:
            on_device = part.to(device)
            assert on_device.tokens is not None
            tokens[0] = on_device.tokens
            count += int(tokens[0].sum())
            loaded.model(**on_device.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [s / max(count, 1) for s in sums]


def keep_layers(scores: Sequence[float], depth: int) -> list[int]:
    """The `depth` layers of most influence, the first always among them."""
    order = sorted(range(1, len(scores)), key=lambda i: (-scores[i], i))
    return sorted([0, *order[: depth - 1]])


def shallow(loaded: Loaded, parts: Sequence[Batch], keep: Sequence[int]) -> Any:
    """The model with these layers only, refitted towards the dense model's stream."""
    student = copy.deepcopy(loaded.model)
    inside = set(keep)
    kept = tuple(tuple(range(s.num_units)) if s.layer in inside else () for s in loaded.sublayers)
    erase(loaded, student, kept)
    apart = list(range(4, len(parts), 5)) or [len(parts) - 1]

    def solve(s: Sublayer, fit: Moments, held_out: Moments) -> None:
        if s.layer not in inside:
            return
        consumer = consumer_of(student, loaded.layout, s)
        found = refit(fit, held_out, consumer.weight, consumer.bias)
        consumer.weight.copy_(found.weight)

    side_by_side(
        loaded.model, student, loaded.layout, loaded.sublayers, parts, apart, kept, solve,
        lambda b, s, batch, shape: token_weights(batch, shape),
    )  # fmt: skip
    blocks = nn.ModuleList([layers_of(student, loaded.layout)[i] for i in keep])
    parent, _, name = loaded.layout.layers.rpartition(".")
    setattr(base_of(student).get_submodule(parent), name, blocks)
    for i, block in enumerate(blocks):
        block.self_attn.layer_idx = i  # type: ignore[union-attr]
    student.config.num_hidden_layers = len(keep)
    types = getattr(student.config, "layer_types", None)
    if types is not None:
        student.config.layer_types = [types[i] for i in keep]
    return student.eval()


@torch.no_grad()
def acceptance(loaded: Loaded, draft: Any, parts: Sequence[Batch]) -> float:
    """The chance that a drafted token is accepted: the mean over tokens of the sum of min(p, q)."""
    device, total, count = next(loaded.model.parameters()).device, 0.0, 0
    for part in parts:
        inputs = part.to(device).inputs
        p, q = (m(**inputs, use_cache=False).logits.float().softmax(-1) for m in (loaded.model, draft))
        real = inputs["attention_mask"].bool()
        total += float(torch.minimum(p, q).sum(-1)[real].sum())
        count += int(real.sum())
    return total / max(count, 1)


def write_shallow(loaded: Loaded, model: Any, keep: Sequence[int], directory: Path) -> None:
    """A plain model of the family: nothing differs between its layers."""
    a, m = loaded.sublayers[0], loaded.sublayers[1]
    sizes = [(a.num_units, a.num_groups, m.num_units)] * len(keep)
    huggingface.write(loaded, model, sizes, directory, huggingface.source_dtype(loaded), keep)
