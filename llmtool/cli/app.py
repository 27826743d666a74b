"""The Typer app. Nothing heavy is imported here: `llmtool --help` must answer at once."""

from __future__ import annotations

from typing import Annotated

import typer

from llmtool.cli.bench import bench
from llmtool.cli.memprofile import memprofile
from llmtool.cli.plan import plan
from llmtool.cli.prune import prune
from llmtool.cli.serve import serve
from llmtool.version import __version__

app = typer.Typer(
    name="llmtool",
    help="Make language models cheap to serve, and prove it.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmtool {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(serve)
app.command()(bench)
app.command()(plan)
app.command()(prune)
app.command()(memprofile)


def main() -> None:
    """Run the command line of this process."""
    app()
