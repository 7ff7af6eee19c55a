"""Streams weights from a checkpoint into external data files, quantized on the way, chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from ..runtime.bundle import Quantized
from .checkpoint import Checkpoint
from .plan import PlannedWeight
from .quantize import quantize_rows

ALIGNMENT_BYTES = 4096  # a page: the runtime maps the files

Progress = Callable[[str, int], None]  # name of the tensor at hand, weights done since the last call


class DataFile:
    """An external data file being written: regions are reserved in order, then filled in any order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> DataFile:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, type_: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ):
        if self._file is not None:
            self._file.truncate(self._end)
            self._file.close()

    def reserve(self, size_bytes: int) -> int:
        """The offset of a new region."""
        offset = -(-self._end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._end = offset + size_bytes
        return offset

    def write(self, offset: int, values: np.ndarray) -> None:
        assert self._file is not None
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(values).data.cast("B") if values.size else b"")

    def tensor(self, name: str, offset: int, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
        """A reference to a region, as a graph in the same folder holds it."""
        length = math.prod(shape) * dtype.itemsize
        return ir.ExternalTensor(
            self.path.name,
            int(offset),
            int(length),
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )

    def add(self, name: str, values: np.ndarray) -> ir.ExternalTensor:
        """Write a whole array."""
        offset = self.reserve(values.nbytes)
        self.write(offset, values)
        return self.tensor(name, offset, ir.DataType.from_numpy(values.dtype), values.shape)


@dataclass(frozen=True)
class StoredWeight:
    """A weight's bytes: float (rows, width), or packed (rows, bytes) with scales (rows, blocks)."""

    planned: PlannedWeight
    file: DataFile
    data_offset: int
    scale_offset: int | None
    report: Quantized | None


def store_weight(
    file: DataFile, checkpoint: Checkpoint, planned: PlannedWeight, progress: Progress
) -> StoredWeight:
    """Read, quantize as planned and write one matrix."""
    storage = planned.storage
    data_offset = file.reserve(planned.data_bytes)
    scale_offset = None if storage.bits == 32 else file.reserve(planned.scale_bytes)
    position, scale_position = data_offset, scale_offset
    squared_error = squared_norm = 0.0
    for rows in checkpoint.rows(planned.name):
        if scale_position is None:
            file.write(position, rows)
        else:
            result = quantize_rows(rows, bits=storage.bits, block=storage.block, method=storage.method)
            file.write(position, result.packed)
            file.write(scale_position, result.scales)
            scale_position += result.scales.nbytes
            squared_error += result.squared_error
            squared_norm += result.squared_norm
        position += len(rows) * planned.row_bytes
        progress(planned.name, rows.size)
    report = None
    if scale_offset is not None:
        report = Quantized(
            tensor=planned.name,
            bits=storage.bits,
            block_size=storage.block,
            method=storage.method,
            relative_error=math.sqrt(squared_error / squared_norm) if squared_norm else 0.0,
        )
    return StoredWeight(planned, file, data_offset, scale_offset, report)
