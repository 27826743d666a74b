"""Calibration and evaluation data: a task, a file, plain text, images, or the English of the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtool.errors import UsageError
from llmtool.prune import metrics
from llmtool.prune.batches import Item, sample
from llmtool.prune.encode import Window, encode_answers, encode_blocks, encode_rows
from llmtool.prune.model import Loaded, check_head
from llmtool.prune.tasks import Row, Task, load_file, load_task, task_of

TEXT_LENGTH = 128  # tokens of a block of plain text, as FLAP's and Wanda-sp's protocol has it
LEAST = 16  # samples, below which nothing can be fitted or held out


@dataclass(slots=True)
class Data:
    """items: to calibrate on. tokens: S at which MACs are counted, the mean length (a task's own where it has one).
    held_out: to score the dense and the pruned model on, with rows and windows for SQuAD. about: what it is."""

    items: list[Item]
    labelled: bool
    tokens: float
    about: str
    metric: str = ""
    held_out: Sequence[Item] = ()
    rows: Sequence[Row] = ()
    windows: Sequence[Window] = ()

    def score(self, model: Any, pad_id: int) -> dict[str, float]:
        """The metric of a model on held_out; empty where there is none. Of perplexity less is better."""
        if not self.held_out or not self.metric:
            return {}
        if self.metric == "perplexity":
            return {"perplexity": metrics.perplexity(model, self.held_out)}
        answers = metrics.answers_of(model, self.held_out, pad_id)
        if self.metric == "f1":
            f1, exact = metrics.squad_scores(self.rows, self.windows, answers)
            return {"f1": f1, "exact_match": exact}
        return {self.metric: metrics.task_score(self.metric, answers, [i.label for i in self.held_out])}


def of_task(loaded: Loaded, name: str, samples: int, seed: int, max_eval: int | None = None) -> Data:
    """Training rows to calibrate on, development rows to score on. Raises UsageError."""
    task = task_of(name)
    check_head(loaded, task.kind, task.name)
    if task.kind == "classification" and loaded.model.config.num_labels != task.num_labels:
        raise UsageError(
            f"The task {task.name} has {task.num_labels} classes, and the model {loaded.model.config.num_labels}.",
            "Give a model fine-tuned on the task.",
        )
    train = list(sample(load_task(task, "train"), samples, seed))
    _enough(len(train), samples, f"the task {task.name}")
    dev = load_task(task, "dev")[:max_eval]
    return _labelled(loaded, task, train, dev)


def of_file(loaded: Loaded, path: Path, samples: int, seed: int) -> Data:
    """Rows of a file: nine in ten to calibrate on, the rest to score on. Without labels, or with a head that takes
    none, label-free. For a model of images, a directory of them. Raises UsageError."""
    if loaded.is_image:
        return _images(loaded, path, samples, seed)
    rows = list(sample(load_file(path), samples + max(8, samples // 4), seed))
    apart = min(len(rows) // 10 + 1, 1000) if len(rows) <= samples else len(rows) - samples
    dev, train = rows[:apart], rows[apart:]
    _enough(len(train), samples, str(path))
    if loaded.head == "lm":
        return of_text(loaded, "\n\n".join(r.text for r in rows), f"the text of {path.name}", samples, seed)
    if loaded.head == "qa" or (rows[0].label is not None and loaded.head in ("classification", "regression")):
        metric = {"qa": "f1", "regression": "spearman"}.get(loaded.head, "accuracy")
        task = Task(path.name, loaded.head, ("", None), ("", None), metric, _longest(loaded), 0.0, 0)
        return _labelled(loaded, task, train, dev)
    items, held_out = (
        encode_rows([Row(r.text, r.pair) for r in part], loaded.tokenizer, _longest(loaded))
        for part in (train, dev)
    )
    about = f"{len(items)} texts of {path.name}, label-free"
    return Data(items, False, _mean(items), about, held_out=held_out)


def of_text(loaded: Loaded, text: str, about: str, samples: int, seed: int) -> Data:
    """Blocks of text, label-free; of a decoder also held-out blocks for perplexity. Raises UsageError where the
    text is too short."""
    length = min(TEXT_LENGTH, _longest(loaded))
    if loaded.head == "lm":
        blocks = encode_blocks(text, loaded.tokenizer, length)
    else:
        lines = [line.strip() for line in text.splitlines()]
        rows = [Row(line) for line in lines if len(line.split()) >= 4]
        blocks = encode_rows(rows, loaded.tokenizer, length)
    chosen = list(sample(blocks, samples + max(4, samples // 8), seed))
    apart = min(len(chosen) // 8, 128)
    held_out, items = chosen[:apart], chosen[apart : apart + samples]
    _enough(len(items), samples, about)
    metric = "perplexity" if loaded.head == "lm" else ""
    about = f"{len(items)} samples of {about}, label-free"
    return Data(items, loaded.head == "lm", _mean(items), about, metric, held_out)


def bundled_text() -> str:
    """Real English that is on every machine: the language reference inside Python's own help."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def default(loaded: Loaded, samples: int, seed: int) -> Data:
    """Without any data given. Raises UsageError for a model of images."""
    if loaded.is_image:
        raise UsageError(
            "A model of images needs images to calibrate on.", "Give a directory of them with --data."
        )
    return of_text(loaded, bundled_text(), "the text of Python's own help", samples, seed)


def _labelled(loaded: Loaded, task: Task, train: list[Row], dev: list[Row]) -> Data:
    longest = min(task.max_length, _longest(loaded))
    rows: Sequence[Row] = ()
    windows: Sequence[Window] = ()
    if task.kind == "qa":
        items, _ = encode_answers(train, loaded.tokenizer, longest)
        items = items[: len(train)]
        held_out, windows = encode_answers(dev, loaded.tokenizer, longest)
        rows = dev
    else:
        items = encode_rows(train, loaded.tokenizer, longest, loaded.label_ids)
        held_out = encode_rows(dev, loaded.tokenizer, longest, loaded.label_ids)
        if any(item.label is None for item in items):
            raise UsageError(f"Rows of {task.name} have no labels.", "Give labelled rows, or use --text.")
    about = f"{len(items)} labelled samples of {task.name}"
    return Data(items, True, task.mean_length or _mean(items), about, task.metric, held_out, rows, windows)


def _images(loaded: Loaded, path: Path, samples: int, seed: int) -> Data:
    import datasets
    from transformers import AutoImageProcessor

    if not path.is_dir():
        raise UsageError(f"{path} is no directory of images.", "Give one with --data.")
    try:
        table = datasets.load_dataset("imagefolder", data_dir=str(path), split="train", drop_labels=True)
        processor = AutoImageProcessor.from_pretrained(loaded.source)
        chosen = [row["image"].convert("RGB") for row in sample(table, samples, seed)]
        pixels = processor(images=chosen, return_tensors="pt")["pixel_values"]
    except (ValueError, OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"The images in {path} cannot be read: {str(error).splitlines()[0]}") from error
    _enough(len(pixels), samples, str(path))
    config = loaded.model.config
    patches = (config.image_size // config.patch_size) ** 2 + 1
    items = [Item({"pixel_values": p}) for p in pixels]
    apart = len(items) // 8
    about = f"{len(items) - apart} images, label-free"
    return Data(items[apart:], False, patches, about, held_out=items[:apart])


def _enough(found: int, samples: int, where: str) -> None:
    if samples < LEAST:
        raise UsageError(f"{samples} samples are too few to calibrate on.", f"Give at least {LEAST}.")
    if found < LEAST:
        raise UsageError(
            f"There are {found} samples in {where}, and at least {LEAST} are needed.", "Give more data."
        )


def _longest(loaded: Loaded) -> int:
    limit = int(getattr(loaded.model.config, "max_position_embeddings", 512))
    # RoBERTa's positions start behind its padding index.
    limit -= 2 if loaded.family == "roberta" else 0
    return min(limit, 512)


def _mean(items: Sequence[Item]) -> float:
    return sum(item.length for item in items) / max(1, len(items))
