"""Labelled data by name or from a file: GLUE and SQuAD from a local copy or the hub; TSV, CSV and JSONL.

Tables are read by `datasets`. A local copy in the data's own files is looked for before the hub is asked: GLUE
under $LLMTOOL_DATA/glue (SST-2/train.tsv, ...), SQuAD under $LLMTOOL_DATA/squad (train-v1.1.json, ...).
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtool.errors import UsageError


@dataclass(frozen=True, slots=True)
class Row:
    """One example. label: a class, a number for regression, or None. answers: (text, start in `pair`) of SQuAD.
    key: its id where the data set has one."""

    text: str
    pair: str | None = None
    label: float | int | str | None = None
    answers: tuple[tuple[str, int], ...] | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class Files:
    """A task in GLUE's own files. columns: of text, pair and label, by name or, without a header, by place."""

    directory: str
    columns: tuple[str | int, str | int | None, str | int]
    dev: str = "dev.tsv"
    header: bool = True


@dataclass(frozen=True, slots=True)
class Task:
    """kind: classification | regression | qa. hub: data set, configuration. columns: of text and pair there.

    max_length, mean_length: tokens; those of the released code of arXiv 2204.09656, whose MACs are counted at the
    mean length. labels: names of classes in order, where files spell them out.
    """

    name: str
    kind: str
    hub: tuple[str, str | None]
    columns: tuple[str, str | None]
    metric: str
    max_length: int
    mean_length: float
    num_labels: int
    files: Files | None = None
    labels: tuple[str, ...] = ()
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "dev": "validation"})


_GLUE = "nyu-mll/glue"
_NLI = ("entailment", "not_entailment")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sst2", "classification", (_GLUE, "sst2"), ("sentence", None), "accuracy", 64, 25.16, 2,
             Files("SST-2", ("sentence", None, "label"))),
        Task("mrpc", "classification", (_GLUE, "mrpc"), ("sentence1", "sentence2"), "accuracy", 128, 53.24, 2,
             Files("MRPC", ("#1 String", "#2 String", "Quality"))),
        Task("cola", "classification", (_GLUE, "cola"), ("sentence", None), "matthews", 64, 11.67, 2,
             Files("CoLA", (3, None, 1), header=False)),
        Task("stsb", "regression", (_GLUE, "stsb"), ("sentence1", "sentence2"), "spearman", 128, 31.47, 1,
             Files("STS-B", ("sentence1", "sentence2", "score"))),
        Task("qqp", "classification", (_GLUE, "qqp"), ("question1", "question2"), "accuracy", 128, 30.55, 2,
             Files("QQP", ("question1", "question2", "is_duplicate"))),
        Task("mnli", "classification", (_GLUE, "mnli"), ("premise", "hypothesis"), "accuracy", 128, 39.05, 3,
             Files("MNLI", ("sentence1", "sentence2", "gold_label"), dev="dev_matched.tsv"),
             ("entailment", "neutral", "contradiction"),
             {"train": "train", "dev": "validation_matched"}),
        Task("qnli", "classification", (_GLUE, "qnli"), ("question", "sentence"), "accuracy", 128, 50.97, 2,
             Files("QNLI", ("question", "sentence", "label")), _NLI),
        Task("rte", "classification", (_GLUE, "rte"), ("sentence1", "sentence2"), "accuracy", 128, 64.59, 2,
             Files("RTE", ("sentence1", "sentence2", "label")), _NLI),
        Task("squad", "qa", ("rajpurkar/squad", None), ("question", "context"), "f1", 384, 170.0, 0),
        Task("squad_v2", "qa", ("rajpurkar/squad_v2", None), ("question", "context"), "f1", 384, 170.0, 0),
    )
}  # fmt: skip
_TEXT = ("text", "sentence", "sentence1", "question", "question1", "premise", "#1 String")
_PAIR = ("pair", "text_pair", "sentence2", "context", "question2", "hypothesis", "#2 String")
_LABEL = ("label", "labels", "score", "class", "Quality")


def task_of(name: str) -> Task:
    """The task of that name, however it is spelled (SST-2, sst2). Raises UsageError."""
    key = name.lower().replace("-", "").replace("_", "").replace("squadv2", "squad_v2")
    if key not in TASKS:
        raise UsageError(
            f"There is no task {name!r}.",
            f"Give one of {', '.join(TASKS)}, or your own file with --data.",
        )
    return TASKS[key]


def load_task(task: Task, split: str) -> list[Row]:
    """Rows of a split (train or dev). Raises UsageError when it is neither on this machine nor to be had."""
    local = _local(task, split)
    if local is not None and task.files is None:
        return _squad_rows(local)
    if local is not None and task.files is not None:
        return _rows_of_files(task, task.files, local)
    import datasets
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()  # its retries; the error below says it once
    name, configuration = task.hub
    try:
        table = datasets.load_dataset(name, configuration, split=task.splits[split])
    except Exception as e:  # the hub's client raises many kinds, of which none says what to do
        raise UsageError(
            f"The data of {task.name} cannot be had: {_first_line(e)}",
            f"Put it at $LLMTOOL_DATA/{_path(task, split)}, check the network, or give a file with --data.",
        ) from e
    if task.kind == "qa":
        return [_squad_row(row) for row in table]
    text, pair = task.columns
    return [Row(row[text], row[pair] if pair else None, row["label"]) for row in table]


def load_file(path: str | Path) -> list[Row]:
    """Rows of a TSV, CSV, JSON or JSONL file with a column of text, perhaps of a second text, perhaps of labels;
    SQuAD's question, context and answers too. Raises UsageError naming what is wrong."""
    path = Path(path)
    table = _read_table(path, header=True)
    columns = table.column_names
    text = _first(_TEXT, columns)
    if text is None:
        raise UsageError(
            f"{path} has no column of text (its columns: {', '.join(columns)}).",
            f"Name it {' or '.join(_TEXT[:2])}; a second text {' or '.join(_PAIR[:2])}, labels {_LABEL[0]}.",
        )
    if "answers" in columns and "context" in columns:
        return [_squad_row(row) for row in table]
    pair, label = _first(_PAIR, columns), _first(_LABEL, columns)
    rows = [
        Row(str(row[text]), None if pair is None else str(row[pair]), None if label is None else row[label])
        for row in table
    ]
    if not rows:
        raise UsageError(f"{path} has no rows.")
    return rows


def _local(task: Task, split: str) -> Path | None:
    path = Path(os.environ.get("LLMTOOL_DATA", "../shared/data")) / _path(task, split)
    return path if path.is_file() else None


def _path(task: Task, split: str) -> Path:
    if task.files is None:
        version = "v2.0" if task.name == "squad_v2" else "v1.1"
        return Path("squad") / f"{split}-{version}.json"
    return Path("glue") / task.files.directory / (task.files.dev if split == "dev" else f"{split}.tsv")


def _squad_rows(path: Path) -> list[Row]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
        return [
            _squad_row(
                qa
                | {
                    "context": paragraph["context"],
                    "answers": {key: [a[key] for a in qa["answers"]] for key in ("text", "answer_start")},
                }
            )
            for article in data
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UsageError(
            f"{path} is not a file of SQuAD: {_first_line(e)}",
            "Put the one of its authors there, or remove it.",
        ) from e


def _rows_of_files(task: Task, files: Files, path: Path) -> list[Row]:
    table = _read_table(path, files.header)
    names = [c if isinstance(c, str) else None if c is None else table.column_names[c] for c in files.columns]
    text, pair, label = names
    return [
        Row(
            str(row[text]).strip(), None if pair is None else str(row[pair]).strip(), _label(row[label], task)
        )
        for row in table
        if row[label] is not None and row[text] is not None
    ]


def _read_table(path: Path, header: bool) -> Any:
    import datasets

    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    suffix = path.suffix.lower()
    datasets.disable_progress_bars()
    try:
        if suffix in (".json", ".jsonl"):
            return datasets.Dataset.from_json(str(path), keep_in_memory=True)
        separator = "\t" if suffix == ".tsv" else ","
        extra: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if separator == "\t" else {}
        if not header:
            with path.open(encoding="utf-8") as file:
                extra["names"] = [f"c{i}" for i in range(file.readline().count(separator) + 1)]
        return datasets.Dataset.from_csv(
            str(path), sep=separator, keep_in_memory=True, encoding="utf-8-sig", on_bad_lines="skip", **extra
        )
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as e:
        raise UsageError(
            f"{path} cannot be read as {suffix.removeprefix('.') or 'CSV'}: {_first_line(e)}",
            "Give a TSV or CSV file with a header line, or JSONL with one object a line.",
        ) from e


def _label(value: Any, task: Task) -> float | int:
    if task.labels:
        return task.labels.index(str(value))
    return float(value) if task.kind == "regression" else int(value)


def _squad_row(row: Mapping[str, Any]) -> Row:
    answers = row.get("answers") or {}
    texts: Sequence[str] = answers.get("text", ())
    starts: Sequence[int] = answers.get("answer_start", ())
    pairs = tuple(zip(texts, starts, strict=True))
    return Row(str(row["question"]).strip(), str(row["context"]), None, pairs, str(row.get("id", "")))


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
