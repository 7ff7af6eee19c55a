"""A checkpoint's weights as float32: whole, in chunks of rows or row by row, quantized ones too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..checkpoint import Checkpoint, CheckpointError, read_values
from ..geometry import TextModel
from ..plan import LAYER_TABLE, TOKEN_TABLE
from ..qat_rows import HeldTensors, find_held, float_rows

CHUNK_VALUES = 1 << 23  # float32 values that are held at a time


class SourceWeights:
    """The weights that a bundle was made from. Names are canonical: `layers.0.mlp.up_proj.weight`."""

    def __init__(self, checkpoint: Checkpoint, model: TextModel) -> None:
        self.folder: Path = checkpoint.folder
        self._checkpoint, self._model = checkpoint, model
        self._stamps = self._stamp()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None if there is no such weight."""
        if (held := self._held(name)) is not None:
            return held.data.shape[0], held.data.shape[1] * 8 // held.held.bits
        entry = self._checkpoint.tensors.get(name)
        return None if entry is None else entry.shape

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        if self._held(name) is not None:
            return np.concatenate(list(self.rows(name)))
        return self._checkpoint.read(name)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """A matrix (rows, width), some rows at a time."""
        count, width = self._matrix(name)
        step = max(1, CHUNK_VALUES // width)
        for first in range(0, count, step):
            yield self._rows(name, first, min(step, count - first), width)

    def rows_at(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """(len(rows), width): these rows of a matrix; no others are read."""
        count, width = self._matrix(name)
        if rows and max(rows) >= count:
            raise CheckpointError(f"{self.folder}: {name} has {count} rows, token {max(rows)} needs one more")
        return np.concatenate([self._rows(name, row, 1, width) for row in rows])

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a file was written since: parts of two checkpoints were read."""
        for path, stamp in self._stamp().items():
            if stamp != self._stamps[path]:
                raise CheckpointError(f"{path}: changed while it was read; verify again")

    def _rows(self, name: str, first: int, count: int, width: int) -> np.ndarray:
        if (held := self._held(name)) is not None:
            return float_rows(held, first, count, width=width)
        entry = self._checkpoint.entry(name)
        return read_values(entry, first * width, count * width).reshape(count, width)

    def _matrix(self, name: str) -> tuple[int, int]:
        shape = self.shape(name)
        if shape is None or len(shape) != 2:
            raise CheckpointError(f"{self.folder}: {name} has shape {shape}, expected a matrix")
        return shape[0], shape[1]

    def _held(self, name: str) -> HeldTensors | None:
        quantization = self._model.quantization
        if quantization is None or not name.endswith(".weight"):
            return None
        is_table = name in (TOKEN_TABLE, LAYER_TABLE)
        held = quantization.held(name, is_table=is_table)
        if (
            held is None
            or held.data not in self._checkpoint.tensors
            or held.scales not in self._checkpoint.tensors
        ):
            return None
        return find_held(self._checkpoint, held)

    def _stamp(self) -> dict[Path, tuple[int, int]]:
        files = {entry.file for entry in self._checkpoint.tensors.values()}
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
