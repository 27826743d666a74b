"""Our encoder against transformers' models, on tiny random models of every family and on MiniLM."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmtool.errors import ModelError
from llmtool.models.encoder import NativeEncoder, attention_groups, pool
from llmtool.models.encoder_weights import load_weights
from llmtool.models.tokenizer import Tokenizer
from llmtool.modelspec import EncoderSpec
from tests.models.encoders import FAMILIES, build, classifier, minilm

CPU = torch.device("cpu")
TEXTS = [
    "The sea was calm.",
    "Waves broke over the old harbour wall, and the gulls turned inland before the storm.",
    "def add(a, b): return a + b",
    "No.",
    "Ein deutscher Satz über Züge, die nie pünktlich sind.",
    "the quick brown fox " * 20,
]


def load(directory: Path, dtype: torch.dtype = torch.float32) -> NativeEncoder:
    spec = EncoderSpec.from_dir(directory)
    return NativeEncoder(spec, load_weights(spec, directory, dtype, CPU))


def run(
    model: NativeEncoder, inputs: Sequence[Sequence[int]], segments: Sequence[int] = ()
) -> list[torch.Tensor]:
    """Hidden states of each input, all in one step."""
    lengths = [len(ids) for ids in inputs]
    ids = torch.tensor([token for ids in inputs for token in ids])
    positions = torch.cat([torch.arange(n) for n in lengths])
    types = None
    if segments:
        marks = [
            torch.arange(n) >= s if s else torch.zeros(n) for n, s in zip(lengths, segments, strict=True)
        ]
        types = torch.cat([mark.long() for mark in marks])
    with torch.inference_mode():
        hidden = model.forward(ids, positions, types, attention_groups(lengths, CPU))
    return list(hidden.split(lengths))


def random_inputs(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(5, 97) for _ in range(n)] for n in lengths
    ]  # no padding ids: transformers reads them


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_hidden_states_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = build(name)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    inputs = random_inputs([1, 3, 3, 3, 4, 30, 31, 150, 180, 180, 2])
    for ids, ours in zip(inputs, run(model, inputs), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).last_hidden_state[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    poolers = sum(p.numel() for n, p in reference.named_parameters() if "pooler" in n)
    assert model.spec.num_parameters == sum(p.numel() for p in reference.parameters()) - poolers


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_classifiers_equal_transformers(name: str, tmp_path: Path) -> None:
    reference = classifier(name)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.spec.head is not None and model.spec.head.labels == ("no", "maybe", "yes")
    assert model.spec.num_parameters == sum(p.numel() for p in reference.parameters())
    inputs = random_inputs([2, 7, 7, 40])
    with torch.inference_mode():
        for ids, ours in zip(inputs, run(model, inputs), strict=True):
            expected = reference(torch.tensor([ids])).logits
            torch.testing.assert_close(model.classify(ours[:1]), expected, atol=1e-4, rtol=0)


def test_the_second_text_of_a_pair_has_the_other_type(tmp_path: Path) -> None:
    reference = build("bert")
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    inputs = random_inputs([9, 12, 12])
    segments = [4, 0, 7]
    for ids, segment, ours in zip(inputs, segments, run(model, inputs, segments), strict=True):
        types = torch.tensor([[int(0 < segment <= i) for i in range(len(ids))]])
        with torch.inference_mode():
            expected = reference(torch.tensor([ids]), token_type_ids=types).last_hidden_state[0]
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_checkpoints_with_heads_of_other_tasks_load(tmp_path: Path) -> None:
    reference = build("bert", "AutoModelForMaskedLM")
    reference.save_pretrained(tmp_path)
    (ours,) = run(load(tmp_path), [[5, 6, 7]])
    with torch.inference_mode():
        expected = reference.bert(torch.tensor([[5, 6, 7]])).last_hidden_state[0]
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 80', '"intermediate_size": 64'))
    with pytest.raises(ModelError, match=r"wrong shape: .*intermediate"):
        load(tmp_path)
    with pytest.raises(ModelError, match="decoder"):
        EncoderSpec.from_config({"model_type": "bert", "is_decoder": True})
    with pytest.raises(ModelError, match="relative_key"):
        EncoderSpec.from_config({"model_type": "bert", "position_embedding_type": "relative_key"})
    with pytest.raises(ModelError, match="does not run here"):
        EncoderSpec.from_config({"model_type": "t5"})


def test_groups_hold_every_sequence_once_with_little_waste() -> None:
    rng = random.Random(3)
    for _ in range(50):
        lengths = sorted(rng.randint(1, 300) for _ in range(rng.randint(1, 40)))
        groups = attention_groups(lengths, CPU)
        assert [g.start for g in groups] == [0, *(g.stop for g in groups[:-1])]
        assert groups[-1].stop == sum(lengths) and sum(g.count for g in groups) == len(lengths)
        for g in groups:
            assert g.count * g.length * 0.75 <= g.stop - g.start
            if g.rows is not None and g.where is not None:
                assert g.rows.flatten()[g.where].tolist() == list(range(g.start, g.stop))


def test_pooling_equals_a_loop() -> None:
    hidden, lengths = torch.randn(12, 8), [1, 4, 7]
    modes = ("cls", "max", "mean", "mean_sqrt_len", "last")
    rows = hidden.split(lengths)
    expected = [torch.cat([r[0], r.max(0).values, r.mean(0), r.sum(0) / len(r) ** 0.5, r[-1]]) for r in rows]
    torch.testing.assert_close(pool(hidden, torch.tensor(lengths), modes), torch.stack(expected))


def _reference_embeddings(directory: Path, texts: Sequence[str]) -> np.ndarray:
    """What sentence-transformers does: the mean of the tokens, to length 1."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    reference = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    for text in texts:
        with torch.inference_mode():
            row = reference(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        rows.append((row / row.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_minilm_embeds_what_transformers_embeds(dtype: torch.dtype) -> None:
    directory = minilm()
    tokenizer = Tokenizer.from_dir(directory)
    inputs = [tokenizer.encode(text) for text in TEXTS]
    vectors = pool(
        torch.cat(run(load(directory, dtype), inputs)), torch.tensor([len(i) for i in inputs]), ["mean"]
    )
    ours = torch.nn.functional.normalize(vectors).numpy()
    expected = _reference_embeddings(directory, TEXTS)
    if dtype == torch.float32:
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert ((ours * expected).sum(1) > (0.999 if dtype == torch.bfloat16 else 1 - 1e-6)).all()


def test_a_fine_tuned_classifier_says_what_transformers_says() -> None:
    directory = Path(os.environ.get("LLMTOOL_DATA", "../shared/data")).parent / "models" / "minilm-l6-sst2"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not there")
    texts = ["A moving, funny film.", "Dull from its first minute to its last.", "It is set in Rome."]
    tokenizer = Tokenizer.from_dir(directory)
    inputs = [tokenizer.encode(text) for text in texts]
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    )
    with torch.inference_mode():
        expected = torch.cat([reference.eval()(torch.tensor([ids])).logits for ids in inputs])
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            model = load(directory, dtype)
            first = torch.stack([hidden[0] for hidden in run(model, inputs)])
            torch.testing.assert_close(model.classify(first), expected, atol=tolerance, rtol=0)
    assert expected.argmax(1).tolist()[:2] == [1, 0]
