"""Tasks, files, encodings and scores, SQuAD's on a small made set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel

from llmtool.errors import UsageError
from llmtool.prune import data
from llmtool.prune.batches import Item, batches, sample
from llmtool.prune.budget import Budget
from llmtool.prune.cost import CostModel
from llmtool.prune.encode import encode_answers, encode_blocks
from llmtool.prune.metrics import matthews, perplexity, squad_scores, task_score
from llmtool.prune.model import load_model
from llmtool.prune.objective import Objective, divergence
from llmtool.prune.obs import Obs, Settings
from llmtool.prune.seed import Paper
from llmtool.prune.tasks import Row, load_file, load_task, task_of
from tests.prune.conftest import Tiny, build

CONTEXT = "The river Oder rises in the hills . Its mouth is at the lagoon , near a town called Stettin ."


def made_squad(path: Path, count: int = 40) -> None:
    words = CONTEXT.split()
    rows = []
    for i in range(count):
        at = i % (len(words) - 2)
        answer = " ".join(words[at : at + 2])
        start = len(" ".join(words[:at])) + (1 if at else 0)
        rows.append(
            {"id": str(i), "question": f"what is {words[at]} ?", "context": CONTEXT,
             "answers": {"text": [answer], "answer_start": [start]}}
        )  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.fixture
def word_tokenizer() -> Any:
    vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    for word in [*CONTEXT.lower().split(), "what", "is", "?"]:
        vocab.setdefault(word, len(vocab))
    backend = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def test_answers_are_found_in_their_windows(tmp_path: Path, word_tokenizer: Any) -> None:
    made_squad(tmp_path / "squad.jsonl")
    rows = load_file(tmp_path / "squad.jsonl")
    items, windows = encode_answers(rows, word_tokenizer, 16)
    assert len(items) > len(rows)  # contexts are longer than a window
    found = 0
    for item, window in zip(items, windows, strict=True):
        start, end = item.label
        first, last = window.spans[start], window.spans[end]
        if first is None or last is None:
            assert (start, end) == (0, 0)
            continue
        text, _ = (rows[window.row].answers or ())[0]
        assert CONTEXT[first[0] : last[1]] == text
        found += 1
    assert found >= len(rows)


def test_scores_of_perfect_and_wrong_answers(tmp_path: Path, word_tokenizer: Any) -> None:
    made_squad(tmp_path / "squad.jsonl", 20)
    rows = load_file(tmp_path / "squad.jsonl")
    items, windows = encode_answers(rows, word_tokenizer, 64)
    perfect = []
    for item in items:
        starts, ends = torch.full((2, item.length), -5.0)
        starts[item.label[0]] = ends[item.label[1]] = 5.0
        perfect.append((starts, ends))
    assert squad_scores(rows, windows, perfect) == (1.0, 1.0)
    late = [(s.roll(1), e.roll(1)) for s, e in perfect]
    f1, exact = squad_scores(rows, windows, late)
    assert 0.1 < f1 < 0.8 and exact < 0.2


def test_squad_from_end_to_end(tmp_path: Path, word_tokenizer: Any) -> None:
    """F1 and exact match of a model with a span head, dense and pruned by both methods."""
    build("bert-qa", tmp_path / "m", vocab_size=len(word_tokenizer))
    word_tokenizer.save_pretrained(tmp_path / "m")
    made_squad(tmp_path / "squad.jsonl", 60)
    loaded = load_model(tmp_path / "m")
    found = data.of_file(loaded, tmp_path / "squad.jsonl", 40, 0)
    assert found.labelled and found.metric == "f1"
    costs, objective = CostModel(loaded.shape(found.tokens)), Objective("qa", True)
    for made in (
        Obs(loaded, found.items, objective, 0, Settings(4)),
        Paper(loaded, found.items, objective, 0),
    ):
        result = made.prune(Budget({"flops": 0.6}), costs)  # type: ignore[attr-defined]
        scores = found.score(result.model, loaded.pad_id)
        assert set(scores) == {"f1", "exact_match"} and 0 <= scores["exact_match"] <= scores["f1"] <= 1


def test_files_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('sentence1,sentence2,label\n"a, b",c,1\nd,e,0\n')
    assert load_file(tmp_path / "a.csv") == [Row("a, b", "c", 1), Row("d", "e", 0)]
    (tmp_path / "a.tsv").write_text('text\tlabel\nan "odd quote\tpos\n')
    assert load_file(tmp_path / "a.tsv") == [Row('an "odd quote', None, "pos")]
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert load_file(tmp_path / "a.jsonl") == [Row("x"), Row("y")]
    (tmp_path / "b.csv").write_text("foo,bar\n1,2\n")
    with pytest.raises(UsageError, match="no column of text"):
        load_file(tmp_path / "b.csv")
    with pytest.raises(UsageError, match="no file"):
        load_file(tmp_path / "none.csv")


def test_glue_from_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_DATA", str(tmp_path))
    for name, text in {
        "SST-2/train.tsv": "sentence\tlabel\na fine film \t1\nbad\t0\n",
        "MRPC/dev.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tOne .\tTwo .\n",
        "CoLA/train.tsv": "gj04\t1\t\tThe sailors rode .\ngj04\t0\t*\tRode the .\n",
        "MNLI/dev_matched.tsv": "sentence1\tsentence2\tgold_label\na\tb\tcontradiction\n",
    }.items():
        path = tmp_path / "glue" / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    assert load_task(task_of("SST-2"), "train") == [Row("a fine film", None, 1), Row("bad", None, 0)]
    assert load_task(task_of("mrpc"), "dev") == [Row("One .", "Two .", 1)]
    assert load_task(task_of("cola"), "train") == [
        Row("The sailors rode .", None, 1),
        Row("Rode the .", None, 0),
    ]
    assert load_task(task_of("mnli"), "dev") == [Row("a", "b", 2)]
    with pytest.raises(UsageError, match="no task 'sst3'"):
        task_of("sst3")


def test_labels_must_be_the_models(tiny: Tiny, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"w{i} w9 w5 w6", "label": "good"}) for i in range(4, 40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="label 'good' is none of the model's"):
        data.of_file(tiny("bert"), tmp_path / "a.jsonl", 32, 0)
    unlabelled = data.of_file(tiny("bert-body"), tmp_path / "a.jsonl", 24, 0)
    assert not unlabelled.labelled and len(unlabelled.items) == 24


def test_too_few_samples(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w4"}\n{"text": "w5"}\n')
    with pytest.raises(UsageError, match="at least 16 are needed"):
        data.of_file(tiny("bert-body"), tmp_path / "a.jsonl", 64, 0)


def test_batches_are_alike_in_length_and_cover_all() -> None:
    items = [Item({"input_ids": [1] * n, "attention_mask": [1] * n}, n) for n in (5, 2, 9, 3, 2, 7)]
    made = batches(items, 2, pad_id=4)
    assert [b.indices for b in made] == [(1, 4), (3, 0), (5, 2)]
    assert made[1].inputs["input_ids"].tolist() == [[1, 1, 1, 4, 4], [1] * 5]
    assert made[1].inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert list(sample(range(100), 5, 1)) == list(sample(range(100), 5, 1)) != list(sample(range(100), 5, 2))


def test_scores() -> None:
    logits = [(torch.tensor(row),) for row in ([1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0])]
    assert task_score("accuracy", logits, [0, 1, 0, 0]) == 0.75
    assert task_score("matthews", logits, [0, 1, 0, 0]) == pytest.approx((2 * 1 - 0) / (12**0.5))
    assert matthews(torch.tensor([1, 1]), torch.tensor([0, 1])) == 0.0
    numbers = [(torch.tensor([x]),) for x in (0.1, 0.5, 0.9)]
    assert task_score("spearman", numbers, [1, 2, 3]) == pytest.approx(1.0)


def test_perplexity_is_that_of_the_losses(tiny: Tiny) -> None:
    loaded = tiny("llama")
    items = encode_blocks(" ".join(f"w{4 + i * 7 % 90}" for i in range(100)), loaded.tokenizer, 16)
    assert len(items) == 6 and all(item.length == 16 for item in items)
    losses = [
        loaded.model(
            input_ids=torch.tensor([i.inputs["input_ids"]]), labels=torch.tensor([i.inputs["input_ids"]])
        ).loss
        for i in items
    ]
    assert perplexity(loaded.model, items) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-4)


def test_divergences() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    assert divergence("classification", logits, logits, {}) == pytest.approx(0.0, abs=1e-6)
    p = logits.softmax(-1)
    expected = (p * (p.log() - torch.tensor(0.5).log())).sum()
    assert divergence("classification", logits, torch.zeros(2, 2), {}) == pytest.approx(float(expected))
    assert divergence("embedding", logits, 3 * logits, {}) == pytest.approx(0.0, abs=1e-6)
    assert divergence("regression", logits, logits + 1, {}) == pytest.approx(4.0)


@pytest.mark.parametrize("head", ["classification", "embedding", "regression"])
def test_label_free_gradients_are_not_zero_and_repeat(head: str, tiny: Tiny) -> None:
    loaded = tiny("bert-body" if head == "embedding" else "bert")
    ids = torch.randint(4, 97, (3, 7), generator=torch.Generator().manual_seed(0))
    from llmtool.prune.batches import Batch

    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, (0, 1, 2))
    objective = Objective(head, False)
    outputs = loaded.model(**batch.inputs)
    first, again = (
        objective.sample_losses(outputs, batch, torch.Generator().manual_seed(4)) for _ in range(2)
    )
    assert torch.equal(first, again) and first.shape == (3,) and bool(first.ne(0).all())
