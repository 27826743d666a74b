"""The peer comparison's own parts: cells that survive a cut, verdicts, processes, the drivers' protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers import report, target
from benchmarks.peers.__main__ import chosen
from benchmarks.peers.catalogue import DRIVERS, MODES, Contender, catalogue
from benchmarks.peers.cells import Cell, Store
from benchmarks.peers.measure import Plan, figures, run_plan
from benchmarks.peers.process import Contention, Process, cpu_seconds, rss, tree
from benchmarks.peers.report import Target, judge
from benchmarks.peers.target import ContenderFailed, Outcome
from benchmarks.peers.workload import ONLINE, RATES, build, online
from llmtool.errors import UsageError
from llmtool.workload.metrics import RequestRecord

# A peer made of the real protocol and no model: token i of an answer is i, one every 5 ms.
FAKE = """
import sys, time
sys.path.insert(0, {drivers!r})
from protocol import protocol_stream, record, serve
stream = protocol_stream()
print("a library prints to stdout")
def run(requests):
    if any(len(r["prompt"]) > 900 for r in requests):
        raise ValueError("too long")
    records = []
    for r in requests:
        n = r["max_tokens"] - {short}
        start = r["at"]
        records.append(record(start, [start + 0.1 + 0.005 * i for i in range(n)], list(range(n))))
    return records
serve(stream, run)
"""


class Tokens:
    """A byte tokenizer."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i % 128 for i in ids).decode()


def fake(name: str = "openvino-fp16", short: int = 0, modes: tuple[str, ...] = MODES) -> Contender:
    code = FAKE.format(drivers=str(DRIVERS), short=short)
    return Contender(name, "fake", 16, lambda port: [sys.executable, "-c", code], modes, driver=True)


def test_drafts_are_compared_with_drafts_only() -> None:
    everyone = catalogue()
    rows = {t.row: t for t in report.targets(everyone)}
    drafting = {name for name, c in everyone.items() if "copy" in c.modes and "single" not in c.modes}
    assert drafting == {"llmtool-auto", "vllm-lookup", "openvino-lookup"}
    for row in rows.values():
        for name in (row.ours, *row.peers):
            assert row.mode in (*everyone[name].modes, "memory"), f"{name} is not measured on {row.mode}"
    copying = rows["copying, single stream, drafts: TPOT"]
    assert {copying.ours, *copying.peers} == drafting
    settings = everyone["vllm-lookup"].command(1)[-1]
    assert json.loads(settings)["method"] == "ngram" and "--speculative-config" not in everyone[
        "vllm-bf16"
    ].command(1)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cells.jsonl", "run")


def fill(store: Store, contender: str, mode: str, metric: str, values: list[float]) -> None:
    for turn, value in enumerate(values):
        store.add(Cell(store.run, turn, contender, mode, {metric: value}))


def test_the_workload_has_the_sizes_it_promises() -> None:
    loads = build(Tokens())
    shapes = {
        name: [(len(r.token_ids or ()), r.max_tokens) for r in load.requests] for name, load in loads.items()
    }
    assert shapes["single"] == [(512, 128)] * 4 and loads["single"].concurrency == 1
    assert len(shapes["batch"]) == 64
    assert all(32 <= n <= 512 and 16 <= out <= 256 for n, out in shapes["batch"])
    prefixes = {r.token_ids[:1024] for r in loads["prefix"].requests if r.token_ids}
    assert len(shapes["prefix"]) == 32 and len(prefixes) == 1
    assert all(1040 <= n <= 1088 and out == 32 for n, out in shapes["prefix"])
    for name, count, concurrency in (("copy", 8, 1), ("copy-16", 32, 16)):
        assert shapes[name] == [(512, 128)] * count and loads[name].concurrency == concurrency
        for prompt in [r.token_ids or () for r in loads[name].requests]:
            assert prompt[320:] == prompt[:192], "it goes on with what it has begun to repeat"
    for rate in RATES:
        load = loads[online(rate)]
        assert len(load.requests) == ONLINE[rate] and load.offsets[0] == 0.0
        assert list(load.offsets) == sorted(load.offsets)
        assert load.offsets[-1] == pytest.approx(ONLINE[rate] / rate, rel=0.35)
    prompts = [r.token_ids for name in loads for r in loads[name].requests]
    assert len(set(prompts)) == len(prompts)
    assert build(Tokens()) == loads
    assert set(MODES) - {"start"} == set(loads) - {"warm"}


def test_a_store_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    first = Store(path, "a")
    first.add(Cell("a", 0, "x", "single", {"ms": 1.0}))
    first.add(Cell("a", 0, "x", "batch", error="it ended"))
    first.add(Cell("a", 1, "x", "single", {"ms": 3.0}))
    with path.open("a") as file:
        file.write('{"run": "a", "round": 2, "conten')
    again = Store(path, "a")
    assert (
        again.done(0, "x", "single") and not again.done(0, "x", "batch") and not again.done(2, "x", "single")
    )
    assert again.values("x", "single", "ms") == {0: 1.0, 1: 3.0}
    assert Store(path, "b").cells() == []


def test_a_store_takes_what_follows_a_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"run": "a", "round": 2, "conten')
    Store(path, "a").add(Cell("a", 0, "x", "single", {"ms": 1.0}))
    assert Store(path, "a").done(0, "x", "single")


LOWER = Target("row", "us", "single", "x_ms", 0.75, ("p", "q"))


def test_a_verdict_takes_the_best_peer_and_medians(store: Store) -> None:
    fill(store, "us", "single", "x_ms", [10.0, 12.0, 90.0])
    fill(store, "p", "single", "x_ms", [16.0, 20.0, 24.0])
    fill(store, "q", "single", "x_ms", [30.0])
    v = judge(LOWER, store)
    assert (v.verdict, v.best_peer, v.ours, v.best, v.ratio) == ("PASS", "p", 12.0, 20.0, 0.6)
    assert v.spread == (round(12 / 20, 3), round(90 / 24, 3)) and v.reasons == ()
    assert judge(replace(LOWER, limit=0.5), store).verdict == "MISS"


def test_a_higher_figure_can_be_the_better_one(store: Store) -> None:
    higher = Target("row", "us", "batch", "output_tok_s", 1.25, ("p", "q"), at_least=True)
    fill(store, "us", "batch", "output_tok_s", [500.0])
    fill(store, "p", "batch", "output_tok_s", [100.0])
    fill(store, "q", "batch", "output_tok_s", [399.0])
    v = judge(higher, store)
    assert (v.verdict, v.best_peer) == ("PASS", "q")
    assert judge(replace(higher, limit=1.26), store).verdict == "MISS"


def test_what_is_not_measured_is_missing_and_says_why(store: Store) -> None:
    fill(store, "p", "single", "x_ms", [16.0])
    store.add(Cell("run", 0, "us", "single", error="No such option: --quantization"))
    v = judge(LOWER, store)
    assert v.verdict == "MISSING" and v.ratio is None
    assert v.reasons == ("us: No such option: --quantization", "q: not measured")
    fill(store, "us", "single", "x_ms", [1.0])
    v = judge(LOWER, store)
    assert v.verdict == "INCOMPLETE" and v.ratio == 0.062 and v.reasons == ("q: not measured",)
    fill(store, "us", "single", "x_ms", [100.0])
    assert judge(LOWER, store).verdict == "MISS"  # whatever q gives


def test_a_limit_can_stand_alone(store: Store) -> None:
    alone = Target("row", "us", "start", "seconds", 3.0)
    assert judge(alone, store).verdict == "MISSING"
    fill(store, "us", "start", "seconds", [9.0, 2.5, 2.9])
    assert judge(alone, store).verdict == "PASS"
    assert judge(replace(alone, limit=2.8), store).verdict == "MISS"


def test_the_table_shows_every_target(store: Store) -> None:
    everyone = {"vllm-bf16": fake("vllm-bf16")}
    document = report.document(store, everyone)
    assert json.loads(json.dumps(document)) == document or document["targets"]
    text = report.table(document["targets"])
    assert text.count("MISSING") == len(report.targets(everyone)) == 20
    assert "llmtool-int8: not measured" in text


def test_another_model_shows_in_the_text(store: Store) -> None:
    texts = {"llmtool-bf16": ["one two", "three"], "same": ["one", "xhree"], "other": ["two", "four"]}
    for name, said in texts.items():
        store.add(Cell("run", 0, name, "single", {"texts": said}))
    assert report.agreement(store, {n: fake(n) for n in ("same", "other", "absent")}) == {
        "same": round(3 / 7, 3),
        "other": 0.0,
    }


def test_figures_follow_the_projects_definitions() -> None:
    records = [
        RequestRecord(i, 0.0, ttft, e2e=ttft + 0.9, output_tokens=10, max_tokens=10, success=True, text="t")
        for i, ttft in enumerate((0.1, 0.2, 0.6))
    ]
    found = figures("single", Outcome(records, 3.0))
    assert found["ttft_median_ms"] == 200.0 and found["tpot_mean_ms"] == 100.0
    assert found["output_tok_s"] == 10.0 and found["texts"] == ["t"] * 3
    assert found["e2el_p99_ms"] == pytest.approx(1492.0)


def test_a_process_is_watched_and_ended_with_all_it_started(tmp_path: Path) -> None:
    # A child in a session of its own that ignores SIGTERM, as a worker of a server might.
    child = "import signal,os,time; signal.signal(15, signal.SIG_IGN); os.setsid(); "
    child += "b=bytearray(64<<20); time.sleep(60)"
    code = f"import subprocess,sys,time; subprocess.Popen([sys.executable,'-c',{child!r}]); time.sleep(60)"
    with Process([sys.executable, "-c", code], os.environ, tmp_path / "log") as process:
        until = time.monotonic() + 30
        while (process.peak_rss < 64 << 20 or len(tree(process.pid)) < 2) and time.monotonic() < until:
            time.sleep(0.05)
        pids = tree(process.pid)
        assert len(pids) == 2 and process.peak_rss >= 64 << 20 and rss(pids) > rss([process.pid])
        assert cpu_seconds(pids) > 0
    until = time.monotonic() + 10
    while (
        any(Path(f"/proc/{p}").exists() and "Z" not in _state(p) for p in pids) and time.monotonic() < until
    ):
        time.sleep(0.05)
    assert all(not Path(f"/proc/{p}").exists() or "Z" in _state(p) for p in pids)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_work_of_others_is_seen_as_foreign(tmp_path: Path) -> None:
    burn = "import time\nt=time.process_time()\nwhile time.process_time()-t<0.5: pass"
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with Process(sleep, os.environ, tmp_path / "log") as idle, Contention(idle.pid) as taken:
        started = time.perf_counter()
        # Through a shell that ends at once: an orphan, so neither the contender's nor this process's child.
        orphan = f"{sys.executable} -c '{burn}' >/dev/null & echo $!"
        shell = subprocess.run(["sh", "-c", orphan], capture_output=True, text=True)
        while _state(int(shell.stdout)) != "Z":
            time.sleep(0.01)
        wall = time.perf_counter() - started
    assert taken.foreign * wall * len(os.sched_getaffinity(0)) >= 0.4  # CPU seconds


def test_rounds_are_interleaved_and_go_on_where_they_were_cut(tmp_path: Path, store: Store) -> None:
    both = [fake("a", modes=("start", "prefix", "single")), fake("b", modes=("start", "batch"))]
    loads = build(Tokens(), quick=True)
    plan = Plan(2, ("start", "single", "batch", "prefix"))
    store.add(Cell("run", 0, "a", "single", {"tpot_median_ms": 7.0}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.peers.measure.machine_probe", lambda: {"read_gb_s": 1.0})
        run_plan(plan, both, loads, store, Tokens(), tmp_path / "logs")
    assert store.values("a", "single", "tpot_median_ms") == {0: 7.0, 1: 5.0}
    assert store.values("b", "batch", "ttft_median_ms") == pytest.approx({0: 100.0, 1: 100.0})
    # A prompt that the peer refuses is its cell's error and costs no other cell.
    assert ["too long" in c.error for c in store.cells("a", "prefix")] == [True, True]
    order = [(c.round, c.contender) for c in Store(store.path, "run").cells() if c.mode == "start"]
    assert order == sorted(order, key=lambda x: x[0]) and len(order) == 4
    assert {c.contender: c.metrics["after"] for c in store.cells(mode="memory")} == {
        "a": ["single"],
        "b": ["batch"],
    }
    assert all(c.probe == {"read_gb_s": 1.0} for c in store.cells("b"))


def test_an_answer_of_the_wrong_length_is_an_error(tmp_path: Path) -> None:
    loads = build(Tokens(), quick=True)
    with target.Target(fake(short=1), Tokens(), tmp_path / "log") as t:  # type: ignore[arg-type]
        t.first_token(replace(loads["single"].requests[0], max_tokens=2))
        with pytest.raises(ContenderFailed, match="brought 7"):
            t.run(loads["single"])


def test_a_contender_that_does_not_start_says_why(tmp_path: Path, store: Store) -> None:
    dead = replace(
        fake("a", modes=("start", "single")),
        command=lambda port: [sys.executable, "-c", "import sys; sys.exit('no such option --quantization')"],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.peers.measure.machine_probe", dict)
        run_plan(Plan(1, MODES), [dead], build(Tokens(), True), store, Tokens(), tmp_path / "logs")
    errors = {c.mode: c.error for c in store.cells("a")}
    assert set(errors) == {"start", "single"}
    assert all("no such option --quantization" in e for e in errors.values())


def test_a_command_that_is_not_there_is_an_error_of_its_contender(tmp_path: Path) -> None:
    absent = replace(fake(), command=lambda port: [str(tmp_path / "nowhere")])
    with pytest.raises(ContenderFailed, match="cannot be started"):
        target.Target(absent, Tokens(), tmp_path / "log")  # type: ignore[arg-type]


def test_names_may_end_in_a_star() -> None:
    known = ["llmtool-bf16", "llmtool-int8", "vllm-bf16"]
    assert chosen("vllm-bf16,llmtool*", known, "contender") == known
    assert chosen(None, known, "contender") == known
    with pytest.raises(UsageError, match="no contender 'x'"):
        chosen("x", known, "contender")
