"""The command line: setup, run, report."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.peers import report
from benchmarks.peers.catalogue import MODES, Contender, catalogue, set_up
from benchmarks.peers.cells import Cell, Store, code_fingerprint
from benchmarks.peers.environments import REPOSITORY, installed
from benchmarks.peers.measure import Plan, run_plan
from benchmarks.peers.models import checkpoint
from benchmarks.peers.workload import SEED, build
from llmtool.errors import LLMToolError, ThresholdMissed, UsageError
from llmtool.models.tokenizer import Tokenizer

OUT = REPOSITORY / "out" / "peers"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    setup = commands.add_parser("setup", help="build the peers' environments and model files")
    setup.add_argument("--pip", default="", help="more flags for pip install")
    run = commands.add_parser("run", help="measure what is missing, then report")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--minutes", type=float, help="start no contender after so many; run again to go on")
    run.add_argument("--fresh", action="store_true", help="measure everything again")
    show = commands.add_parser("report", help="verdicts of what is measured")
    for command in (setup, run):
        command.add_argument("--contenders", help="names, separated by commas; default all")
    run.add_argument("--only", help=f"modes, separated by commas; of {', '.join(MODES)}")
    for command in (run, show):
        command.add_argument("--quick", action="store_true", help="a few short requests: proves that it runs")
        command.add_argument("--check", action="store_true", help="exit code 3 unless every target is met")
    return parser


def chosen(wanted: str | None, known: list[str], what: str) -> list[str]:
    """The names in `wanted`, separated by commas; a name that ends in * stands for all that begin so."""
    if not wanted:
        return known
    found: list[str] = []
    for name in wanted.split(","):
        hits = [k for k in known if k == name or (name.endswith("*") and k.startswith(name[:-1]))]
        if not hits:
            raise UsageError(f"There is no {what} {name!r}.", f"There are {', '.join(known)}.")
        found += hits
    return [k for k in known if k in found]


def run_name(quick: bool) -> str:
    """Equal for runs whose cells may stand beside each other."""
    identity = [SEED, quick, checkpoint().name, len(os.sched_getaffinity(0)), code_fingerprint()]
    return hashlib.blake2b(json.dumps(identity).encode(), digest_size=6).hexdigest()


def ready(everyone: dict[str, Contender], pip_flags: tuple[str, ...] = ()) -> dict[str, str]:
    """Sets all up; the reason, for each whose set-up failed: the others are still worth measuring."""
    failed: dict[str, str] = {}
    for contender in everyone.values():
        try:
            set_up(contender, pip_flags, lambda text: print(text, flush=True))
        except LLMToolError as e:
            failed[contender.name] = str(e)
            print(f"{contender.name} cannot be set up: {e}", file=sys.stderr)
    return failed


def publish(store: Store, everyone: dict[str, Contender], quick: bool) -> dict[str, Any]:
    """Prints the table and writes the results; a quick run's figures mean nothing and are not kept."""
    document = report.document(store, everyone)
    document["contenders"] = {c.name: describe(c) for c in everyone.values()}
    needed = sorted({c.needs for c in everyone.values() if c.needs})
    document["peer_versions"] = {name: installed(name) for name in needed}
    document["model"] = checkpoint().name
    print(report.table(document["targets"]))
    if quick:
        print("A quick run proves that everything runs; its figures mean nothing and are not written.")
    else:
        save("peers", document)
    return document


def describe(contender: Contender) -> dict[str, Any]:
    """How it was started, without where this machine keeps things."""
    variables = {k: ":".join(map(_portable, v.split(":"))) for k, v in contender.variables.items()}
    command = [_portable(word) for word in contender.command(0)]
    return {"engine": contender.engine, "bits": contender.bits, "command": command, "variables": variables}


def _portable(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else path.name


def main() -> None:
    args = arguments().parse_args()
    everyone = catalogue()
    names = chosen(getattr(args, "contenders", None), list(everyone), "contender")
    if args.command == "setup":
        failed = ready({n: everyone[n] for n in names}, tuple(args.pip.split()))
        if failed:
            raise LLMToolError(f"{len(failed)} contenders cannot be set up: {', '.join(failed)}.")
        return
    path = OUT / "cells.jsonl"
    if args.command == "run" and args.fresh and path.is_file():
        path.rename(path.with_suffix(f".{int(time.time())}.jsonl"))
    store = Store(path, run_name(args.quick))
    if args.command == "run":
        unready = ready({n: everyone[n] for n in names})
        for name, reason in unready.items():
            for mode in everyone[name].modes:
                if not store.done(0, name, mode):
                    store.add(Cell(store.run, 0, name, mode, error=reason))
        deadline = time.monotonic() + args.minutes * 60 if args.minutes else None
        plan = Plan(1 if args.quick else args.rounds, chosen(args.only, list(MODES), "mode"), deadline)
        tokenizer = Tokenizer.from_dir(checkpoint())
        loads = build(tokenizer, args.quick)
        run_plan(
            plan, [everyone[n] for n in names if n not in unready], loads, store, tokenizer, OUT / "logs"
        )
    document = publish(store, everyone, args.quick)
    missed = [v["row"] for v in document["targets"] if v["verdict"] != "PASS"]
    if args.check and missed:
        raise ThresholdMissed(f"{len(missed)} of {len(document['targets'])} targets are not met.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whoever is measured is stopped too
    try:
        main()
    except LLMToolError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except subprocess.CalledProcessError as error:
        print(f"Error: {error}: {error.stderr}", file=sys.stderr)
        sys.exit(1)
