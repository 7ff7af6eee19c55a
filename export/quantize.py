"""Symmetric block quantization of weight matrices; numpy only, knows nothing of files or graphs.

A block of consecutive weights of a row shares one float32 scale: w = (q - zero) * scale, zero = 2^(bits-1).
This is the layout of MatMulNBits and GatherBlockQuantized: 4-bit values are packed two to a byte, the first
in the low half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .recipes import Method

TINY_SCALE = 1e-30  # below it a block counts as zero: dividing by such a scale overflows
# Of weights in integer products: two products of 255 * 63 fit into the 16 bits in which x86-64 without VNNI
# adds them up. With 127 they would not, and be cut off silently.
CHANNEL_LEVELS = 63
TASK_VALUES = 1 << 17  # weights quantized at a time: they and a copy stay in the core's cache
# How far the largest weight of a block may lie outside the range, as multiples of the range: clipping it a
# little often costs less than a coarser scale for all the others.
SEARCH_RANGES = (0.83, 0.9, 0.97, 1.04, 1.13)
NEAR = 0.035  # what is tried on both sides of the best of them


@dataclass(frozen=True)
class QuantizedRows:
    """Some rows of a matrix."""

    packed: np.ndarray  # (rows, blocks * block * bits / 8) uint8
    scales: np.ndarray  # (rows, blocks) float32
    squared_error: float  # sum of (w - (q - zero) * scale)^2
    squared_norm: float  # sum of w^2


def quantize_rows(rows: np.ndarray, *, bits: int, block: int, method: Method) -> QuantizedRows:
    """Quantize `rows` (rows, width) float32, on one core; the last block of a row is padded with zeros."""
    count, width = rows.shape
    padded = -(-width // block) * block
    if padded != width:
        rows = np.pad(rows, ((0, 0), (0, padded - width)))
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, block)
    levels = np.empty(blocks.shape, np.uint8)
    scales = np.empty(len(blocks), np.float32)
    squared_error = squared_norm = 0.0
    step = max(1, TASK_VALUES // block)
    for first in range(0, len(blocks), step):
        part = slice(first, first + step)
        squared_error += _quantize_blocks(blocks[part], bits, method, levels[part], scales[part])
        squared_norm += _total(_dot(blocks[part], blocks[part]))
    return QuantizedRows(
        packed=pack(levels.reshape(count, padded), bits),
        scales=scales.reshape(count, padded // block),
        squared_error=squared_error,
        squared_norm=squared_norm,
    )


def dequantize_rows(packed: np.ndarray, scales: np.ndarray, *, bits: int, width: int) -> np.ndarray:
    """The float32 matrix (rows, width) that the packed one stands for."""
    levels = unpack(packed, bits).astype(np.float32) - 2 ** (bits - 1)
    rows, padded = levels.shape
    values = levels.reshape(rows, scales.shape[1], -1) * scales[:, :, None]
    return values.reshape(rows, padded)[:, :width]


def quantize_channels(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """One scale a row: levels (rows, width) int8, scales (rows,), squared error and squared norm.

    w = q * scale with |q| <= CHANNEL_LEVELS.
    """
    scales = np.abs(rows).max(axis=1, initial=0.0).astype(np.float32) / np.float32(CHANNEL_LEVELS)
    levels = np.rint(rows * _inverse(scales)[:, None])
    np.clip(levels, -CHANNEL_LEVELS, CHANNEL_LEVELS, out=levels)
    narrow = levels.astype(np.int8)
    squared_error = _total(_squared_error(rows, scales, levels))
    return narrow, scales, squared_error, _total(_dot(rows, rows))


def pack(levels: np.ndarray, bits: int) -> np.ndarray:
    """(rows, n) uint8 levels -> (rows, n * bits / 8) bytes, the first level in the lowest bits."""
    packed = levels[:, :: 8 // bits]
    for place in range(1, 8 // bits):
        packed = packed | (levels[:, place :: 8 // bits] << (bits * place))
    return packed


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    if bits == 8:
        return packed
    levels = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(levels, axis=-1).reshape(len(packed), -1)


def _quantize_blocks(
    blocks: np.ndarray, bits: int, method: Method, levels: np.ndarray, scales: np.ndarray
) -> float:
    """(n, block) -> levels (n, block) uint8 and scales (n,), in place; returns the squared error."""
    zero = 2 ** (bits - 1)
    largest = _largest(blocks)
    nearest = _storable(_nearest_scales(largest, bits), zero)
    scales[:] = _searched_scales(blocks, largest, nearest, zero) if method == "search" else nearest
    signed = _round(blocks, scales, zero)
    np.add(signed, zero, out=levels, casting="unsafe")
    return _total(_squared_error(blocks, scales, signed))


def _nearest_scales(largest: np.ndarray, bits: int) -> np.ndarray:
    """The largest magnitude maps to the largest level: nothing is clipped."""
    return np.abs(largest) / np.float32(2 ** (bits - 1) - 1)


def _storable(scales: np.ndarray, zero: int) -> np.ndarray:
    """The scales that are stored: 4-bit ones are rounded to the nearest that bfloat16 holds, halves to even.

    The 4-bit kernel for ARM CPUs cuts scales to bfloat16, which would make all weights 0.3 % too small on
    average; these it takes as they are. Levels are chosen after it: no kernel loses by it (docs/arm64.md).
    """
    if zero != 8:
        return scales
    bits = scales.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def _searched_scales(blocks: np.ndarray, largest: np.ndarray, nearest: np.ndarray, zero: int) -> np.ndarray:
    """The scales with the least squared error among candidates of both signs.

    Each candidate proposes levels q; the best scale for those is <w, q> / <q, q>, and takes <w, q>^2 / <q, q>
    off the error. There is one more level below zero than above: the sign of the scale decides which side of
    a block gets it. The best candidate's neighbours and its own best scale are tried last.
    """
    one = _inverse(largest) * np.float32(zero)  # 1 / the scale that puts the largest at the end
    best = _Best(blocks, zero)
    for fraction in SEARCH_RANGES:
        best.attempt(one * np.float32(fraction))
        best.attempt(one * np.float32(-fraction))
    centre = best.inverse
    best.attempt(centre * np.float32(1 - NEAR))
    best.attempt(centre * np.float32(1 + NEAR))
    best.attempt(_inverse(best.scales))
    searched = _storable(best.scales, zero)
    found, plain = (
        _squared_error(blocks, scales, _round(blocks, scales, zero)) for scales in (searched, nearest)
    )
    return np.where(found <= plain, searched, nearest)


class _Best:
    """The best scale of each block so far."""

    def __init__(self, blocks: np.ndarray, zero: int) -> None:
        self.blocks = blocks  # (n, block)
        self.zero = zero
        self.scales, self.inverse, self._gains = np.zeros((3, len(blocks)), np.float32)
        self._levels = np.empty_like(blocks)

    def attempt(self, inverse: np.ndarray) -> None:
        """Try the levels nearest to w * inverse, (n,)."""
        levels = _levels(self.blocks, inverse, self.zero, self._levels)
        product = _dot(self.blocks, levels)
        scales = product / np.maximum(_dot(levels, levels), 1)  # 0 if all levels are
        gains = product * scales
        better = gains > self._gains
        np.copyto(self._gains, gains, where=better)
        np.copyto(self.scales, scales, where=better)
        self.inverse = np.where(better, inverse, self.inverse)


def _largest(blocks: np.ndarray) -> np.ndarray:
    """The weight of the largest magnitude of each block."""
    low, high = _fold(np.minimum, blocks), _fold(np.maximum, blocks)
    return np.where(high >= -low, high, low)


def _fold(operator: np.ufunc, blocks: np.ndarray) -> np.ndarray:
    """(n, block) -> (n,): a reduction by halves, for short rows several times faster than numpy's."""
    while blocks.shape[1] > 1 and blocks.shape[1] % 2 == 0:
        half = blocks.shape[1] // 2
        blocks = operator(blocks[:, :half], blocks[:, half:])
    return operator.reduce(blocks, axis=1)


def _squared_error(blocks: np.ndarray, scales: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """|w - q * scale|^2 of each block; overwrites the levels q."""
    levels *= scales[:, None]
    np.subtract(blocks, levels, out=levels)
    return _dot(levels, levels)


def _round(blocks: np.ndarray, scales: np.ndarray, zero: int) -> np.ndarray:
    """The signed levels -zero..zero-1 nearest to w / scale, as float32."""
    return _levels(blocks, _inverse(scales), zero, np.empty_like(blocks))


def _levels(blocks: np.ndarray, inverse: np.ndarray, zero: int, out: np.ndarray) -> np.ndarray:
    np.multiply(blocks, inverse[:, None], out=out)
    np.rint(out, out=out)
    return np.clip(out, -zero, zero - 1, out=out)


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / v, 0 for what counts as zero."""
    return np.divide(1, values, out=np.zeros_like(values), where=np.abs(values) > TINY_SCALE)


def _dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Row by row."""
    return np.vecdot(left, right)


def _total(values: np.ndarray) -> float:
    return float(values.sum(dtype=np.float64))
