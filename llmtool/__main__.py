"""`python -m llmtool`."""

from llmtool.cli.app import main

if __name__ == "__main__":
    main()
