"""`llmtool bench --aot` from outside, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtool.bench.aot import Row
from llmtool.cli.bench_aot import page, parse_batches
from llmtool.errors import UsageError


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("LLMTOOL_")}
    return subprocess.run(
        [sys.executable, "-m", "llmtool", "bench", *args],
        capture_output=True,
        text=True,
        env=clean | {"NO_COLOR": "1", "COLUMNS": "200"},
    )


def test_a_net(tmp_path: Path) -> None:
    file, html = tmp_path / "a.json", tmp_path / "a.html"
    flags = ("--aot-batch", "1,2", "--aot-seconds", "0.1", "--no-aot-peers", "--num-threads", "1")
    done = bench("--aot", "mlp", *flags, "-o", str(file), "--html", str(html), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document == json.loads(file.read_text())
    assert [row["batch"] for row in document["rows"]] == [1, 2]
    for row in document["rows"]:
        assert set(row["seconds"]) == {"eager", "aot"}
        assert row["times_faster_than"]["eager"] == row["seconds"]["eager"] / row["seconds"]["aot"]
        made = row["plan"]["assignments"]
        assert made["graph"] == {"tasks": 18, "edges": 17, "concurrency": 1}  # a chain
        assert made["ours"]["streams"] == made["serial"]["streams"] == 1
        assert made["ours"]["arena_bytes"] < made["ours"]["no_reuse_bytes"]
    assert "<svg" in html.read_text()


def test_a_model(tmp_path: Path) -> None:
    """A directory in transformers' format: its body at 128 tokens; and one that holds none."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=64, max_position_embeddings=128)  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    flags = ("--aot-seconds", "0.1", "--no-aot-peers", "--num-threads", "1", "--json")
    done = bench("--aot", str(tmp_path / "bert"), *flags)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert set(row["seconds"]) == {"eager", "aot"} and not row["failed"]
    assert row["plan"]["assignments"]["ours"]["synchronisations"] > 0  # queries, keys and values side by side
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "config.json").write_text('{"model_type": "bert"}')
    done = bench("--aot", str(tmp_path / "none"), *flags)
    assert (
        done.returncode == 1 and "transformers cannot load" in done.stderr and "Traceback" not in done.stderr
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--aot", "no-such-net"), "one of bert"),
        (("--aot", "mlp", "--aot-batch", "0"), "batch sizes"),
        (("--aot", "mlp", "--aot-seconds", "-1"), "above 0"),
        (("--aot", "mlp", "--request-rate", "3"), "--request-rate has no meaning"),
        (("--aot", "mlp", "./model"), "model has no meaning"),
        (("--aot-batch", "2"), "goes with --aot"),
    ],
)
def test_what_is_refused(args: tuple[str, ...], said: str) -> None:
    done = bench(*args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr


def test_batches() -> None:
    assert parse_batches("1,8,32") == (1, 8, 32)
    for text in ("", "x", "1,,2", "1,-2"):
        with pytest.raises(UsageError):
            parse_batches(text)


def test_a_run_that_has_no_figure_leaves_its_cell_empty() -> None:
    rows = [Row(1, {"eager": 0.002, "aot": 0.001}), Row(4, {"eager": 0.004})]
    shown = page("net <a>", rows)
    assert "net &lt;a&gt;" in shown
    assert "<td>4</td><td>4.000</td><td></td>" in shown
    assert rows[0].ratio("eager") == 2.0
    assert rows[1].ratio("eager") is None
