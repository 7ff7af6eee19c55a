"""The values of the decoder's constants: rotary tables and the scales of an int8 cache.

Rotary tables are made with torch, step by step as transformers makes them: a position multiplies the last bit
of a frequency, and another library's power function moves angles by 0.015 at position 131,000.
"""

from __future__ import annotations

import numpy as np
import torch

from ..geometry import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """(head_dim / 2,) float32: theta^(-2i/head_dim), zero for pairs that "proportional" leaves alone."""
    rotated = torch.arange(0, 2 * rotated_pairs(rope, head_dim), 2, dtype=torch.float32)
    frequencies = 1.0 / (rope.theta ** (rotated / head_dim))
    return torch.nn.functional.pad(frequencies, (0, head_dim // 2 - len(frequencies))) / rope.factor


def rotated_pairs(rope: Rope, head_dim: int) -> int:
    return int(rope.rotated_fraction * head_dim // 2)


def rope_table(rope: Rope, head_dim: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each (context, head_dim / 2) float32."""
    positions = torch.arange(context, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)
    return angles.cos().numpy(), angles.sin().numpy()


def cache_scales(
    key_norm: np.ndarray, rope: Rope, head_dim: int, kv_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scales (1, kv_heads, 1, head_dim) of int8 keys and values, derived from the key norm's weight alone.

    A normalised vector has root mean square 1, so no entry exceeds sqrt(head_dim). Keys are that times the
    norm's weight, then rotated: entry i mixes with entry i + head_dim/2 and stays below the larger of the two
    weights times their common length. Values have no weight. Entries beyond `clip` root mean squares are
    clipped: a Gaussian has none at 6, and half the possible maximum leaves room for the outlier channels of
    wide heads.
    """
    clip = min(head_dim**0.5, max(6.0, head_dim**0.5 / 2))
    weight = np.abs(key_norm.astype(np.float32))
    half = head_dim // 2
    rotated = np.arange(half) < rotated_pairs(rope, head_dim)
    larger = np.maximum(weight[:half], weight[half:])
    bound = np.concatenate(
        [np.where(rotated, larger, weight[:half]), np.where(rotated, larger, weight[half:])]
    )
    bound = np.maximum(bound, np.float32(1e-6))
    keys = np.broadcast_to(bound * np.float32(clip / 127), (1, kv_heads, 1, head_dim))
    values = np.full((1, kv_heads, 1, head_dim), clip / 127, np.float32)
    return np.ascontiguousarray(keys, np.float32), values
