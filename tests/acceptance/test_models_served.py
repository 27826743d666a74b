"""`llmtool serve MODEL` for every kind of MODEL, and for what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from llmtool.models.resolve import embedded
from tests.acceptance.servers import openai_client, run_cli, serving

FRANCE = "The capital of France is"
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,  # so that logits differ by more than rounding
}


def test_a_gguf_file(logs: Path) -> None:
    path = embedded("smollm2-135m")
    with serving(logs / "gguf.log", str(path), "--max-model-len", "256") as server:
        assert server.model == str(path) or "SmolLM2" in server.model
        answer = openai_client(server).completions.create(
            model=server.model, prompt=FRANCE, temperature=0, max_tokens=2
        )
        assert answer.choices[0].text.startswith(" Paris")


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_a_hugging_face_directory(logs: Path, model_dir: Path, tmp_path: Path, config_class: Any) -> None:
    """A model of random weights that transformers wrote: greedy tokens are those of its `generate`."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_class(vocab_size=len(tokenizer), **SMALL, **ends), dtype=torch.float32
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(FRANCE, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    flags = ["--dtype", "float32", "--served-model-name", "tiny", "--kv-cache-memory", "64MiB"]
    with serving(logs / f"{config_class.__name__}.log", str(tmp_path), *flags) as server:
        assert server.model == "tiny"
        answer = openai_client(server).completions.create(
            model="tiny", prompt=FRANCE, temperature=0, max_tokens=20, extra_body={"return_token_ids": True}
        )
    assert answer.choices[0].model_dump()["token_ids"] == expected
    assert len(set(expected)) > 5


def test_a_hub_id_that_is_not_in_the_cache() -> None:
    done = run_cli("serve", "nobody-at-all/no-such-model", "--port", "0")
    assert done.returncode == 1 and done.stdout == ""
    assert "Error: The model nobody-at-all/no-such-model is not in the local hub cache" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["smollm3", "./no/such/directory", "/no/such/model.gguf"])
def test_an_unknown_name(name: str) -> None:
    done = run_cli("serve", name, "--port", "0", "--json")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = json.loads(done.stdout)["error"]
    assert name in error["message"] and "smollm2-135m" in error["remedy"] and error["exit_code"] == 1


def test_directories_and_files_that_hold_no_model(tmp_path: Path) -> None:
    no_gguf = tmp_path / "fake.gguf"
    no_gguf.write_bytes(b"nothing of the kind")
    cut = tmp_path / "cut.gguf"
    with embedded("smollm2-135m").open("rb") as whole:
        cut.write_bytes(whole.read(100_000))
    empty = tmp_path / "empty"
    empty.mkdir()
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(
        json.dumps({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8})
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for path in (no_gguf, cut, empty, encoder, broken):
        done = run_cli("serve", str(path), "--port", "0")
        assert done.returncode == 1, f"{path.name}: {done.returncode}\n{done.stderr}"
        assert "Error:" in done.stderr and "Traceback" not in done.stderr, f"{path.name}: {done.stderr}"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--dtype", "int3"], 2),
        (["--block-size", "7"], 2),
        (["--kv-cache-memory", "much"], 2),
        (["--no-such-flag"], 2),
        (["--config", "/no/such.toml"], 2),
        (["--chat-template", "/no/such.jinja"], 2),
        (["--max-model-len", "1000000"], 2),
        (["--kv-cache-memory", "10kB"], 4),
        (["--kv-cache-memory", "900TB"], 4),
    ],
)
def test_flags_that_cannot_be(model_dir: Path, flags: list[str], code: int) -> None:
    done = run_cli("serve", "--port", "0", *flags)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) <= 12, done.stderr
