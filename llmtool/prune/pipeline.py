"""A run of `llmtool prune`: load, calibrate, prune, take out, verify, measure, write. All of it or nothing."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from llmtool.errors import UsageError
from llmtool.prune import data as datasets
from llmtool.prune import latency, report
from llmtool.prune.baselines import Baseline
from llmtool.prune.batches import batches
from llmtool.prune.budget import Budget
from llmtool.prune.config import PruneConfig
from llmtool.prune.cost import CostModel
from llmtool.prune.data import Data
from llmtool.prune.export import huggingface
from llmtool.prune.masks import binary_masks
from llmtool.prune.model import Loaded, find, load_model
from llmtool.prune.objective import Objective
from llmtool.prune.obs import Obs, Result, Settings
from llmtool.prune.remove import remove, sizes_after, verify
from llmtool.prune.report import Point, Report
from llmtool.prune.seed import Paper
from llmtool.prune.units import consumer_of

Progress = Callable[[str, float | None], None]
GRANULARITY = {"cpu": 16, "cuda": 64}  # of MLP widths: what the device's matrix kernels come in
MEASURED_BATCHES = (1, 32)


class Method(Protocol):
    """A calibrated method: any number of budgets from one calibration."""

    def prune(self, budget: Budget, costs: CostModel) -> Result: ...


class Run:
    """One run; `execute` does it. progress: (what, fraction or None)."""

    def __init__(self, config: PruneConfig, progress: Progress = lambda what, fraction: None) -> None:
        config.check()
        self.config, self.progress = config, progress
        self.seconds: dict[str, float] = {}

    def execute(self) -> Report:
        """Raises LLMToolError; then the output directory is as it was."""
        config = self.config
        if config.sweep:
            report.plotter()  # missing, it is missed now and not after minutes of work
        if "onnx" in config.export:
            from llmtool.prune.export import onnx

            onnx.require()
        with _staged(config.output) as directory:
            with self._phase("load"):
                loaded = self._load()
            with self._phase("data"):
                found = self._data(loaded)
            costs = self._costs(loaded, found)
            budget = Budget(config.budget) if config.budget else None
            if budget is not None:
                budget.absolute(costs, loaded.sublayers)
            if config.draft:
                from llmtool.prune.draft import write_draft

                with self._phase("draft"):
                    outcome = write_draft(loaded, found, config, directory, self.progress)
                if budget is None and not config.sweep:
                    return self._finish(self._report(loaded, found), directory, {"draft": outcome})
            else:
                outcome = None
            with self._phase("calibrate"):
                method = self._method(loaded, found)
            done = self._report(loaded, found)
            if config.sweep:
                with self._phase("sweep"):
                    self._sweep(loaded, found, method, costs, directory)
            if budget is not None:
                self._prune(loaded, found, method, costs, budget, done, directory)
            return self._finish(done, directory, {"draft": outcome} if outcome else {})

    # -- parts -----------------------------------------------------------------------------------------------

    def _load(self) -> Loaded:
        self.progress("Loading the model", None)
        directory = find(self.config.model)
        return load_model(directory, _device(self.config.device))

    def _data(self, loaded: Loaded) -> Data:
        config = self.config
        self.progress("Reading data", None)
        if config.task is not None:
            return datasets.of_task(loaded, config.task, config.samples, config.seed)
        if config.data is not None:
            return datasets.of_file(loaded, config.data, config.samples, config.seed)
        if config.text is not None:
            text = _read(config.text)
            return datasets.of_text(loaded, text, config.text.name, config.samples, config.seed)
        return datasets.default(loaded, config.samples, config.seed)

    def _costs(self, loaded: Loaded, found: Data) -> CostModel:
        shape = loaded.shape(found.tokens)
        if "latency" not in self.config.budget:
            return CostModel(shape)
        with self._phase("measure"):
            self.progress("Measuring latency", None)
            tokens = max(1, round(found.tokens))
            table = latency.measure(loaded, self.config.latency_batch, tokens, self._granularity(loaded))
        return CostModel(shape, table)

    def _granularity(self, loaded: Loaded) -> int:
        device = next(loaded.model.parameters()).device.type
        step = self.config.granularity or GRANULARITY.get(device, 16)
        if step < 1:
            raise UsageError(f"--granularity must be at least 1, and is {step}.")
        return min(step, loaded.sublayers[1].num_units)

    def _method(self, loaded: Loaded, found: Data) -> Method:
        config, objective = self.config, Objective(loaded.head, found.labelled)
        torch.manual_seed(config.seed)
        if config.method == "obs":
            settings = Settings(self._granularity(loaded), config.uniform, config.rounds)
            return Obs(loaded, found.items, objective, config.seed, settings, self.progress)
        if config.method == "paper":
            return Paper(loaded, found.items, objective, config.seed, self.progress)
        return Baseline(config.method, loaded, found.items, config.seed, self.progress)

    def _sweep(self, loaded: Loaded, found: Data, method: Method, costs: CostModel, directory: Path) -> None:
        kinds = [k for k in self.config.budget if k != "latency"] or ["flops"]
        kind, points = kinds[0], []
        dense = self._score(loaded, found, loaded.model)
        for i, share in enumerate(self.config.sweep):
            self.progress(f"Sweep: {kind} {share:g}", i / len(self.config.sweep))
            result = method.prune(Budget({kind: share}), costs)
            scores = self._score(loaded, found, result.model)
            name = next(iter(scores))
            spent = costs.total(kind, loaded.sublayers, result.kept) / costs.dense(kind, loaded.sublayers)
            points.append(Point(share, spent, name, scores[name], dense[name]))
        report.write_sweep(points, kind, directory)

    def _prune(
        self,
        loaded: Loaded,
        found: Data,
        method: Method,
        costs: CostModel,
        budget: Budget,
        done: Report,
        directory: Path,
    ) -> None:
        config, objective = self.config, Objective(loaded.head, found.labelled)
        with self._phase("prune"):
            result = method.prune(budget, costs)
        for kind, c in report.cost_table(costs, loaded.sublayers, result.kept, config.budget).items():
            done.cost[kind] = c
            assert c["budget"] is None or c["share"] is None or c["share"] <= c["budget"] * (1 + 1e-9), kind
        with self._phase("verify"):
            self.progress("Removing units and verifying", None)
            small = remove(loaded, result.model, result.kept)
            few = batches(found.items[: 4 if loaded.causal else 32], 32, loaded.pad_id)[0]
            done.verified = verify(loaded, result.model, small, result.kept, few, objective)
        with self._phase("score"):
            self.progress("Scoring", None)
            before, after = self._score(loaded, found, loaded.model), self._score(loaded, found, small)
            done.metric = {name: {"dense": before[name], "small": after[name]} for name in after}
        with self._phase("latency"):
            self.progress("Measuring dense against small", None)
            done.latency_tokens = max(1, round(found.tokens))
            done.latency = latency.compare(
                loaded,
                {"dense": loaded.model, "small": small},
                MEASURED_BATCHES,
                done.latency_tokens,
                rounds=5,
            )
        done.layers = report.layer_reports(costs, loaded.sublayers, result.kept)
        done.fits = {
            name: {"how": f.how, "ridge": f.ridge, "error": f.error, "before": f.before}
            for name, f in result.fits.items()
        }
        done.notes |= result.notes
        with self._phase("write"):
            self._write(loaded, result, small, directory, done)

    def _write(self, loaded: Loaded, result: Result, small: Any, directory: Path, done: Report) -> None:
        config = self.config
        self.progress("Writing", None)
        sizes = sizes_after(loaded.sublayers, result.kept)
        if "onnx" in config.export:
            from llmtool.prune.export import onnx

            done.notes["onnx_difference"] = onnx.write(loaded, small, directory / "model.onnx")
        if "gguf" in config.export:
            from llmtool.prune.export import gguf

            gguf.write(loaded, small, sizes, directory / "model.gguf")
        dtype = huggingface.source_dtype(loaded)
        done.notes["plain"] = huggingface.write(loaded, small, sizes, directory / "model", dtype)
        masks = binary_masks(loaded.sublayers, result.kept)
        tensors = {f"layer.{s.layer}.{s.kind}": mask for s, mask in zip(loaded.sublayers, masks, strict=True)}
        for s in loaded.sublayers:
            weight = consumer_of(result.model, loaded.layout, s).weight
            tensors[f"layer.{s.layer}.{s.kind}.weight"] = weight.to(dtype).contiguous().cpu()
        save_file(
            tensors, directory / "masks.safetensors", metadata={"format": "pt", "method": config.method}
        )

    def _score(self, loaded: Loaded, found: Data, model: Any) -> dict[str, float]:
        """The data's metric; without one, how far answers on held-out samples agree with the dense model's."""
        scores = found.score(model, loaded.pad_id)
        if scores or not found.held_out:
            return scores
        return {"agreement": _agreement(loaded, model, found)}

    def _report(self, loaded: Loaded, found: Data) -> Report:
        config = self.config
        return Report(
            command=config.command,
            seed=config.seed,
            method=config.method,
            model=str(loaded.source),
            calibration=found.about,
            device=str(next(loaded.model.parameters()).device),
            versions={n: version(n) for n in ("llmtool", "torch", "transformers")}
            | {"python": platform.python_version()},
        )

    def _finish(self, done: Report, directory: Path, extra: dict[str, Any]) -> Report:
        done.notes |= extra
        done.seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        done.peak_memory_bytes = _peak_memory()
        text = json.dumps(done.as_dict(), indent=2, default=str)
        (directory / "report.json").write_text(text + "\n", encoding="utf-8")
        return done

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its place when all went well, and is gone when not.

    Raises UsageError, before anything else happens, where `output` cannot be written or holds something already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} is there already.", "Give another directory with -o, or remove it.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise UsageError(
            f"The output {output} cannot be written: {error.strerror or error}.", "Give a directory with -o."
        ) from error
    try:
        built = scratch / "out"
        built.mkdir()
        yield built
        if output.exists():
            output.rmdir()
        built.rename(output)
    except OSError as error:
        raise UsageError(f"The output {output} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@torch.no_grad()
def _agreement(loaded: Loaded, model: Any, found: Data) -> float:
    """Mean cosine of embeddings, or the share of samples with the same answer."""
    objective, device = Objective(loaded.head, False), next(model.parameters()).device
    total = 0.0
    for part in batches(found.held_out, 32, loaded.pad_id):
        on_device = part.to(device)
        a, b = (objective.answers(m(**on_device.inputs), on_device).float() for m in (loaded.model, model))
        total += float(_alike(loaded.head, a, b).sum())
    return total / len(found.held_out)


def _alike(head: str, a: Tensor, b: Tensor) -> Tensor:
    if head in ("embedding", "regression"):
        return F.cosine_similarity(a, b, dim=-1)
    same = (a.argmax(-1) == b.argmax(-1)).float()
    return same if same.dim() == 1 else same.mean(1)


def _device(name: str | None) -> torch.device:
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"There is no device {name!r}: {str(error).splitlines()[0]}") from error
    return device


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"The text {path} cannot be read: {reason}.") from None


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
