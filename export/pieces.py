"""One piece of a weight from checkpoint to data file: read, quantize, write; knows no graphs and no plan.

A piece carries everything it needs, so that it can be done in any process (`workers.py`), in any order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .checkpoint import CheckpointError, TensorEntry, read_values
from .qat_rows import HeldTensors, float_rows, import_rows
from .quantize import QuantizedRows, quantize_channels, quantize_rows, unpack
from .recipes import Storage

PIECE_VALUES = 1 << 21  # weights at a time: 8 MiB as float32
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix."""

    source: TensorEntry | HeldTensors
    first: int  # row
    rows: int
    width: int
    storage: Storage
    file: Path
    position: int  # byte in `file` where the packed rows go
    scale_position: int | None  # None: stored as it is, without scales
    scale_dtype: str = "float32"
    gain: float = 1.0  # the matrix is stored times this

    @property
    def name(self) -> str:
        """Of the tensor, in the checkpoint."""
        return (self.source.data if isinstance(self.source, HeldTensors) else self.source).original_name


@dataclass(frozen=True)
class ChannelPiece:
    """Some rows of a matrix W as the prefill graph has them: columns of W^T, int8, a scale each."""

    source: TensorEntry | HeldTensors
    first: int  # row of W
    rows: int
    width: int
    outputs: int  # rows of the whole W
    file: Path
    position: int  # byte in `file` where W^T (width, outputs) begins
    scale_position: int  # byte in `file` where the scales of these rows go

    @property
    def name(self) -> str:
        """Of the tensor, in the checkpoint."""
        return (self.source.data if isinstance(self.source, HeldTensors) else self.source).original_name


@dataclass(frozen=True)
class Done:
    """What quantizing a piece cost."""

    values: int
    squared_error: float
    squared_norm: float


def process(piece: Piece | ChannelPiece) -> Done:
    """Raises CheckpointError if the source cannot be read, OSError if the target cannot be written."""
    if isinstance(piece, ChannelPiece):
        return _process_channels(piece)
    count = piece.rows * piece.width
    result = _prepared(piece)
    target = os.open(piece.file, os.O_WRONLY)  # never made here: its owner may have removed it
    try:
        if isinstance(result, np.ndarray):
            _write(target, piece.position, result)
            return Done(count, 0.0, 0.0)
        assert piece.scale_position is not None
        _write(target, piece.position, result.packed)
        scales = result.scales * np.float32(piece.gain)
        _write(target, piece.scale_position, scales.astype(piece.scale_dtype))
        return Done(count, result.squared_error, result.squared_norm)
    finally:
        os.close(target)


def _prepared(piece: Piece) -> np.ndarray | QuantizedRows:
    """The piece as it is to be stored: floats, or levels and scales."""
    source, storage = piece.source, piece.storage
    if isinstance(source, HeldTensors):
        if storage.method == "import":
            return import_rows(source, piece.first, piece.rows, width=piece.width, block=storage.block)
        values = float_rows(source, piece.first, piece.rows, width=piece.width)
    else:
        flat = read_values(source, piece.first * piece.width, piece.rows * piece.width)
        values = flat.reshape(piece.rows, piece.width)
    if storage.is_float:
        values = values * np.float32(piece.gain) if piece.gain != 1 else values
        return values if storage.bits == 32 else _narrowed(values, piece.name)
    return quantize_rows(values, bits=storage.bits, block=storage.block, method=storage.method)


def _process_channels(piece: ChannelPiece) -> Done:
    levels, scales, squared_error, squared_norm = _channels(piece)
    columns = np.ascontiguousarray(levels.T)
    target = os.open(piece.file, os.O_WRONLY)
    try:
        for row, values in enumerate(columns):
            _write(target, piece.position + row * piece.outputs + piece.first, values)
        _write(target, piece.scale_position, scales)
    finally:
        os.close(target)
    return Done(levels.size, squared_error, squared_norm)


def _channels(piece: ChannelPiece) -> tuple[np.ndarray, np.ndarray, float, float]:
    source = piece.source
    if not isinstance(source, HeldTensors):
        flat = read_values(source, piece.first * piece.width, piece.rows * piece.width)
        return quantize_channels(flat.reshape(piece.rows, piece.width))
    if source.held.bits == 8 or source.held.columns > 1:
        return quantize_channels(float_rows(source, piece.first, piece.rows, width=piece.width))
    packed, scales = source.read(piece.first, piece.rows)  # fewer bits fit as they are
    levels = unpack(packed, source.held.bits)[:, : piece.width].view(np.int8) - np.int8(
        1 << (source.held.bits - 1)
    )
    return levels, scales[:, 0].astype(np.float32), 0.0, 0.0


def _narrowed(values: np.ndarray, name: str) -> np.ndarray:
    largest = float(np.abs(values).max(initial=0.0))
    if largest > FLOAT16_MAX:
        raise CheckpointError(
            f"{name}: a weight of {largest:.4g} is beyond float16's {FLOAT16_MAX:.0f}; "
            "take a recipe with a rule of 32 bits for it"
        )
    return values.astype(np.float16)


def _write(file: int, position: int, values: np.ndarray) -> None:
    data = np.ascontiguousarray(values).data.cast("B")
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written
