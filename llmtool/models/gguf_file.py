"""A GGUF file: its metadata and its tensors, as llama.cpp calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize

from llmtool.errors import ModelError


class GGUFFile:
    """metadata: all keys. tensors: by name. architecture: the value of general.architecture."""

    def __init__(self, path: Path) -> None:
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as e:
            raise ModelError(f"{path} is not a readable GGUF file: {e}.", "Download it again.") from e
        self.path = path
        self.tensors: dict[str, ReaderTensor] = {t.name: t for t in reader.tensors}
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.metadata.get("split.count", 1) > 1:
            raise ModelError(
                f"{path.name} is one of {self.metadata['split.count']} parts.",
                "Join them with llama.cpp's `llama-gguf-split --merge` first.",
            )

    def find(self, key: str) -> Any:
        """The value of the architecture's own key, such as attention.head_count; None where it has none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def get(self, key: str, default: Any = None) -> Any:
        """The same, but a key without a default must be there."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise ModelError(
                f"{self.path.name} lacks the GGUF key {self.architecture}.{key}.", "Download it again."
            )
        return value

    def decimal(self, key: str) -> float:
        return shortest_decimal(self.get(key))

    def tensor(self, name: str) -> ReaderTensor:
        if name not in self.tensors:
            raise ModelError(f"{self.path.name} lacks the tensor {name}.", "Download it again.")
        return self.tensors[name]


def shortest_decimal(number: float) -> float:
    """What the author wrote of a number stored as float32: the shortest decimal that gives it back."""
    return float(str(np.float32(number)))


def dequantised(tensor: ReaderTensor, index: int | None = None) -> torch.Tensor:
    """float32 of a tensor, or of one of the matrices stacked in it. Raises ModelError for a type not known."""
    data = tensor.data if index is None else tensor.data[index]
    try:
        plain = dequantize(data, tensor.tensor_type)
    except NotImplementedError:
        raise ModelError(
            f"The GGUF type {tensor.tensor_type.name} of {tensor.name} does not run here.",
            "Use a file in Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, a K-quant, F16, BF16 or F32.",
        ) from None
    # An unquantised tensor comes as a view of the mapped file, and torch wants memory it may write.
    return torch.from_numpy(np.require(plain, dtype=np.float32, requirements="W"))
