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
from llmtool.core.speculation.speculator import Speculator
from llmtool.core.speculation.suffix import SuffixProposer
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


def speculator_of(spec: str, proposer: str) -> Speculator | None:
    """What a scheduler drafts with; None is off, and then nothing is made. Raises UsageError."""
    controller = controller_of(spec)
    if proposer != "suffix":
        raise UsageError(f"There is no proposer {proposer!r}.", "Known: suffix.")
    return None if controller is None else Speculator(controller, SuffixProposer())
