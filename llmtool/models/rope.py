"""Rotary position embeddings: a frequency per pair of dimensions, cos and sin of a step's positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmtool.modelspec import RopeSpec


class RotaryEmbedding:
    """cos and sin for any positions. Computed for a step and shared by its layers, in float32 throughout."""

    def __init__(self, spec: RopeSpec, head_dim: int, device: torch.device) -> None:
        self.inv_freq = inverse_frequencies(spec, head_dim).to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Two float32 tensors [N, 1, D/2] for positions [N]; the 1 broadcasts over heads."""
        angle = positions.float()[:, None, None] * self.inv_freq
        return angle.cos(), angle.sin()


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    """float32 [D/2], radians per position."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    freq = 1.0 / (spec.theta**exponent)
    if spec.kind == "linear":
        return freq / spec.factor
    if spec.kind == "llama3":
        return _llama3(freq, spec)
    return freq


def _llama3(freq: Tensor, spec: RopeSpec) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / freq
    longest = spec.original_max_positions / spec.low_freq_factor
    shortest = spec.original_max_positions / spec.high_freq_factor
    blend = (spec.original_max_positions / wavelength - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    between = (1 - blend) * freq / spec.factor + blend * freq
    stretched = torch.where(wavelength > longest, freq / spec.factor, freq)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)
