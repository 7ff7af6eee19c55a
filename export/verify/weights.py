"""Every weight of a bundle against the checkpoint's, read back from the bundle's files; nothing is run.

Two things are asked of a quantized matrix: that its error is what the manifest says, and that every weight
sits at the level nearest to it under its block's scale. The second finds one changed level among millions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...runtime.bundle import Bundle
from ...runtime.errors import BundleError, GemmaEdgeError
from ..quantize import CHANNEL_LEVELS, TINY_SCALE, unpack
from .limits import PREFILL_BITS
from .tensors import SourceWeights

LEVEL_SLACK = 1e-3  # of a level: how far from half way a weight may be rounded to the farther side
SUFFIXES = (".blocks", ".rows", ".levels", ".channel_scales", ".scales")
PREFILL_PRODUCT = "MatMulIntegerToFloat"
THREADS = 2


class UnknownStorage(GemmaEdgeError):
    """The bundle stores a weight in a way this version cannot read back."""


@dataclass(frozen=True)
class WeightCheck:
    """One tensor."""

    name: str
    bits: int  # 32 or 16 for float
    relative_error: float  # |W - Wq| / |W|
    claimed: float | None  # by the manifest; None for float
    misplaced: (
        int  # weights that are not at the nearest level; for float ones, that are not the rounded value
    )


@dataclass(frozen=True)
class _Stored:
    """Where a tensor is in the bundle."""

    name: str
    bits: int
    block: int  # 0 for float
    data: ir.Value
    scales: ir.Value | None
    is_prefill: bool = False  # int8 (width, rows), one scale a row

    @property
    def key(self) -> str:
        return f"{self.name} of prefill" if self.is_prefill else self.name


def check_weights(
    bundle: Bundle, source: SourceWeights, progress: Callable[[str], None] = lambda _: None
) -> list[WeightCheck]:
    """All tensors that bundle and checkpoint both have, tables first. Raises UnknownStorage."""
    prefill = bundle.manifest.prefill
    claims = {entry.tensor: entry for entry in bundle.manifest.quantization}
    claims |= {f"{entry.tensor} of prefill": entry for entry in (prefill.quantization if prefill else ())}
    checks: dict[str, WeightCheck] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name in sorted(bundle.manifest.files, key=lambda name: name != bundle.embeddings.name):
            if not name.endswith(".onnx"):
                continue
            for stored in _stored(ir.load(bundle.path / name)):
                if stored.key in checks or not _is_comparable(stored, source):
                    continue
                progress(stored.key)
                claim = claims.get(stored.key)
                error, misplaced = _compare(stored, source, pool)
                claimed = None if claim is None else claim.relative_error
                checks[stored.key] = WeightCheck(stored.key, stored.bits, error, claimed, misplaced)
    if missing := sorted(claims.keys() - checks.keys()):
        raise UnknownStorage(
            f"{bundle.path}: the manifest lists {missing[0]} as quantized, but graphs and checkpoint do not "
            "both have it; verify with the version of gemma-edge that made the bundle"
        )
    return list(checks.values())


def _stored(model: ir.Model) -> Iterator[_Stored]:
    """Quantized matrices by the operators that read them, then the float tensors."""
    quantized: set[str] = set()
    for node in model.graph:
        if node.op_type == PREFILL_PRODUCT:
            levels, channels = node.inputs[1], node.inputs[3]
            assert levels is not None and channels is not None and levels.name and channels.name
            quantized |= {levels.name, channels.name}
            yield _Stored(_canonical(levels.name), PREFILL_BITS, 0, levels, channels, is_prefill=True)
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        data, scales = (
            (node.inputs[1], node.inputs[2])
            if node.op_type == "MatMulNBits"
            else (
                node.inputs[0],
                node.inputs[2],
            )
        )
        assert data is not None and scales is not None and data.name is not None and scales.name is not None
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            raise UnknownStorage(
                f"{data.name} has zero points of its own; only symmetric weights can be verified"
            )
        quantized |= {data.name, scales.name}
        yield _Stored(
            _canonical(data.name), _integer(node, "bits"), _integer(node, "block_size"), data, scales
        )
    for name, value in model.graph.initializers.items():
        if name not in quantized and value.const_value is not None:
            bits = 8 * value.const_value.dtype.itemsize
            yield _Stored(name, int(bits), 0, value, None)


def _is_comparable(stored: _Stored, source: SourceWeights) -> bool:
    """Not the graphs' constants, which are not in the checkpoint, nor tensors stored in another shape."""
    shape, data = source.shape(stored.name), stored.data.const_value
    if shape is None or data is None:
        return False
    return stored.is_prefill or bool(stored.block) or math.prod(shape) == data.size


def _canonical(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def _integer(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()


def _compare(stored: _Stored, source: SourceWeights, pool: ThreadPoolExecutor) -> tuple[float, int]:
    """Relative error, and how many weights are not where they belong."""
    squared_error = squared_norm = 0.0
    misplaced = 0
    for error, norm, wrong in _in_order(pool, _tasks(stored, source)):
        squared_error, squared_norm, misplaced = squared_error + error, squared_norm + norm, misplaced + wrong
    if not squared_norm:
        return (math.inf if squared_error else 0.0), misplaced
    return math.sqrt(squared_error / squared_norm), misplaced


Sums = tuple[float, float, int]  # squared error, squared norm, misplaced


def _tasks(stored: _Stored, source: SourceWeights) -> Iterator[Callable[[], Sums]]:
    shape = source.shape(stored.name)
    assert shape is not None
    if stored.is_prefill:
        yield from _prefill_tasks(stored, source)
        return
    if len(shape) != 2:
        yield _bound(_compare_float, source.read(stored.name), _Bytes(stored.data, 1).read(0, 1))
        return
    data = _Bytes(stored.data, shape[0])
    scales = None if stored.scales is None else _Bytes(stored.scales, shape[0])
    first = 0
    for rows in source.rows(stored.name):
        part = first, len(rows)
        if scales is None:
            yield _bound(_compare_float, rows, data.read(*part))
        else:
            yield _bound(
                _compare_blocks, rows, data.read(*part), scales.read(*part), stored.bits, stored.block
            )
        first += len(rows)


def _prefill_tasks(stored: _Stored, source: SourceWeights) -> Iterator[Callable[[], Sums]]:
    """The stored matrix is the transposed one, maybe of the first rows only."""
    levels, scales = stored.data.const_value, stored.scales.const_value if stored.scales else None
    assert isinstance(levels, ir.ExternalTensor) and scales is not None
    width, outputs = levels.shape.numpy()
    columns = np.memmap(levels.path, np.int8, "r", levels.offset or 0, (int(width), int(outputs)))
    factors = scales.numpy()
    first = 0
    for rows in source.rows(stored.name):
        count = min(len(rows), int(outputs) - first)
        if count <= 0:
            return
        part = slice(first, first + count)
        yield _bound(_compare_channels, rows[:count], columns[:, part].T, factors[part])
        first += count


class _Bytes:
    """A tensor of the bundle, some rows at a time. Read, not mapped: mapped pages and files would pile up."""

    def __init__(self, value: ir.Value, rows: int) -> None:
        assert value.const_value is not None
        self._tensor, self._rows = value.const_value, rows

    def read(self, first: int, count: int) -> np.ndarray:
        """(count, values in a row)"""
        tensor = self._tensor
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor.numpy().reshape(self._rows, -1)[first : first + count]
        dtype, width = tensor.dtype.numpy(), tensor.size // self._rows
        offset = (tensor.offset or 0) + first * width * dtype.itemsize
        found = np.fromfile(tensor.path, dtype, count * width, offset=offset)
        if found.size != count * width:
            raise BundleError(f"{tensor.path}: ends inside {tensor.name}; copy the bundle again")
        return found.reshape(count, width)


def _bound(compare: Callable[..., Sums], *arguments: object) -> Callable[[], Sums]:
    return lambda: compare(*arguments)


def _compare_float(wanted: np.ndarray, found: np.ndarray) -> Sums:
    rounded = wanted.reshape(found.shape).astype(found.dtype)
    error = np.square(found.astype(np.float32) - wanted.reshape(found.shape), dtype=np.float64).sum()
    norm = np.square(wanted, dtype=np.float64).sum()
    return float(error), float(norm), int(np.count_nonzero(rounded != found))


def _compare_blocks(
    wanted: np.ndarray, packed: np.ndarray, scales: np.ndarray, bits: int, block: int
) -> Sums:
    """wanted (rows, width) float32 against packed (rows, bytes) and scales (rows, blocks)."""
    rows, width = wanted.shape
    zero = 2 ** (bits - 1)
    levels = unpack(packed, bits).astype(np.float32) - np.float32(zero)
    padding = levels.shape[1] - width
    padded = np.pad(wanted, ((0, 0), (0, padding))) if padding else wanted
    levels, blocks = levels.reshape(rows, -1, block), padded.reshape(rows, -1, block)
    scales = scales.astype(np.float32)[:, :, None]
    error = float(np.square(blocks - levels * scales, dtype=np.float64).sum())
    norm = float(np.square(wanted, dtype=np.float64).sum())
    # In units of the scale; a block of zeros has no scale, and its levels do not matter.
    used = np.abs(scales) > TINY_SCALE
    exact = np.divide(blocks, scales, out=levels.copy(), where=np.broadcast_to(used, blocks.shape))
    np.clip(exact, -zero, zero - 1, out=exact)
    np.subtract(exact, levels, out=exact)
    misplaced = int(np.count_nonzero(np.abs(exact, out=exact) > 0.5 + LEVEL_SLACK))
    return error, norm, misplaced


def _compare_channels(wanted: np.ndarray, levels: np.ndarray, scales: np.ndarray) -> Sums:
    """wanted (rows, width) float32 against levels (rows, width) int8 and scales (rows,)."""
    found = levels.astype(np.float32)
    error = float(np.square(wanted - found * scales[:, None], dtype=np.float64).sum())
    norm = float(np.square(wanted, dtype=np.float64).sum())
    used = (np.abs(scales) > TINY_SCALE)[:, None]
    exact = np.divide(wanted, scales[:, None], out=found.copy(), where=np.broadcast_to(used, found.shape))
    np.clip(exact, -CHANNEL_LEVELS, CHANNEL_LEVELS, out=exact)
    return error, norm, int(np.count_nonzero(np.abs(exact - found) > 0.5 + LEVEL_SLACK))


def _in_order(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], Sums]]) -> Iterator[Sums]:
    """Results of `tasks`, of which few are read ahead: each holds some megabytes."""
    running: deque[Future[Sums]] = deque()
    for task in tasks:
        running.append(pool.submit(task))
        if len(running) > THREADS:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
