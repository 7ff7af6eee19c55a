"""The values of the decoder's constants: rotary tables and the scales of an int8 cache; numpy only."""

from __future__ import annotations

import numpy as np

from ..geometry import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """(head_dim / 2,) float32: theta^(-2i/head_dim), zero for pairs that "proportional" leaves alone."""
    pairs = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (np.float32(1.0) / np.float32(rope.theta) ** pairs).astype(np.float32)
    frequencies[rotated_pairs(rope, head_dim) :] = 0.0
    return frequencies / np.float32(rope.factor)


def rotated_pairs(rope: Rope, head_dim: int) -> int:
    return int(rope.rotated_fraction * head_dim // 2)


def rope_table(rope: Rope, head_dim: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, each (context, head_dim / 2) float32."""
    angles = np.outer(np.arange(context, dtype=np.float32), inverse_frequencies(rope, head_dim))
    return np.cos(angles), np.sin(angles)


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
