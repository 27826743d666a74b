"""Rotary position embeddings: a frequency per pair of dimensions, cos and sin of a step's positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmtool.modelspec import RopeSpec


class RotaryEmbedding:
    """cos and sin for any positions. Computed for a step and shared by its layers, in float32 throughout."""

    def __init__(self, spec: RopeSpec, device: torch.device, max_length: int) -> None:
        """max_length: of the longest sequence; it decides which of longrope's factors serve them all."""
        self.inv_freq = inverse_frequencies(spec, max_length).to(device)
        self.scale = spec.attention_factor

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Two float32 tensors [N, 1, D/2] for positions [N]; the 1 broadcasts over heads."""
        angle = positions.float()[:, None, None] * self.inv_freq
        if self.scale == 1.0:
            return angle.cos(), angle.sin()
        return angle.cos() * self.scale, angle.sin() * self.scale


def inverse_frequencies(spec: RopeSpec, max_length: int = 0) -> Tensor:
    """float32 [dim / 2], radians per position.

    A frequency never depends on a sequence's length so far: cached keys are turned once and shared by sequences.
    So longrope serves all of them by its long factors when any may outgrow original_max_positions, and dynamic
    scaling, which begins beyond max_position_embeddings, where serving ends, is none.
    """
    exponent = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    freq = 1.0 / (spec.theta**exponent)
    if spec.kind == "linear":
        return freq / spec.factor
    if spec.kind == "llama3":
        return _llama3(freq, spec)
    if spec.kind == "yarn":
        return _yarn(freq, spec)
    if spec.kind == "longrope":
        long = max_length > spec.original_max_positions
        return freq / torch.tensor(spec.long_factors if long else spec.short_factors)
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


def _yarn(freq: Tensor, spec: RopeSpec) -> Tensor:
    """YaRN, section 3.2: dimensions that turn more than beta_fast times within the original context keep their
    frequency, those that turn less than beta_slow times are stretched, those between blended linearly."""

    def dimension(turns: float) -> float:
        return (
            spec.dim
            * math.log(spec.original_max_positions / (turns * 2 * math.pi))
            / (2 * math.log(spec.theta))
        )

    low, high = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    width = high - low or 0.001
    stretched = ((torch.arange(spec.dim // 2).float() - low) / width).clamp(0, 1)
    return freq / spec.factor * stretched + freq * (1 - stretched)
