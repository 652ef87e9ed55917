"""Rotary position tables in Hugging Face's half-rotation convention.

Feature d of a head turns with feature d + D/2 by the angle position * frequency[d]. The arithmetic, its order and its
float32 are those of transformers: at position 2,000 a table from float64 angles would already differ in the fourth digit.
"""

import math

import torch
from torch import Tensor

from ramify.model.config import RopeConfig

_BLOCK = 1024  # positions worked out at least at a time


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each feature pair, f32 [head_dim / 2], scaled as `rope.kind` says."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequency = 1.0 / (rope.theta**exponent)
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequency, rope)
    return frequency


def rope_tables(rope: RopeConfig, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position below `positions`: two f32 tensors [positions, head_dim / 2], contiguous."""
    angles = torch.arange(positions, dtype=torch.float32, device="cpu")[:, None] * rope_frequencies(rope, head_dim)
    return angles.cos(), angles.sin()


class RopeTable:
    """The same tables for all `positions`, at addresses that stay; rows are worked out when `reach` first asks for them.

    A model of a million positions has a table of hundreds of megabytes, of which a text needs its own length.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, positions: int):
        self.positions, self.ready = positions, 0
        self._frequency = rope_frequencies(rope, head_dim)
        self.cos, self.sin = torch.empty(
            2, positions, head_dim // 2, dtype=torch.float32, device="cpu"
        )  # memory that nobody has written takes no room yet

    def reach(self, positions: int) -> None:
        """Make the rows below `positions` ready."""
        if positions <= self.ready:
            return
        end = min(self.positions, max(-(-positions // _BLOCK) * _BLOCK, 2 * self.ready))
        angles = torch.arange(self.ready, end, dtype=torch.float32, device="cpu")[:, None] * self._frequency
        torch.cos(angles, out=self.cos[self.ready : end])
        torch.sin(angles, out=self.sin[self.ready : end])
        self.ready = end


def _llama3(frequency: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's stretch: long waves by `factor`, short ones not at all, a linear blend between (Grattafiori et al. 2024)."""
    low_wave = rope.original_max_positions / rope.low_freq_factor
    high_wave = rope.original_max_positions / rope.high_freq_factor
    wave = 2 * math.pi / frequency
    blend = (rope.original_max_positions / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = (1 - blend) * frequency / rope.factor + blend * frequency
    stretched = torch.where(wave > low_wave, frequency / rope.factor, frequency)
    return torch.where((wave >= high_wave) & (wave <= low_wave), smooth, stretched)
