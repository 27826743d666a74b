"""Compiles the C++ kernels at first use, with the system's compiler, into a cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-std=gnu++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",
)
# portable: no instructions of one processor family beyond what the compiler itself picks. emulated: AMX by plain
# code, to test what surrounds it.
VARIANTS = {"native": (), "portable": ("-DLLMTOOL_PORTABLE",), "emulated": ("-DLLMTOOL_AMX_EMULATED",)}
COMPILERS = ("c++", "g++", "clang++")
# For this machine's processor, the first that the compiler knows: clang on Arm and compilers for POWER want the
# second.
NATIVE = ("-march=native", "-mcpu=native")


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why, in one sentence."""


def cache_dir() -> Path:
    """LLMTOOL_CACHE or ~/.cache/llmtool, in it kernels/. Raises BuildError for a user without a home."""
    try:
        return Path(os.environ.get("LLMTOOL_CACHE") or "~/.cache/llmtool").expanduser() / "kernels"
    except RuntimeError:
        raise BuildError("there is no home directory, and LLMTOOL_CACHE is not set") from None


def build(variant: str = "native") -> Path:
    """The shared library of csrc/, compiled if the cache lacks it.

    variant: one of VARIANTS. The cache key covers sources, flags, compiler and processor. The library appears by an
    atomic rename: several processes may build at once, and each finds a whole file. Raises BuildError.
    """
    compiler = find_compiler()
    flags = (*FLAGS, *native_flags(compiler), *VARIANTS[variant])
    target = cache_dir() / f"cpu-{_key(compiler, flags)}.so"
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cpu-", dir=target.parent) as scratch:
            _compile(compiler, flags, Path(scratch)).rename(target)
    except OSError as error:
        raise BuildError(f"{target.parent} cannot be written: {error.strerror or error}") from error
    return target


def find_compiler() -> str:
    """Path of a C++ compiler: CXX if set, else the system's. Raises BuildError when there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"no C++ compiler was found ({', '.join(names)})")


def native_flags(compiler: str) -> tuple[str, ...]:
    """The flag that asks for all of this processor's instructions; none where the compiler has none."""
    for flag in NATIVE:
        try:
            _run([compiler, flag, "-x", "c++", "-E", os.devnull])
        except BuildError:
            continue
        return (flag,)
    return ()


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    key = hashlib.blake2b(digest_size=12)
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            key.update(f"\0{path.name}\0".encode() + path.read_bytes())
    version = _run([compiler, "--version"])
    key.update("\0".join((compiler, version, *flags, platform.machine(), processor())).encode())
    return key.hexdigest()


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What -march=native depends on: the processor's model and features, as the system tells them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return ""
    wanted = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.split(":")[0].strip() in wanted)


def _compile(compiler: str, flags: tuple[str, ...], scratch: Path) -> Path:
    """All sources at once, each in a process of its own, then linked."""
    library = scratch / "cpu.so"
    commands = [
        [compiler, *flags, "-c", str(source), "-o", str(scratch / f"{source.stem}.o")]
        for source in sorted(SOURCES.glob("*.cpp"))
    ]
    with ThreadPoolExecutor(len(commands)) as pool:
        list(pool.map(_run, commands))
    _run([compiler, "-shared", "-pthread", *map(str, sorted(scratch.glob("*.o"))), "-o", str(library)])
    return library


def _run(command: list[str]) -> str:
    """What the command prints, which need not be UTF-8: compilers quote paths and sources as they are."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror or error}") from None
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(output: str) -> str:
    lines = output.strip().splitlines() or ["it gave no reason"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])
