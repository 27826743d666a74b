"""Every method on every kind of model: budgets hold, are used, results repeat; and a run from end to end."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtool.errors import InfeasibleError, ModelError, UsageError
from llmtool.models.resolve import resolve
from llmtool.prune.baselines import METHODS, Baseline
from llmtool.prune.batches import batches
from llmtool.prune.budget import Budget
from llmtool.prune.calibrate import gradients, token_weights
from llmtool.prune.config import PruneConfig, parse_sweep
from llmtool.prune.cost import CostModel, LatencyTable
from llmtool.prune.layerwise import Moments, side_by_side
from llmtool.prune.model import Loaded, find
from llmtool.prune.objective import Objective
from llmtool.prune.obs import Obs, Settings, erase
from llmtool.prune.pipeline import Run
from llmtool.prune.seed import Paper
from llmtool.prune.units import Sublayer, all_units, check_kept, columns, consumer_of
from tests.prune.conftest import Tiny, build, items_of

TABLE = LatencyTable(
    {n: 0.5 * ((n + 1) // 2) for n in range(7)}, {n: 0.4 * -(-n // 16) for n in range(81)}, fixed=0.3
)


def method_of(name: str, loaded: Loaded, seed: int = 0, **settings: Any) -> Any:
    items, objective = items_of(loaded), Objective(loaded.head, loaded.head in ("classification", "qa", "lm"))
    if name == "obs":
        return Obs(loaded, items, objective, seed, Settings(1, **settings))
    if name == "paper":
        return Paper(loaded, items, objective, seed)
    return Baseline(name, loaded, items, seed)


@pytest.mark.parametrize("method", ["obs", "paper", *METHODS])
@pytest.mark.parametrize("name", ["distilbert", "llama"])
def test_budgets_hold_and_results_repeat(method: str, name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    costs = CostModel(loaded.shape(10), TABLE)
    made = method_of(method, loaded)
    for budget in ({"flops": 0.5}, {"params": 0.7}, {"flops": 0.2}):
        result = made.prune(Budget(budget), costs)
        check_kept(loaded.sublayers, result.kept)
        for kind, share in budget.items():
            used = costs.total(kind, loaded.sublayers, result.kept) / costs.dense(kind, loaded.sublayers)
            assert used <= share * (1 + 1e-9)
            if method == "obs":
                assert used >= share * 0.98  # tiny layers come in large steps
        for s, units in zip(loaded.sublayers, result.kept, strict=True):
            gone = sorted(set(range(s.num_units)) - set(units))
            weight = consumer_of(result.model, loaded.layout, s).weight
            assert not weight[:, columns(s, gone)].any()
    again = method_of(method, loaded).prune(Budget({"flops": 0.5}), costs)
    first = made.prune(Budget({"flops": 0.5}), costs)
    assert again.kept == first.kept
    for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_several_budgets_hold_at_once(tiny: Tiny) -> None:
    loaded = tiny("llama")
    costs = CostModel(loaded.shape(10), TABLE)
    budget = {"flops": 0.7, "params": 0.65, "kv": 0.5, "latency": 0.8}
    result = method_of("obs", loaded).prune(Budget(budget), costs)
    for kind, share in budget.items():
        used = costs.total(kind, loaded.sublayers, result.kept) / costs.dense(kind, loaded.sublayers)
        assert used <= share * (1 + 1e-9)


def test_utilisation_of_a_model_of_real_size() -> None:
    """96 options a sublayer leave less than half a percent of the budget unused."""
    from llmtool.prune.curves import Option
    from llmtool.prune.obs import allocation

    subs, generator = [], torch.Generator().manual_seed(0)
    curves = []
    for layer in range(6):
        for kind, units, step in (("attention", 12, 1), ("mlp", 3072, 32)):
            s = Sublayer(len(subs), layer, kind, units, 64 if kind == "attention" else 1)
            subs.append(s)
            scale = float(torch.rand(1, generator=generator)) + 0.1
            curves.append(
                [Option(tuple(range(n)), scale * (1 - n / units) ** 2) for n in range(units, -1, -step)]
            )
    from llmtool.prune.cost import Shape

    costs = CostModel(Shape(768, 25.16))
    for share in (0.8, 0.6, 0.5, 0.4, 0.2):
        limits = Budget({"flops": share}).absolute(costs, subs)
        kept = allocation(subs, curves, limits, costs, 1.0, False)
        used = costs.total("flops", subs, kept) / limits["flops"]
        assert 0.995 <= used <= 1.0


def test_uniform_gives_every_layer_the_same(tiny: Tiny) -> None:
    loaded = tiny("llama")
    costs = CostModel(loaded.shape(10))
    result = method_of("obs", loaded, uniform=True).prune(Budget({"flops": 0.6}), costs)
    assert len({(len(k), s.kind) for k, s in zip(result.kept, loaded.sublayers, strict=True)}) == 2
    assert costs.total("flops", loaded.sublayers, result.kept) <= 0.6 * costs.dense("flops", loaded.sublayers)


def test_paper_with_latency_keeps_its_own_line_within_the_budget(tiny: Tiny) -> None:
    loaded = tiny("distilbert")
    costs = CostModel(loaded.shape(10), TABLE)
    result = method_of("paper", loaded).prune(Budget({"latency": 0.7}), costs)
    assert all(result.kept)
    with pytest.raises(UsageError, match="takes one budget"):
        method_of("paper", loaded).prune(Budget({"flops": 0.7, "params": 0.7}), costs)


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "vit"])
def test_an_unpruned_student_needs_no_compensation(name: str, tiny: Tiny) -> None:
    """Side by side with itself, what a consumer should give is what it gives: W x + b, to rounding."""
    loaded = tiny(name)
    student = copy.deepcopy(loaded.model)
    parts = batches(items_of(loaded), 16)
    seen = []

    def solve(s: Sublayer, fit: Moments, held_out: Moments) -> None:
        consumer = consumer_of(student, loaded.layout, s)
        both = fit.merged(held_out)
        seen.append(both.error(consumer.weight, consumer.bias) / (both.yy / both.weight))

    side_by_side(
        loaded.model, student, loaded.layout, loaded.sublayers, parts, [1], all_units(loaded.sublayers), solve,
        lambda b, s, batch, shape: token_weights(batch, shape),
    )  # fmt: skip
    assert len(seen) == len(loaded.sublayers)
    assert max(seen) < 1e-4


@pytest.mark.parametrize("name", ["bert", "distilbert", "llama", "vit"])
def test_side_by_side_sees_what_the_pruned_model_reads(name: str, tiny: Tiny) -> None:
    """Layers are run without pruned units, up to consumers, as in the whole model with columns zeroed."""
    loaded = tiny(name)
    student = copy.deepcopy(loaded.model)
    kept = tuple(
        tuple(range(0 if s.layer == 1 and s.kind == "mlp" else s.num_units - 2 * s.group))
        for s in loaded.sublayers
    )
    erase(loaded, student, kept)
    parts = batches(items_of(loaded), 8)
    expected = gradients(
        student, loaded.layout, loaded.sublayers, parts, Objective(loaded.head, False), 0, with_moments=True
    ).grams

    def solve(s: Sublayer, fit: Moments, held_out: Moments) -> None:
        both, at = fit.merged(held_out), columns(s, kept[s.index])
        torch.testing.assert_close(both.xx / both.weight, expected[s.index][at][:, at], rtol=1e-3, atol=1e-4)

    side_by_side(
        loaded.model, student, loaded.layout, loaded.sublayers, parts, [1], kept, solve,
        lambda b, s, batch, shape: token_weights(batch, shape),
    )  # fmt: skip


def test_the_paper_takes_gradients_that_are_known(tiny: Tiny) -> None:
    loaded = tiny("distilbert")
    known = method_of("obs", loaded).dense.masks
    costs, budget = CostModel(loaded.shape(10)), Budget({"flops": 0.5})
    own = method_of("paper", loaded)
    other = Paper(loaded, items_of(loaded), Objective("classification", True), 0, masks=known)
    for a, b in zip(own.fisher, other.fisher, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-4, atol=1e-9)
    assert own.prune(budget, costs).kept == other.prune(budget, costs).kept


@pytest.mark.parametrize("name", ["distilbert", "llama"])
def test_compensation_brings_answers_nearer(name: str, tiny: Tiny) -> None:
    loaded = tiny(name)
    method = method_of("obs", loaded)
    result = method.prune(Budget({"flops": 0.6}), CostModel(loaded.shape(10)))
    bare = copy.deepcopy(loaded.model)
    erase(loaded, bare, result.kept)
    assert method._divergence(result.model) < method._divergence(bare)


# -- runs from end to end ----------------------------------------------------------------------------------------


def config_of(directory: Path, output: Path, **changes: Any) -> PruneConfig:
    text = output.parent / "text.txt"
    words = torch.randint(4, 97, (400, 9), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text("\n".join(" ".join(f"w{w}" for w in line) for line in words))
    given: dict[str, Any] = {"budget": {"flops": 0.6}, "text": text, "samples": 32, "granularity": 4}
    return PruneConfig(str(directory), output=output, **{**given, **changes})


@pytest.mark.parametrize("name", ["distilbert", "bert-body", "llama"])
def test_a_run_writes_all_it_should(name: str, directory_of: Any, tmp_path: Path) -> None:
    report = Run(config_of(directory_of(name), tmp_path / "out")).execute()
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"model", "masks.safetensors", "report.json"}
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["cost"]["flops"]["share"] <= 0.6 and data["verified"] <= 1e-4
    assert set(data["latency"]) == {"1", "32"} and data["seconds"]["calibrate"] > 0
    assert len(report.layers) == 3 and report.metric
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_sweep_draws_a_curve(directory_of: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    config = config_of(directory_of("llama"), tmp_path / "out", budget={}, sweep=(0.5, 1.0))
    Run(config).execute()
    lines = (tmp_path / "out" / "pareto.csv").read_text().splitlines()
    assert lines[0].startswith("budget_flops,share_flops,metric,value,dense") and len(lines) == 3
    _, share, metric, value, dense = lines[2].split(",")
    assert (float(share), metric, value) == (1.0, "perplexity", dense)
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_a_draft_is_a_plain_model_of_fewer_layers(directory_of: Any, tmp_path: Path) -> None:
    import transformers

    config = config_of(directory_of("llama"), tmp_path / "out", budget={}, draft=True)
    report = Run(config).execute()
    facts = report.notes["draft"]
    assert 0 < facts["acceptance"] <= 1 and facts["layers"] < 3 and facts["gain"] > 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "draft")
    assert model.config.num_hidden_layers == facts["layers"]
    assert (tmp_path / "out" / "draft" / "tokenizer.json").is_file()


def test_a_latency_budget_is_measured(tmp_path: Path) -> None:
    build("distilbert", tmp_path / "m", dim=240, hidden_dim=1920)  # large enough that its MLPs take the time
    config = replace(config_of(tmp_path / "m", tmp_path / "out", budget={"latency": 0.8}), latency_batch=16)
    report = Run(config).execute()
    share = report.cost["latency"]["share"]
    assert share is not None and 0.5 < share <= 0.8
    assert any(layer.neurons < layer.dense_neurons for layer in report.layers)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"task": "sst2", "text": None}, UsageError, "has a head for lm"),
        ({"budget": {"flops": 0.0001}}, InfeasibleError, r"Give --flops 0\.\d+ or more"),
        ({"budget": {"kv": 0.01}}, InfeasibleError, r"Give --kv 0\.\d+ or more"),
        ({"samples": 8}, UsageError, "too few"),
        ({"text": Path("/none.txt")}, UsageError, "cannot be read"),
        ({"method": "best"}, UsageError, "no method 'best'"),
        ({"export": ("hf", "tflite")}, UsageError, "no export 'tflite'"),
        ({"budget": {}}, UsageError, "no budget"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    changes: dict[str, Any], error: type[Exception], says: str, directory_of: Any, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        Run(config_of(directory_of("llama"), tmp_path / "out", **changes)).execute()
    import re

    assert re.search(says, str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_outputs_that_cannot_be_written(directory_of: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        Run(
            replace(config_of(directory_of("llama"), tmp_path / "out"), output=tmp_path / "file" / "out")
        ).execute()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UsageError, match="is there already"):
        Run(config_of(directory_of("llama"), tmp_path / "full")).execute()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]


def test_a_family_without_an_adapter_names_what_to_write(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "t5", "architectures": ["T5Model"]}')
    with pytest.raises(ModelError, match=r"no adapter for the family 't5'.*Layout"):
        Run(config_of(tmp_path / "m", tmp_path / "out")).execute()


def test_names_of_models(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find("minilm") == resolve("minilm")  # the one that is served under this name, no hub
    with pytest.raises(ModelError, match=r"alias .*smollm2-135m.*distilbert"):
        find("bertt")
    monkeypatch.setattr("llmtool.prune.model.resolve", _no_hub)
    with pytest.raises(
        ModelError, match=r"bert is google-bert/bert-base-uncased on the hub.*give its directory"
    ):
        find("bert")


def _no_hub(name: str) -> Path:
    raise ModelError(f"{name} cannot be fetched.")


def test_sweeps_as_they_are_typed() -> None:
    assert parse_sweep("0.3:1.0:0.1") == (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert parse_sweep("0.5,0.7") == (0.5, 0.7)
    with pytest.raises(UsageError, match="is no sweep"):
        parse_sweep("0.5:x")


def test_the_command(directory_of: Any, tmp_path: Path) -> None:
    config_of(directory_of("llama"), tmp_path / "x")
    command = [
        sys.executable, "-m", "llmtool", "prune", str(directory_of("llama")), "--params", "0.7", "--text",
        str(tmp_path / "text.txt"), "--samples", "32", "-o", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cost"]["params"]["share"] <= 0.7
    assert "Calibrating" in done.stderr
    done = subprocess.run(
        [*command, "--kv", "0.001"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2  # the output is there already
    tight = [*command[:-2], str(tmp_path / "other"), "--json", "--kv", "0.001"]
    done = subprocess.run(tight, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 4 and "or more" in done.stderr
