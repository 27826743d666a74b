"""The command line from outside: exit codes, one JSON document, settings from file, environment and flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtool.cli.command import parse_size
from llmtool.errors import UsageError


def llmtool(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMTOOL_")}
    return subprocess.run(
        [sys.executable, "-m", "llmtool", *args],
        capture_output=True,
        text=True,
        env=environment | {"NO_COLOR": "1", "COLUMNS": "200"} | (env or {}),
    )


def test_every_command_has_examples_and_json() -> None:
    for name in ("serve", "bench", "plan", "prune"):
        shown = llmtool(name, "--help").stdout
        assert "Examples" in shown and f"llmtool {name}" in shown and "--json" in shown


def test_settings_file_environment_flags(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('port = 1111\nmax-num-seqs = 7\ndtype = "float32"\n')
    env = {"LLMTOOL_MAX_NUM_SEQS": "9", "LLMTOOL_BLOCK_SIZE": "32", "LLMTOOL_CPU_KERNELS": "portable"}
    done = llmtool("serve", "--config", str(file), "--block-size", "8", "--print-config", "--json", env=env)
    got = json.loads(done.stdout)
    assert done.returncode == 0
    assert (got["port"], got["max_num_seqs"], got["dtype"], got["block_size"]) == (1111, 9, "float32", 8)


@pytest.mark.parametrize(
    "args,env,said",
    [
        (["serve", "--config", "/nowhere.toml"], {}, "does not exist"),
        (["serve", "--print-config"], {"LLMTOOL_PROT": "1"}, "Unknown setting 'prot'"),
        (["serve", "--print-config"], {"LLMTOOL_PORT": "many"}, "'port' cannot be 'many'"),
        (["serve", "--block-size", "12"], {}, "power of two"),
        (["serve", "--kv-cache-memory", "lots"], {}, "is not a size"),
        (["serve", "--dtype", "int3"], {}, "float32"),
        (["serve", "--chat-template", "/nowhere.jinja"], {}, "Cannot read the chat template /nowhere.jinja"),
        (["serve", "--port", "70000"], {}, "65535"),
        (["serve", "--max-num-seqs", "600"], {}, "max_num_batched_tokens"),
        (["bench", "--dataset-name", "nothing"], {}, "Unknown dataset"),
        (["bench", "--request-rate", "fast"], {}, "no request rate"),
        (["bench", "--extra-body", "[1]"], {}, "JSON object"),
        (["bench", "--compare", "/a.json", "/b.json"], {}, "Cannot read"),
        (["bench", "--compare", "/a.json"], {}, "two result files"),
        (["bench", "model", "another"], {}, "Unexpected argument"),
    ],
)
def test_usage_errors_are_one_sentence(args: list[str], env: dict[str, str], said: str) -> None:
    done = llmtool(*args, env=env)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_is_a_document_too() -> None:
    done = llmtool("serve", "--dtype", "int3", "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == 2


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = llmtool("bench", str(tmp_path / "nothing"), "-q", env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and "Error:" in done.stderr and "Traceback" not in done.stderr


def test_a_server_that_is_not_there() -> None:
    done = llmtool("bench", "--url", "http://127.0.0.1:9", "-q")
    assert done.returncode == 1 and "127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text,nbytes",
    [
        ("1000", 1000),
        ("2GiB", 2 * 2**30),
        ("2G", 2 * 10**9),
        ("1.5kb", 1500),
        ("512MiB", 512 * 2**20),
        ("7 mib", 7 * 2**20),
    ],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_a_bad_size() -> None:
    with pytest.raises(UsageError):
        parse_size("-1GiB")


def test_the_key_is_not_shown_and_its_mask_is_no_key(tmp_path: Path) -> None:
    done = llmtool("serve", "--api-key", "sk-secret", "--print-config", "--json")
    assert done.returncode == 0 and "sk-secret" not in done.stdout + done.stderr
    assert json.loads(done.stdout)["api_key"] == "***"
    assert "sk-secret" not in llmtool("serve", "--print-config", env={"LLMTOOL_API_KEY": "sk-secret"}).stdout
    assert json.loads(llmtool("serve", "--print-config", "--json").stdout)["api_key"] is None
    file = tmp_path / "shown.json"
    file.write_text(done.stdout)
    again = llmtool("serve", "--config", str(file))
    assert again.returncode == 2 and "LLMTOOL_API_KEY" in again.stderr and again.stdout == ""


def test_an_interrupt_while_importing_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "llmtool", "--help"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
