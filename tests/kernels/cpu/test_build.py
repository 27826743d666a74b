"""Building the kernels: once, atomically, and with a reason when it cannot be done."""

from __future__ import annotations

import logging
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from llmtool_kernels.cpu import build as building
from llmtool_kernels.cpu import native
from llmtool_kernels.cpu.build import BuildError, build, find_compiler


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources of a library that is built in no time."""
    monkeypatch.setattr(building, "SOURCES", tmp_path / "csrc")
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "one.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return source


def compiles() -> bool:
    try:
        find_compiler()
    except BuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(not compiles(), reason="no C++ compiler is here")


@needs_compiler
def test_built_once_and_again_when_a_source_changes(one_file: Path) -> None:
    first = build()
    stamp = first.stat().st_mtime_ns
    assert build() == first and first.stat().st_mtime_ns == stamp
    assert build("portable") != first
    one_file.write_text('extern "C" int answer() { return 43; }\n')
    assert build() != first


@needs_compiler
def test_several_may_build_at_once(one_file: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        built = {path.resolve() for path in pool.map(lambda _: build(), range(4))}
    assert len(built) == 1
    assert [p.suffix for p in built.pop().parent.iterdir()] == [".so"]  # no scratch directory is left


@needs_compiler
def test_a_failure_says_the_compilers_first_error(one_file: Path) -> None:
    one_file.write_text("int x = ;\n")
    with pytest.raises(BuildError, match=r"failed: .*error: expected"):
        build()


def script(path: Path, body: str) -> str:
    """A program of that shell code; its path."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_compiler_that_cannot_be_started_is_named(
    one_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between asking for its version and running it, here: not the cache is at fault."""
    (tmp_path / "c++").write_bytes(b"no program")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    monkeypatch.setattr(building, "_key", lambda *_: "key")
    with pytest.raises(BuildError, match=r"/c\+\+ cannot be run: Exec format error"):
        build()


def test_a_compiler_may_say_what_is_not_text(
    one_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = (
        'printf "c++ \\351\\n"; case "$*" in *-c*) printf "x.cpp: error: \\351t\\351\\n" >&2; exit 1;; esac'
    )
    monkeypatch.setenv("CXX", script(tmp_path / "c++", says))
    with pytest.raises(BuildError, match=r"failed: x\.cpp: error: .t."):
        build()


@needs_compiler
def test_a_compiler_that_knows_the_processor_by_another_flag(
    one_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clang on Arm: -mcpu=native; and one that knows neither compiles all the same."""
    refuse = 'for a; do case $a in {}) echo "error: unsupported argument to option" >&2; exit 1;; esac; done'
    for refused, flags in (("-march=*", ("-mcpu=native",)), ("-march=*|-mcpu=*", ())):
        body = f'{refuse.format(refused)}\necho "$*" >> {tmp_path}/said\nexec {find_compiler()} "$@"'
        monkeypatch.setenv("CXX", script(tmp_path / "cxx", body))
        assert building.native_flags(find_compiler()) == flags
        assert build().is_file()
        compiled = [line for line in (tmp_path / "said").read_text().splitlines() if " -c " in line]
        assert all(flag in compiled[-1] for flag in flags)
        monkeypatch.delenv("CXX")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("march", ["sapphirerapids", "skylake-avx512", "haswell", "x86-64"])
def test_sources_compile_for_other_processors(march: str, tmp_path: Path) -> None:
    """Without a warning, whatever the processor; on the first with tiles in them."""
    if platform.machine() != "x86_64":
        pytest.skip("the compiler here is for another family of processors")
    target = tmp_path / "linear.o"
    command = [
        find_compiler(),
        *building.FLAGS,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-maybe-uninitialized",
        f"-march={march}",
        "-c",
    ]
    source = building.SOURCES / "linear.cpp"
    done = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True)
    if "bad value" in done.stderr:
        pytest.skip("the compiler is older than these processors")
    assert done.returncode == 0, done.stderr
    assert (b"Writer" in target.read_bytes()) and target.stat().st_size > 10_000


def test_no_compiler_is_said_once_and_torch_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert native.kernels() is None
            assert native.kernels() is None
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "no-such-compiler" in caplog.text and "PyTorch" in caplog.text
    finally:
        native.load.cache_clear()


def test_a_cache_that_cannot_be_written(
    one_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "file"))
    if compiles():
        with pytest.raises(BuildError, match="cannot be written"):
            build()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.ENV, "off")
    assert native.kernels() is None
    monkeypatch.setenv(native.ENV, "fast")
    with pytest.raises(ValueError, match="auto, portable, off"):
        native.kernels()
    assert native.supports(torch.bfloat16, torch.device("cpu"))
    assert not native.supports(torch.float16, torch.device("cpu"))


def test_the_processor_is_part_of_the_key(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A\ncpu MHz\t: 3000\nflags\t: sse avx2\n\nmodel name\t: B\n")
    assert building.processor(cpuinfo) == "model name\t: A\nflags\t: sse avx2"
    assert building.processor(tmp_path / "absent") == ""


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LLMTOOL_CACHE")
    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.setattr(building, "find_compiler", lambda: "c++")
    monkeypatch.setattr(building, "_key", lambda *_: "key")
    native.load.cache_clear()
    try:
        assert native.kernels() is None
    finally:
        native.load.cache_clear()
    assert "LLMTOOL_CACHE" in caplog.text
