"""Runs with several kinds of speculation beside each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmtool.bench.html import html_report
from llmtool.bench.result import BenchResult, read_result
from llmtool.cli.bench_run import _show_sweep, _side_by_side
from llmtool.cli.output import Output
from tests.bench.made import made_records, made_result, made_run

AUTO = {
    "spec_decode_num_drafts": 50,
    "spec_decode_draft_tokens": 150,
    "spec_decode_accepted_tokens": 90,
    "spec_decode_acceptance_rate": 60.0,
    "spec_decode_acceptance_length": 2.8,
    "speculation": {"why": "pays", "goodput": 100.0, "seconds_per_token": 0.002, "watchdog_trips": 1},
}


def both() -> BenchResult:
    runs = {spec: [made_run(made_records(i), 1.0 + i) for i in range(2)] for spec in ("auto", "off")}
    runs["auto"] = [replace(run, server=AUTO) for run in runs["auto"]]
    return _side_by_side({spec: made_result(*pair) for spec, pair in runs.items()})


def test_a_table_by_rate_and_kind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    result = both()
    assert [(run.request_rate, run.server["spec"]) for run in result.runs] == [
        (1.0, "auto"),
        (1.0, "off"),
        (2.0, "auto"),
        (2.0, "off"),
    ]
    _show_sweep(result, Output())
    text = capsys.readouterr().out
    assert "60 %" in text and "3.0" in text, "acceptance and draft tokens per draft"
    assert "pays: a draft token pays above 20 % acceptance, watchdog 1x" in text


def test_a_line_for_each_kind_also_read_back_from_a_file(tmp_path: Path) -> None:
    both().write(tmp_path / "a.json")
    again = read_result(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["runs"][0]["spec"] == "auto"
    html = html_report(again)
    assert "End-to-end latency, mean, against request rate, by speculation" in html
    assert "1 /s, auto" in html and "2 /s, off" in html
    _show_sweep(again, Output(quiet=True))
