"""Masked and removed are the same, for every family, also where a sublayer is empty; and nothing changes at 1.0."""

from __future__ import annotations

import pytest
import torch

from llmtool.prune.batches import batches
from llmtool.prune.budget import Budget
from llmtool.prune.calibrate import gradients
from llmtool.prune.cost import CostModel, size
from llmtool.prune.masks import binary_masks, masked
from llmtool.prune.model import Loaded
from llmtool.prune.objective import Objective
from llmtool.prune.obs import Obs, Settings, erase
from llmtool.prune.remove import remove, sizes_after, verify
from llmtool.prune.units import Kept, all_units, check_kept, columns, consumer_of
from tests.prune.conftest import MODELS, Tiny, items_of


def some_units(loaded: Loaded, empty: bool = True) -> Kept:
    """Different sizes in every layer; the second has neither heads nor neurons, if asked for."""
    kept: list[tuple[int, ...]] = []
    for s in loaded.sublayers:
        if s.layer == 1 and empty:
            kept.append(())
        elif s.kind == "mlp":
            kept.append(tuple(range(s.layer, s.num_units, 2 + s.layer)))
        elif s.group > 1:
            kept.append((3, 4, 5) if s.layer == 0 else (0, 2, 3, 4))
        else:
            kept.append((1, 3, 4) if s.layer == 0 else (0, 5))
    check_kept(loaded.sublayers, tuple(kept))
    return tuple(kept)


@pytest.mark.parametrize("name", MODELS)
def test_masked_and_removed_agree(name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    kept = some_units(loaded)
    batch = batches(items_of(loaded), 16)[1]
    small = remove(loaded, loaded.model, kept)
    error = verify(loaded, loaded.model, small, kept, batch, Objective(loaded.head, True))
    assert error <= 1e-5
    count = sum(p.numel() for p in small.parameters())
    dense = sum(p.numel() for p in loaded.model.parameters())
    shape = loaded.shape(8)
    gone = sum(
        CostModel(shape).of("params", s, *size(s, all_units([s])[0]))
        - CostModel(shape).of("params", s, *size(s, u))
        for s, u in zip(loaded.sublayers, kept, strict=True)
    )
    # Qwen3's norms of queries and keys go with the attention that has no heads left.
    norms = 2 * 8 if name == "qwen3" else 0
    assert dense - count == gone + norms
    assert sizes_after(loaded.sublayers, kept)[1] == (0, 0, 0)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_wrong_mask_does_not_verify(name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    kept = some_units(loaded)
    other = (*kept[:-1], kept[-1][1:])
    small = remove(loaded, loaded.model, other)
    batch = batches(items_of(loaded), 16)[0]
    with pytest.raises(Exception, match="differ by"):
        verify(loaded, loaded.model, small, kept, batch, Objective(loaded.head, True))


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama"])
def test_a_budget_of_one_changes_no_bit(name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    items = items_of(loaded)
    method = Obs(loaded, items, Objective(loaded.head, not loaded.causal), 0, Settings(4))
    result = method.prune(Budget({"flops": 1.0}), CostModel(loaded.shape(10)))
    small = remove(loaded, result.model, result.kept)
    inputs = batches(items, 16)[0].inputs
    assert torch.equal(small(**inputs).logits, loaded.model(**inputs).logits)


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "vit"])
def test_gradients_of_expanded_masks_are_those_of_single_samples(name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    items = items_of(loaded, 12)
    objective = Objective(loaded.head, True)
    found = gradients(loaded.model, loaded.layout, loaded.sublayers, batches(items, 5), objective, 0)
    for i in range(len(items)):
        leaves = [torch.ones(s.num_units, requires_grad=True) for s in loaded.sublayers]
        batch = batches([items[i]], 1)[0]
        with masked(loaded.model, loaded.layout, loaded.sublayers, leaves):
            outputs = loaded.model(**batch.inputs)
            objective.sample_losses(outputs, batch, torch.Generator()).sum().backward()
        for got, leaf in zip(found.masks, leaves, strict=True):
            assert leaf.grad is not None
            scale = float(leaf.grad.abs().max()) + 1e-6
            assert float((got[i] - leaf.grad).abs().max()) <= 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "vit"])
def test_planted_dead_units_go_first_and_leave_the_answers(name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    dead: list[set[int]] = []
    with torch.no_grad():
        for s in loaded.sublayers:
            gone = set(range(0, s.num_units, 4)) if s.kind == "mlp" else set(range(s.group))
            weight = consumer_of(loaded.model, loaded.layout, s).weight
            weight[:, columns(s, sorted(gone))] = 0.0
            dead.append(gone)
    items = items_of(loaded)
    costs = CostModel(loaded.shape(10))
    alive = tuple(
        tuple(sorted(set(range(s.num_units)) - d)) for s, d in zip(loaded.sublayers, dead, strict=True)
    )
    share = costs.total("flops", loaded.sublayers, alive) / costs.dense("flops", loaded.sublayers)
    expected = loaded.model(**batches(items, 16)[0].inputs).logits
    method = Obs(loaded, items, Objective(loaded.head, not loaded.causal), 0, Settings(1))
    for options, units in zip(method.curves, alive, strict=True):
        of_size = [o for o in options if len(o.units) == len(units)]
        assert units in [o.units for o in of_size]
        assert min(o.error for o in of_size) <= 1e-6 * max(o.error for o in options)
    if name == "distilbert":  # one of its random sublayers does not matter to the loss at all
        return
    result = method.prune(Budget({"flops": share * (1 + 1e-6)}), costs)
    assert result.kept == alive
    got = remove(loaded, result.model, result.kept)(**batches(items, 16)[0].inputs).logits
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-3


def test_masks_on_nothing_are_the_model(tiny: Tiny) -> None:
    loaded = tiny("bert")
    inputs = batches(items_of(loaded), 16)[0].inputs
    masks = binary_masks(loaded.sublayers, all_units(loaded.sublayers))
    with masked(loaded.model, loaded.layout, loaded.sublayers, masks):
        got = loaded.model(**inputs).logits
    assert torch.equal(got, loaded.model(**inputs).logits)
    erase(loaded, loaded.model, all_units(loaded.sublayers))
    assert torch.equal(got, loaded.model(**inputs).logits)
