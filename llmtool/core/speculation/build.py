"""Speculation from settings: `--spec` and `--proposer` as people write them."""

from __future__ import annotations

import tomllib
from pathlib import Path

from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.controllers import (
    Controller,
    FixedController,
    SmartSpecController,
    TableController,
)
from llmtool.core.speculation.speculator import BatchProposer, Speculator
from llmtool.core.speculation.suffix import SuffixProposer, check_branches
from llmtool.errors import UsageError


def controller_of(spec: str) -> Controller | None:
    """auto | off | smartspec | a number | a TOML file of batch size = draft tokens. None is off.

    Raises UsageError for anything else, a file that cannot be read, or lengths out of range.
    """
    if spec in ("off", "0"):
        return None
    if spec == "auto":
        return AutoController()
    if spec == "smartspec":
        return SmartSpecController()
    if spec.lstrip("-").isdecimal():
        return FixedController(int(spec))
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UsageError(
            f"There is no speculation {spec!r}, nor a file of that name.",
            "Give auto, off, smartspec, a number of draft tokens, or a TOML file with lines like 8 = 3.",
        )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        lengths = {int(batch): k for batch, k in table.items()}
    except (OSError, ValueError) as error:  # tomllib's and Unicode's errors are ValueErrors
        raise UsageError(f"The table of speculation lengths {spec} cannot be read: {error}.") from None
    if any(not isinstance(k, int) or isinstance(k, bool) for k in lengths.values()):
        raise UsageError(f"The table of speculation lengths {spec} has lengths that are no whole numbers.")
    return TableController(lengths)


def model_of(proposer: str) -> tuple[str, str] | None:
    """(kind, argument) of the model that drafts: ("draft", a model), ("pruned", layers), or None.

    suffix | draft:MODEL | pruned[:LAYERS] | union, which is suffix and pruned, or suffix and another as in
    union:draft:MODEL. Raises UsageError for anything else.
    """
    given = proposer
    if proposer == "suffix":
        return None
    if proposer == "union" or proposer.startswith("union:"):
        proposer = proposer.removeprefix("union").removeprefix(":") or "pruned"
    kind, _, argument = proposer.partition(":")
    if kind == "pruned" or (kind == "draft" and argument):
        return kind, argument
    raise UsageError(
        f"There is no proposer {given!r}.",
        "Known: suffix, draft:MODEL, pruned, pruned:LAYERS, union, union:draft:MODEL, union:pruned:LAYERS.",
    )


def check_speculation(spec: str, proposer: str, branches: int = 1) -> None:
    """Raises UsageError where `speculator_of` would."""
    controller_of(spec)
    model_of(proposer)
    check_branches(branches)
    if branches > 1 and not _has_text(proposer):
        raise UsageError(
            f"The proposer {proposer!r} drafts one way on, not {branches}.",
            "Take suffix or union, or 1 branch.",
        )


def speculator_of(
    spec: str, proposer: str, model: BatchProposer | None = None, branches: int = 1
) -> Speculator | None:
    """What a scheduler drafts with; None is off, and then nothing is made. model: the one that `model_of` names.
    branches: ways on that a draft from text shows at most; more than 1 make trees.

    Raises UsageError.
    """
    check_speculation(spec, proposer, branches)
    controller = controller_of(spec)
    if controller is None:
        return None
    assert (model_of(proposer) is None) == (model is None), f"{proposer} and {model}"
    text = SuffixProposer(branches=branches) if _has_text(proposer) else None
    return Speculator(controller, text, model)


def _has_text(proposer: str) -> bool:
    return proposer == "suffix" or proposer.startswith("union")
