"""Costs against the paper's numbers and against the modules themselves; latency tables; budgets."""

from __future__ import annotations

import pytest

from llmtool.errors import InfeasibleError, UsageError
from llmtool.prune.budget import Budget
from llmtool.prune.cost import CostModel, LatencyTable, Shape, kv_bytes, macs, params
from llmtool.prune.units import Sublayer, all_units, kv_heads_of
from tests.prune.conftest import Tiny

BERT = tuple(
    s
    for i in range(12)
    for s in (Sublayer(2 * i, i, "attention", 12, 64), Sublayer(2 * i + 1, i, "mlp", 3072, 1))
)
GQA = (Sublayer(0, 0, "attention", 9, 64, group=3, min_units=1), Sublayer(1, 0, "mlp", 1536, 1))


def test_macs_of_bert_base_at_128_tokens() -> None:
    shape = Shape(hidden=768, tokens=128)
    assert macs(shape, BERT[0], 1, 1) == 27_262_976
    assert macs(shape, BERT[1], 1, 0) == 196_608
    assert CostModel(shape).dense("flops", BERT) == 11_173_625_856


def test_grouped_heads_split_the_cost() -> None:
    shape = Shape(hidden=576, tokens=32, inner_matrices=2, cached=True, dtype_bytes=2)
    whole = 32 * 576 * 64 * (9 + 3 + 3 + 9) + 2 * 32 * 32 * 64 * 9
    assert macs(shape, GQA[0], 9, 3) == whole
    assert macs(shape, GQA[0], 9, 3) - macs(shape, GQA[0], 6, 2) == whole / 3
    assert params(shape, GQA[0], 9, 3) == 576 * 64 * (9 + 3 + 3 + 9)
    assert params(shape, GQA[1], 1536, 0) == 3 * 576 * 1536
    assert kv_bytes(shape, GQA[0], 3) == 2 * 3 * 64 * 2
    assert kv_heads_of(GQA[0], (0, 2, 6)) == [0, 2]


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "qwen2", "qwen3", "vit"])
def test_parameters_are_those_of_the_modules(name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    costs = CostModel(loaded.shape(8))
    total = 0
    for key, parameter in loaded.model.named_parameters():
        inside = any(f".{part}." in key for part in ("layer", "layers"))
        norm = "norm" in key.lower()
        closing = key.endswith("bias") and any(
            end in key for end in ("output.dense", "out_lin", "lin2", "o_proj", "fc2", "down_proj")
        )
        total += parameter.numel() if inside and not norm and not closing else 0
    assert costs.dense("params", loaded.sublayers) == total


def test_latency_between_measured_sizes_is_linear() -> None:
    table = LatencyTable({0: 0.0, 4: 2.0, 12: 4.0}, {0: 0.0, 16: 1.0, 32: 5.0}, fixed=1.0)
    assert [table.seconds("attention", n) for n in (0, 2, 4, 8, 12)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert table.seconds("mlp", 24) == 3.0
    costs = CostModel(Shape(8, 4), table)
    subs = (Sublayer(0, 0, "attention", 12, 1), Sublayer(1, 0, "mlp", 32, 1))
    assert costs.dense("latency", subs) == 1.0 + 4.0 + 5.0


def test_an_infeasible_budget_names_the_smallest() -> None:
    costs = CostModel(Shape(8, 4), LatencyTable({0: 0.0, 12: 4.0}, {0: 0.0, 32: 5.0}, fixed=1.0))
    subs = (Sublayer(0, 0, "attention", 12, 1), Sublayer(1, 0, "mlp", 32, 1))
    with pytest.raises(InfeasibleError) as caught:
        Budget({"latency": 0.05}).absolute(costs, subs)
    assert "--latency 0.100 or more" in str(caught.value)
    assert caught.value.exit_code == 4
    assert Budget({"latency": 0.1}).absolute(costs, subs) == {"latency": 0.0}


def test_budgets_that_make_no_sense() -> None:
    with pytest.raises(UsageError, match="over 0 and at most 1"):
        Budget({"flops": 1.5})
    with pytest.raises(UsageError, match="no budget"):
        Budget({})
    with pytest.raises(UsageError, match="keeps no KV bytes"):
        Budget({"kv": 0.5}).absolute(CostModel(Shape(768, 128)), BERT)


def test_dense_units() -> None:
    assert CostModel(Shape(768, 128)).total("flops", BERT, all_units(BERT)) == 11_173_625_856
