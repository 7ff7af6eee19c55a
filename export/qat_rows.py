"""The bytes of weights that a checkpoint holds quantized, in ONNX Runtime's packing.

2- and 4-bit levels are packed alike in both, the first in the low bits, with zero point 2^(bits-1); 8-bit
levels are signed in the checkpoint and get 128 added. A scale is repeated for every block that it covers.
Nothing is rounded: the weights that come out are those that went in, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .checkpoint import Checkpoint, CheckpointError, TensorEntry, read_bytes, read_values
from .qat import Held
from .quantize import QuantizedRows, dequantize_rows, pack, unpack

COMPARE_ROWS = 1 << 14


@dataclass(frozen=True)
class HeldTensors:
    """A weight that the checkpoint holds quantized, and where its tensors are."""

    held: Held
    data: TensorEntry  # (rows, bytes)
    scales: TensorEntry  # (rows, columns)

    def read(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows: levels packed and counted from zero up (count, bytes) uint8, scales (count, columns)."""
        width, columns = self.data.shape[1], self.scales.shape[1]
        packed = np.frombuffer(read_bytes(self.data, first * width, count * width), np.uint8)
        if self.data.dtype == "I8":
            packed = packed ^ np.uint8(128)  # adds 128
        scales = read_values(self.scales, first * columns, count * columns)
        if not np.isfinite(scales).all():
            raise CheckpointError(
                f"{self.scales.file}: {self.scales.original_name} holds numbers that are not finite; "
                "download it again"
            )
        return packed.reshape(count, width), scales.reshape(count, columns)


def find_held(checkpoint: Checkpoint, held: Held) -> HeldTensors:
    return HeldTensors(held, checkpoint.entry(held.data), checkpoint.entry(held.scales))


def import_rows(source: HeldTensors, first: int, count: int, *, width: int, block: int) -> QuantizedRows:
    """Rows of `width` values as blocks of `block`; a block lies within one scale's share of the row."""
    packed, scales = source.read(first, count)
    blocks = -(-width // block)
    if blocks * block != width:
        packed = _padded(packed, source.held.bits, width, blocks * block)
    repeats = blocks // source.held.columns
    return QuantizedRows(packed, np.repeat(scales, repeats, axis=1), squared_error=0.0, squared_norm=0.0)


def float_rows(source: HeldTensors, first: int, count: int, *, width: int) -> np.ndarray:
    """The float32 rows that levels and scales stand for."""
    packed, scales = source.read(first, count)
    return dequantize_rows(packed, scales, bits=source.held.bits, width=width)


def same_weight(first: HeldTensors, second: HeldTensors) -> bool:
    """Whether two weights are equal in every byte."""
    if first.held.bits != second.held.bits or first.data.shape != second.data.shape:
        return False
    rows = first.data.shape[0]
    for start in range(0, rows, COMPARE_ROWS):
        count = min(COMPARE_ROWS, rows - start)
        pairs = zip(first.read(start, count), second.read(start, count), strict=True)
        if not all(np.array_equal(mine, other) for mine, other in pairs):
            return False
    return True


def _padded(packed: np.ndarray, bits: int, width: int, padded: int) -> np.ndarray:
    """Packed rows, zeros after the `width` values that they have."""
    levels = np.full((len(packed), padded), 1 << (bits - 1), np.uint8)
    levels[:, :width] = unpack(packed, bits)[:, :width]
    return pack(levels, bits)
