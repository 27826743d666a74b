"""`llmtool memprofile` from outside: the document, the tables, the picture, errors and exit codes."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmtool.cli.app import app

runner = CliRunner()
BASE = ["memprofile", "gemma-3-4b", "--memory", "24GiB", "--num-prompts", "60", "--max-model-len", "8192"]


def test_json_is_one_document_that_sums_to_the_card() -> None:
    result = runner.invoke(app, [*BASE, "--json", "--explain", "3000"])
    assert result.exit_code == 0, result.output
    d = json.loads(result.stdout)
    assert sum(row["bytes"] for row in d["ledger"]) == d["card_bytes"] == 24 * 2**30
    assert d["explain"]["tokens"] == 3000 and d["simulated"]


def test_tables_and_timeline_for_a_person() -> None:
    result = runner.invoke(
        app, [*BASE, "--workload", "docqa", "--max-model-len", "20000", "--explain", "500"]
    )
    assert result.exit_code == 0, result.output
    for said in (
        "24.00 GiB",
        "simulated",
        "Nothing binds",
        "near",
        "contiguous",
        "One decoding request",
        "100%",
    ):
        assert said in result.stdout, said


def test_devices_by_name_and_the_same_catalogue_as_plan() -> None:
    result = runner.invoke(
        app, ["memprofile", "jamba-1.5-mini", "--device", "h200", "--json", "--compare", "near"]
    )
    assert result.exit_code == 0, result.output
    assert [row["allocator"] for row in json.loads(result.stdout)["allocators"]] == ["near"]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_html_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    page = tmp_path / "m.html"
    result = runner.invoke(
        app, [*BASE, "--workload", "agent", "--max-model-len", "32768", "--html", str(page)]
    )
    assert result.exit_code == 0, result.output
    tags = Tags()
    tags.feed(page.read_text())
    names = [tag for tag, _ in tags.seen]
    assert names.count("svg") == 2 and "table" in names and names.count("rect") > 60
    assert not {"script", "link", "img"} & set(names) and "http" not in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["gemma-3-27b", "--memory", "24GiB"], 4, "does not fit"),
        (["gemma-3-4b"], 2, "--device or --memory"),
        (["gemma-3-4b", "--memory", "24GiB", "--device", "h200"], 2, "either"),
        (["--memory", "24GiB"], 2, "Which model"),
        (["no-such", "--memory", "24GiB"], 1, "neither in the catalogue"),
        (["gemma-3-4b", "--memory", "24GiB", "--compare", "near,best"], 2, "'best'"),
        (["gemma-3-4b", "--memory", "24GiB", "--workload", "games"], 2, "unknown"),
        (["gemma-3-4b", "--device", "abacus"], 2, "unknown"),
        (["gemma-3-4b", "--memory", "24GiB", "--trace", "/no/such.csv"], 2, "Cannot read"),
        (["gemma-3-4b", "--memory", "24GiB", "--explain", "0"], 2, "--explain 0"),
        (["--live", "ftp://x"], 2, "no address"),
        (["--live", "http://127.0.0.1:9"], 1, "cannot be read"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], code: int, says: str) -> None:
    result = runner.invoke(app, ["memprofile", *arguments])
    assert result.exit_code == code, result.output
    assert says in result.output and "Traceback" not in result.output


def test_a_trace_with_holes_and_a_layer_type_nobody_knows(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 10, "output_length": 3}\n{"timestamp": 1}\n')
    result = runner.invoke(app, [*BASE, "--trace", str(trace)])
    assert result.exit_code == 2 and "line 2" in result.output
    config = {
        "architectures": ["Lfm2ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 512,
        "layer_types": ["conv", "rwkv"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = runner.invoke(app, ["memprofile", str(tmp_path), "--memory", "24GiB"])
    assert result.exit_code == 1 and "layer 1 has the type 'rwkv'" in result.output
