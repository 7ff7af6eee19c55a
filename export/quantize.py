"""Symmetric block quantization of weight matrices; numpy only, knows nothing of files or graphs.

A block of consecutive weights of a row shares one float32 scale: w = (q - zero) * scale, zero = 2^(bits-1).
This is the layout of MatMulNBits and GatherBlockQuantized: 4-bit values are packed two to a byte, the first
in the low half.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .recipes import Method

TINY_SCALE = 1e-30  # below it a block counts as zero: dividing by such a scale overflows
TASK_VALUES = 1 << 18  # weights quantized at a time by one thread: they stay in the cache
# How far the largest weight of a block may lie outside the range, as multiples of the range: clipping it a
# little often costs less than a coarser scale for all the others.
SEARCH_RANGES = np.linspace(0.78, 1.22, 12, dtype=np.float32)


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a matrix."""

    packed: np.ndarray  # (rows, blocks * block * bits / 8) uint8
    scales: np.ndarray  # (rows, blocks) float32
    squared_error: float  # sum of (w - (q - zero) * scale)^2
    squared_norm: float  # sum of w^2


def quantize_rows(rows: np.ndarray, *, bits: int, block: int, method: Method) -> QuantizedRows:
    """Quantize `rows` (rows, width) float32; the last block of a row is padded with zeros."""
    count, width = rows.shape
    padded = -(-width // block) * block
    if padded != width:
        rows = np.pad(rows, ((0, 0), (0, padded - width)))
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, block)
    step = max(1, TASK_VALUES // block)
    tasks = [blocks[first : first + step] for first in range(0, len(blocks), step)]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(lambda task: _quantize_blocks(task, bits, method), tasks))
    levels = np.concatenate([levels for levels, _, _ in results]).reshape(count, padded)
    scales = np.concatenate([scales for _, scales, _ in results]).reshape(count, padded // block)
    return QuantizedRows(
        packed=pack(levels, bits),
        scales=scales,
        squared_error=float(sum(error for _, _, error in results)),
        squared_norm=float(np.square(blocks, dtype=np.float64).sum()),
    )


def dequantize_rows(packed: np.ndarray, scales: np.ndarray, *, bits: int, width: int) -> np.ndarray:
    """The float32 matrix (rows, width) that the packed one stands for."""
    levels = unpack(packed, bits).astype(np.float32) - 2 ** (bits - 1)
    rows, padded = levels.shape
    values = levels.reshape(rows, scales.shape[1], -1) * scales[:, :, None]
    return values.reshape(rows, padded)[:, :width]


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n) uint8 levels -> (rows, n * bits / 8) bytes."""
    return levels if bits == 8 else levels[:, ::2] | (levels[:, 1::2] << 4)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)


def _quantize_blocks(blocks: np.ndarray, bits: int, method: Method) -> tuple[np.ndarray, np.ndarray, float]:
    """(n, block) -> levels (n, block) uint8, scales (n,), squared error."""
    scales = _searched_scales(blocks, bits) if method == "search" else _nearest_scales(blocks, bits)
    zero = 2 ** (bits - 1)
    signed = _round(blocks, scales, zero)
    error = float(np.square(blocks - signed * scales[:, None], dtype=np.float64).sum())
    return (signed + zero).astype(np.uint8), scales, error


def _nearest_scales(blocks: np.ndarray, bits: int) -> np.ndarray:
    """The largest magnitude maps to the largest level: nothing is clipped."""
    return np.abs(blocks).max(axis=1) / np.float32(2 ** (bits - 1) - 1)


def _searched_scales(blocks: np.ndarray, bits: int) -> np.ndarray:
    """The scales with the least squared error among candidates of both signs.

    Each candidate scale proposes levels q, is refined to the best for those, <w, q> / <q, q>, and is judged
    by the error with it. There is one more level below zero than above: the sign of the scale decides which
    side of a block gets it.
    """
    zero = 2 ** (bits - 1)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)]
    best_scale = _nearest_scales(blocks, bits)
    best_error = _squared_error(blocks, best_scale, zero)
    for sign in (-1, 1):
        for fraction in SEARCH_RANGES:
            levels = _round(blocks, largest / np.float32(sign * zero * fraction), zero)
            product = np.einsum("ij,ij->i", blocks, levels)
            length = np.einsum("ij,ij->i", levels, levels)
            scale = np.divide(product, length, out=np.zeros_like(product), where=length > 0)
            error = _squared_error(blocks, scale, zero)
            better = error < best_error
            best_scale = np.where(better, scale, best_scale)
            best_error = np.where(better, error, best_error)
    return best_scale


def _squared_error(blocks: np.ndarray, scales: np.ndarray, zero: int) -> np.ndarray:
    """|w - q * scale|^2 of each block, q the nearest levels."""
    left = _round(blocks, scales, zero)
    left *= scales[:, None]
    np.subtract(blocks, left, out=left)
    return np.einsum("ij,ij->i", left, left)


def _round(blocks: np.ndarray, scales: np.ndarray, zero: int) -> np.ndarray:
    """The signed levels -zero..zero-1 nearest to w / scale, as float32."""
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=np.abs(scales) > TINY_SCALE)
    levels = blocks * inverse[:, None]
    return np.clip(np.rint(levels, out=levels), -zero, zero - 1, out=levels)
