"""Streams weights from a checkpoint into external data files, quantized on the way, piece by piece.

Where every byte goes is known beforehand, so pieces are done in any order, by as many processes as there are
CPUs: while one waits for the disk, another computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from ..runtime.bundle import Quantized
from ..runtime.machine import usable_cpus
from .checkpoint import Checkpoint, TensorEntry
from .fused import groups
from .pieces import PIECE_VALUES, ChannelPiece, Done, Piece, process
from .plan import ChannelWeight, PlannedWeight
from .qat_rows import HeldTensors, find_held
from .workers import Workers

ALIGNMENT_BYTES = 4096  # a page: the runtime maps the files
WORTH_PROCESSES = 1 << 27  # weights; fewer are done sooner than processes start

Progress = Callable[[str, int], None]  # name of the tensor at hand, weights done since the last call


class DataFile:
    """An external data file being written: regions are reserved in order, then filled in any order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._end = 0
        self._added: dict[tuple[bytes, str, tuple[int, ...]], int] = {}

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
        """Write a whole array, unless one like it is there: two graphs may share a file."""
        key = (hashlib.sha256(values.tobytes()).digest(), values.dtype.str, values.shape)
        offset = self._added.get(key)
        if offset is None:
            offset = self._added[key] = self.reserve(values.nbytes)
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


def store_weights(
    files: Mapping[str, DataFile],
    checkpoint: Checkpoint,
    weights: Sequence[PlannedWeight],
    progress: Progress,
    *,
    workers: int | None = None,
) -> dict[str, StoredWeight]:
    """Read, quantize as planned and write matrices.

    files: by the name that the plan has. workers: processes, 0 for none; by default one for each CPU if there
    is work for them.
    """
    regions = reserve(files, weights)
    pieces = (
        (region.planned.name, piece)
        for region in regions.values()
        for piece in _pieces(_source(checkpoint, region.planned), region)
    )
    sums = _sums(pieces, list(regions), _worth(weights, workers), progress)
    return {
        name: StoredWeight(
            region.planned,
            region.file,
            region.data_offset,
            region.scale_offset,
            _report(region.planned, *sums[name]),
        )
        for name, region in regions.items()
    }


@dataclass(frozen=True)
class StoredChannels:
    """An int8 copy of a weight: levels (width, outputs), scales (outputs,)."""

    planned: ChannelWeight
    file: DataFile
    data_offset: int
    scale_offset: int
    report: Quantized


def store_channels(
    file: DataFile,
    checkpoint: Checkpoint,
    weights: Sequence[ChannelWeight],
    progress: Progress,
    *,
    workers: int | None = None,
) -> dict[str, StoredChannels]:
    """Read the weights of the prefill graph, quantize and write them; `workers` as above."""
    places = {
        weight.name: (file.reserve(math.prod(weight.shape)), file.reserve(4 * weight.shape[0]))
        for weight in weights
    }
    pieces = (
        (weight.name, piece)
        for weight in weights
        for piece in _channel_pieces(_source(checkpoint, weight), weight, file, *places[weight.name])
    )
    sums = _sums(pieces, [weight.name for weight in weights], _worth(weights, workers), progress)
    return {
        weight.name: StoredChannels(
            weight,
            file,
            *places[weight.name],
            Quantized(
                tensor=weight.name,
                bits=8,
                block_size=weight.shape[1],
                method="channels",
                relative_error=_relative(*sums[weight.name]),
            ),
        )
        for weight in weights
    }


def _channel_pieces(
    source: TensorEntry | HeldTensors, weight: ChannelWeight, file: DataFile, position: int, scales: int
) -> Iterator[ChannelPiece]:
    outputs, width = weight.shape
    step = max(1, PIECE_VALUES // width)
    for first in range(0, outputs, step):
        count = min(step, outputs - first)
        yield ChannelPiece(source, first, count, width, outputs, file.path, position, scales + 4 * first)


@dataclass(frozen=True)
class _Region:
    """Where a weight goes."""

    planned: PlannedWeight
    file: DataFile
    data_offset: int
    scale_offset: int | None


def reserve(files: Mapping[str, DataFile], weights: Sequence[PlannedWeight]) -> dict[str, _Region]:
    """A place for each weight; those that may be one matrix lie one after the other, as their scales do."""
    regions: dict[str, _Region] = {}
    for group in groups(weights):
        file, quantized = files[group[0].file], not group[0].storage.is_float
        position = file.reserve(sum(weight.data_bytes for weight in group))
        scale_position = file.reserve(sum(weight.scale_bytes for weight in group)) if quantized else None
        for weight in group:
            regions[weight.name] = _Region(weight, file, position, scale_position)
            position += weight.data_bytes
            if scale_position is not None:
                scale_position += weight.scale_bytes
    return regions


def _source(checkpoint: Checkpoint, planned: PlannedWeight | ChannelWeight) -> TensorEntry | HeldTensors:
    if planned.held is None:
        return checkpoint.entry(planned.name)
    return find_held(checkpoint, planned.held)


def _pieces(source: TensorEntry | HeldTensors, region: _Region) -> Iterator[Piece]:
    planned = region.planned
    rows, width = planned.shape
    step = max(1, PIECE_VALUES // width)
    for first in range(0, rows, step):
        position = region.data_offset + first * planned.row_bytes
        scale_position = region.scale_offset
        if scale_position is not None:
            scale_position += first * (planned.scale_bytes // rows)
        count = min(step, rows - first)
        yield Piece(
            source,
            first,
            count,
            width,
            planned.storage,
            region.file.path,
            position,
            scale_position,
            planned.inner,
            planned.gain,
        )


def _worth(weights: Sequence[PlannedWeight | ChannelWeight], workers: int | None) -> int:
    """How many processes."""
    if workers is not None:
        return workers
    values = sum(math.prod(weight.shape) for weight in weights)
    return usable_cpus() if values >= WORTH_PROCESSES else 0


def _sums(
    pieces: Iterable[tuple[str, Piece | ChannelPiece]], names: list[str], workers: int, progress: Progress
) -> dict[str, tuple[float, float]]:
    """Do the pieces; squared error and squared norm of each weight."""
    errors, norms = (dict.fromkeys(names, 0.0) for _ in range(2))
    with contextlib.closing(_process(pieces, workers)) as results:
        for name, done in results:
            errors[name] += done.squared_error
            norms[name] += done.squared_norm
            progress(name, done.values)
    return {name: (errors[name], norms[name]) for name in names}


def _process(pieces: Iterable[tuple[str, Piece | ChannelPiece]], workers: int) -> Generator[tuple[str, Done]]:
    """Each piece's result beside its weight's name, in order."""
    if not workers:
        for name, piece in pieces:
            yield name, process(piece)
        return
    with Workers(workers) as pool:
        yield from pool.map(pieces)


def _report(planned: PlannedWeight, squared_error: float, squared_norm: float) -> Quantized | None:
    storage = planned.storage
    if storage.is_float:
        return None
    return Quantized(
        tensor=planned.name,
        bits=storage.bits,
        block_size=storage.block,
        method=storage.method,
        relative_error=_relative(squared_error, squared_norm),
    )


def _relative(squared_error: float, squared_norm: float) -> float:
    return math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
