"""The one place that prints: results to stdout, progress and hints to stderr; rich, json or quiet."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from llmtool.errors import LLMToolError

# Off a terminal: how often a line says how far a command is, and how often at most.
PROGRESS_SECONDS = 10.0
PROGRESS_SHARE = 0.1
PROGRESS_PAUSE = 1.0


class Output:
    """as_json: one JSON document on stdout and nothing else there. quiet: no progress, no hints."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def document(self, data: Any) -> None:
        """The result of a command under --json."""
        if self.as_json:
            json.dump(data, sys.stdout, indent=2, default=str)
            sys.stdout.write("\n")
            sys.stdout.flush()

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
    ) -> None:
        """A result for a person. The first column is text, the others are figures."""
        if self.as_json:
            return
        from rich.table import Table

        table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        # Better a line too long than a figure cut in two.
        console = self._stdout()
        natural = console.measure(table, options=console.options.update(max_width=1000)).maximum
        console.width = max(console.width, natural)
        console.print(table)

    def line(self, text: str) -> None:
        """A result that is one line."""
        if not self.as_json:
            self._stdout().print(text, markup=False, highlight=False, soft_wrap=True)

    def hint(self, text: str) -> None:
        """Something good to know."""
        if not self.quiet:
            self._stderr().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self._stderr().print(
            f"Warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )

    def error(self, error: LLMToolError) -> None:
        """One sentence and a remedy; under --json also as the document."""
        console = self._stderr()
        console.print(
            f"Error: {error.message}", style="bold red", markup=False, highlight=False, soft_wrap=True
        )
        if error.remedy:
            console.print(error.remedy, markup=False, highlight=False, soft_wrap=True)
        self.document(
            {"error": {"message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}}
        )

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, float | None], None]]:
        """A progress bar on stderr. The callback takes (what is being done, fraction or None if unknown)."""
        console = self._stderr()
        if self.quiet or not console.is_terminal:
            yield self._plain_progress()
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)

            def update(text: str, fraction: float | None) -> None:
                if fraction is None:
                    bar.update(task, description=text, total=None)
                else:
                    bar.update(task, description=text, completed=fraction, total=1.0)

            yield update

    def _plain_progress(self) -> Callable[[str, float | None], None]:
        """Not a terminal: a line when something new begins, and then, of what takes its time, every tenth or every
        ten seconds.
        """
        last, shown_at, shown = "", 0.0, 0.0

        def update(text: str, fraction: float | None) -> None:
            nonlocal last, shown_at, shown
            head, now, done = text.split(":")[0], time.monotonic(), fraction or 0.0
            further = done - shown > PROGRESS_SHARE - 1e-9 or done == 1.0 != shown
            wait = PROGRESS_PAUSE if further else PROGRESS_SECONDS
            if head != last:
                self.hint(text)
            elif now >= shown_at + wait:
                self.hint(text if head != text or fraction is None else f"{text}: {fraction:.0%}")
            else:
                return
            last, shown_at, shown = head, now, done

        return update

    @staticmethod
    def _stdout() -> Console:
        from rich.console import Console

        return Console()

    @staticmethod
    def _stderr() -> Console:
        from rich.console import Console

        return Console(stderr=True)


def size(nbytes: float) -> str:
    """Bytes for a person: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
