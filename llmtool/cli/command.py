"""What every command shares: the output sink, error handling with exit codes, sizes on the command line."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from llmtool.cli.output import Output
from llmtool.errors import LLMToolError, UsageError

F = TypeVar("F", bound=Callable[..., None])

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no hints.")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE", help="TOML file with settings; flags win.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resulting settings and exit.")]

MASK = "***"  # in place of a key, where settings are shown

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def command(body: F) -> F:
    """Errors become one sentence, a remedy and an exit code; a traceback only with LLMTOOL_DEBUG=1. The body's
    `as_json` and `quiet` arguments, where it has them, decide how."""

    @functools.wraps(body)
    def guarded(**arguments: Any) -> None:
        try:
            body(**arguments)
        except LLMToolError as error:
            if os.environ.get("LLMTOOL_DEBUG") == "1":
                raise
            Output(arguments.get("as_json", False), arguments.get("quiet", False)).error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise typer.Exit(1) from None

    return guarded  # type: ignore[return-value]


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "2G", "1.5gb" or "1000000". Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise UsageError(f"{text!r} is not a size.", "Write for example 2GiB, 512MiB or a number of bytes.")
    number, unit, binary = match.groups()
    return int(float(number) * (_BINARY[unit] if binary and unit else _UNITS[unit]))


def optional_size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)
