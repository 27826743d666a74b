"""The `llmtool` command, and `python -m llmtool`."""

import sys


def main() -> None:
    """Entry point. Imports come inside, so that an interrupt during them ends the command like any other."""
    try:
        from llmtool.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
