"""lm-eval's `local-completions` against the server gives what its transformers backend gives on the same model."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.acceptance.servers import RunningServer

# One task of each kind of request that lm-eval makes; {data} is a JSONL file.
TASKS = {
    "sentiment": """
task: sentiment
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Review: {{{{text}}}}\\nThis review is"
doc_to_choice: [" negative", " positive and kind"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""",
    "shakespeare": """
task: shakespeare
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
""",
    "arithmetic": """
task: arithmetic
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {{until: ["\\n\\n", "Question:"], max_gen_toks: 24, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
""",
}
WINDOW = 192  # tokens: the Shakespeare passages are several of it


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tasks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tasks, over excerpts of the test data."""
    directory = tmp_path_factory.mktemp("tasks")
    with (data / "glue" / "SST-2" / "dev.tsv").open(newline="") as file:
        reviews = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:25]
    play = (data / "prompts" / "tiny_shakespeare.txt").read_text()
    lines = (data / "prompts" / "gsm8k_test.jsonl").read_text().splitlines()[:3]
    rows = {
        "sentiment": [{"text": text.strip(), "label": int(label)} for text, label in reviews],
        "shakespeare": [{"text": play[start : start + 1200]} for start in (0, 50_000)],
        "arithmetic": [{k: json.loads(line)[k] for k in ("question", "answer")} for line in lines],
    }
    for name, text in TASKS.items():
        path = write_jsonl(directory / f"{name}.jsonl", rows[name])
        (directory / f"{name}.yaml").write_text(text.format(data=path))
    return directory


def evaluate(tasks: Path, model: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    results = simple_evaluate(
        model=model,
        model_args=dict(arguments),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        batch_size=1,
        log_samples=True,
    )
    assert results is not None
    return results


@pytest.fixture(scope="module")
def expected(tasks: Path, model_dir: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return evaluate(
        tasks,
        "hf",
        {"pretrained": str(model_dir), "dtype": "float32", "device": "cpu", "max_length": WINDOW},
    )


@pytest.fixture(scope="module")
def found(tasks: Path, model_dir: Path, exact_server: RunningServer) -> dict[str, Any]:
    return evaluate(
        tasks,
        "local-completions",
        {
            "model": exact_server.model,
            "base_url": f"{exact_server.api}/completions",
            "tokenizer": str(model_dir),
            "num_concurrent": 4,
            "max_retries": 1,
            "max_length": WINDOW + 2,  # this backend keeps two of them back
        },
    )


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_equal(expected: dict[str, Any], found: dict[str, Any], task: str) -> None:
    scores = {
        name: value
        for name, value in expected["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    }
    assert scores
    for name, value in scores.items():
        assert found["results"][task][name] == pytest.approx(value, rel=1e-3, abs=1e-3), name


def test_loglikelihoods_of_choices_are_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    theirs, ours = expected["samples"]["sentiment"], found["samples"]["sentiment"]
    assert len(theirs) == len(ours) == 24
    for a, b in zip(theirs, ours, strict=True):
        assert a["doc"] == b["doc"]
        for (value, greedy), (our_value, our_greedy) in zip(
            _pairs(a["filtered_resps"]), _pairs(b["filtered_resps"]), strict=True
        ):
            assert our_value == pytest.approx(value, abs=1e-2) and our_greedy == greedy
    assert len({round(_pairs(b["filtered_resps"])[0][0], 3) for b in ours}) > 12, "answers hardly differ"


def _pairs(responses: list[Any]) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of each choice; samples hold them as text in some versions."""
    return [(float(value), str(greedy) == "True") for value, greedy in responses]


def test_rolling_loglikelihoods_are_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    theirs, ours = expected["samples"]["shakespeare"], found["samples"]["shakespeare"]
    for a, b in zip(theirs, ours, strict=True):
        (value,), (our_value,) = a["filtered_resps"], b["filtered_resps"]
        assert our_value == pytest.approx(value, abs=1e-2)
        assert value < -300 and math.isfinite(value)


def test_generated_answers_are_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    theirs, ours = expected["samples"]["arithmetic"], found["samples"]["arithmetic"]
    assert [b["filtered_resps"] for b in ours] == [a["filtered_resps"] for a in theirs]
    assert all(b["filtered_resps"][0].strip() for b in ours)
