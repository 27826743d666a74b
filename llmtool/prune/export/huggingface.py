"""A pruned model as a Hugging Face directory.

Sizes that differ between layers go into `per_layer_config`, beside a modelling file that `trust_remote_code` runs.
With the same sizes in every layer a decoder is a plain model of its family.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtool.prune import modeling
from llmtool.prune.model import Loaded
from llmtool.prune.modeling import layers_of

MODULE = "modeling_pruned"
_STUB = """

from transformers import {config}, {classes}  # noqa: E402


class Pruned{config}(PrunedConfig, {config}):
    pass

"""
_CLASS = """
class Pruned{name}(Pruned, {name}):
    config_class = Pruned{config}

"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write(
    loaded: Loaded,
    small: Any,
    sizes: list[tuple[int, int, int]],
    directory: Path,
    dtype: torch.dtype,
    layers: Sequence[int] | None = None,
) -> bool:
    """Weights in `dtype`, config.json, tokenizer and, where layers differ, the modelling file. Returns whether it
    loads without custom code. layers: those of the original that are left, where whole ones went."""
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(loaded, small)
    if layers is not None:
        config[_layers_field(config)] = len(layers)
        if config.get("layer_types"):
            config["layer_types"] = [config["layer_types"][i] for i in layers]
    plain = _is_plain(loaded, sizes)
    if plain:
        config.update(_uniform(loaded, sizes[0]))
    elif any(s != _dense(loaded) for s in sizes):
        config.update(_heterogeneous(loaded, small, sizes))
        (directory / f"{MODULE}.py").write_text(_modelling(loaded, small), encoding="utf-8")
    small.to(dtype).save_pretrained(directory, safe_serialization=True)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(directory)
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        if (loaded.source / name).is_file() and not (directory / name).exists():
            shutil.copy(loaded.source / name, directory / name)
    return "auto_map" not in config


def source_dtype(loaded: Loaded) -> torch.dtype:
    """What the original was published in."""
    config = json.loads((loaded.source / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    return DTYPES.get(name, torch.float32)


def _config(loaded: Loaded, small: Any) -> dict[str, Any]:
    """The original's config.json; biases that a decoder has now, it has everywhere."""
    config: dict[str, Any] = json.loads((loaded.source / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = [type(loaded.model).__name__]
    if loaded.family == "llama" and not config.get("attention_bias") and _has_biases(small):
        _complete_biases(loaded, small)
        config |= {"attention_bias": True, "mlp_bias": True}
    return config


def _has_biases(small: Any) -> bool:
    return any(name.endswith("o_proj.bias") for name, _ in small.named_parameters())


def _complete_biases(loaded: Loaded, small: Any) -> None:
    for layer in layers_of(small, loaded.layout):
        for module in layer.modules():
            if isinstance(module, nn.Linear) and module.bias is None:
                zeros = torch.zeros(
                    module.out_features, dtype=module.weight.dtype, device=module.weight.device
                )
                module.bias = nn.Parameter(zeros, requires_grad=False)


def _dense(loaded: Loaded) -> tuple[int, int, int]:
    attention, mlp = loaded.sublayers[0], loaded.sublayers[1]
    return attention.num_units, attention.num_groups, mlp.num_units


def _is_plain(loaded: Loaded, sizes: list[tuple[int, int, int]]) -> bool:
    """Whether the family's own class can build it: the same sizes everywhere, and heads whose size is its own
    field."""
    same = len(set(sizes)) == 1 and all(sizes[0])
    heads = sizes[0][0]
    return same and (
        (loaded.causal and loaded.model.config.hidden_size % heads == 0) or heads == _dense(loaded)[0]
    )


def _uniform(loaded: Loaded, sizes: tuple[int, int, int]) -> dict[str, Any]:
    heads, kv_heads, width = sizes
    layout = loaded.layout
    config = {layout.heads: heads, layout.width: width}
    if layout.kv_heads:
        config |= {layout.kv_heads: kv_heads, "head_dim": loaded.sublayers[0].unit_dim}
    return config


def _heterogeneous(loaded: Loaded, small: Any, sizes: list[tuple[int, int, int]]) -> dict[str, Any]:
    layout, dense = loaded.layout, _dense(loaded)
    names = (layout.heads, layout.kv_heads, layout.width)
    entries = {
        str(i): {n: v for n, v, d in zip(names, own, dense, strict=True) if n and v != d}
        for i, own in enumerate(sizes)
    }
    config: dict[str, Any] = {"per_layer_config": {i: entry for i, entry in entries.items() if entry}}
    if layout.kv_heads:
        config["head_dim"] = loaded.sublayers[0].unit_dim
    name = type(loaded.model).__name__
    base = type(modeling.base_of(loaded.model)).__name__
    auto = {
        "AutoConfig": f"{MODULE}.Pruned{type(loaded.model.config).__name__}",
        "AutoModel": f"{MODULE}.Pruned{base}",
    }
    return config | {"auto_map": auto | {loaded.auto: f"{MODULE}.Pruned{name}"}}


def _modelling(loaded: Loaded, small: Any) -> str:
    """modeling.py as it is, and a class for this model and for its body."""
    config = type(loaded.model.config).__name__
    names = sorted({type(loaded.model).__name__, type(modeling.base_of(loaded.model)).__name__})
    text = inspect.getsource(modeling)
    text += _STUB.format(config=config, classes=", ".join(names))
    return text + "".join(_CLASS.format(name=name, config=config) for name in names)


def _layers_field(config: dict[str, Any]) -> str:
    return "n_layers" if "n_layers" in config else "num_hidden_layers"
