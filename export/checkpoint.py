"""Reads a checkpoint's safetensors lazily, some rows at a time, under canonical names; numpy only.

The header of every file is checked before anything is read: a missing tensor, a wrong shape or a truncated
file is found up front, not after minutes of quantizing.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import GemmaEdgeError
from .qat import INPUT_SCALE, OUTPUT_SCALE

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALES_LEFT_OUT = (INPUT_SCALE, OUTPUT_SCALE, ".k_cache_scale", ".v_cache_scale")
HEADER_MAX_BYTES = 100_000_000  # safetensors' own cap
LFS_PREFIX = b"version "  # of the small file that stands for a big one in a Git repository
CHUNK_BYTES = 32 << 20  # of float32 values that are held at a time
PREFIXES = ("model.language_model.", "model.", "")
OTHER_MODALITIES = ("vision_tower.", "vision_embedder.", "embed_vision.")
AUDIO = ("audio_tower.", "embed_audio.")
FLOATS = ("BF16", "F16", "F32")
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1, "I8": 1}


class CheckpointError(GemmaEdgeError):
    """The checkpoint's weights are missing, damaged or of another shape than config.json says."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor's bytes are."""

    file: Path
    offset: int
    dtype: str  # BF16, F16, F32; U8 or I8 for what the checkpoint holds quantized
    shape: tuple[int, ...]
    original_name: str


class Checkpoint:
    """The text model's and the audio encoder's tensors, by canonical name: `layers.0.mlp.up_proj.weight`."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
        self.folder = folder
        self.tensors = tensors

    def require(
        self, shapes: Mapping[str, tuple[int, ...]], integers: Mapping[str, str] | None = None
    ) -> None:
        """Check that every tensor is there in its shape. Raises CheckpointError naming one that is not.

        integers: the types of the tensors that are not floats: U8 or I8.
        """
        for name, shape in shapes.items():
            entry = self.entry(name)
            if entry.shape != shape:
                raise CheckpointError(
                    f"{entry.file}: {entry.original_name} has shape {entry.shape}, "
                    f"config.json asks for {shape}"
                )
            quantized = (integers or {}).get(name)
            if entry.dtype not in ((quantized,) if quantized else FLOATS):
                expected = (
                    f"{quantized} by config.json's quantization_config" if quantized else ", ".join(FLOATS)
                )
                raise CheckpointError(
                    f"{entry.file}: {entry.original_name} is {entry.dtype}, expected {expected}"
                )
        if unused := [name for name in self.tensors if name not in shapes and not _is_dead(name, shapes)]:
            log.warning("%s: %d tensors are not used: %s", self.folder, len(unused), ", ".join(unused[:5]))

    def read(self, name: str) -> np.ndarray:
        """A whole tensor as float32."""
        entry = self.entry(name)
        return read_values(entry, 0, math.prod(entry.shape)).reshape(entry.shape)

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """A matrix (rows, columns) as float32, some rows at a time."""
        entry = self.entry(name)
        count, width = entry.shape
        step = max(1, CHUNK_BYTES // (4 * width))
        for first in range(0, count, step):
            size = min(step, count - first)
            yield read_values(entry, first * width, size * width).reshape(size, width)

    def entry(self, name: str) -> TensorEntry:
        """Raises CheckpointError if there is no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self._expected_in(name)}: tensor {name} is missing; "
                "config.json and the weights do not belong together, or the weights are not all there"
            ) from None

    def _expected_in(self, name: str) -> Path:
        """The file that should have a missing tensor: the index may say which."""
        weight_map = _weight_map(self.folder)
        if weight_map is None:
            return self.folder / SINGLE
        files = [file for original, file in weight_map.items() if _canonical(original) == name]
        return self.folder / (files[0] if files else INDEX)


def read_values(entry: TensorEntry, first: int, count: int) -> np.ndarray:
    """`count` values of a tensor from its value number `first` on, as float32."""
    item = ITEM_BYTES[entry.dtype]
    data = read_bytes(entry, first * item, count * item)
    if entry.dtype == "BF16":  # the upper half of a float32
        bits = np.empty(count, np.uint32)
        np.left_shift(np.frombuffer(data, "<u2"), 16, out=bits, dtype=np.uint32)
        return bits.view(np.float32)
    return np.frombuffer(data, "<f2" if entry.dtype == "F16" else "<f4").astype(np.float32)


def read_bytes(entry: TensorEntry, first: int, count: int) -> bytearray:
    """`count` bytes of a tensor from its byte number `first` on."""
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.offset + first)
            data = _read_all(file, count)
    except OSError as cause:
        raise CheckpointError(
            f"{entry.file}: {entry.original_name} cannot be read ({cause.strerror})"
        ) from cause
    if len(data) != count:
        raise CheckpointError(f"{entry.file}: ends inside {entry.original_name}; download it again")
    return data


def _read_all(file: Any, size: int) -> bytearray:
    """`size` bytes, or all that the file has."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size and (got := file.readinto(view[done:])):
        done += got
    del view
    return data[:done] if done < size else data


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all weight files in `folder`. Raises CheckpointError."""
    tensors: dict[str, TensorEntry] = {}
    for path in weight_files(folder):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; expected {SINGLE} or the files that {INDEX} names")
        for original, entry in _read_header(path):
            name = _canonical(original)
            if name is None:
                continue
            if (other := tensors.get(name)) is not None:
                raise CheckpointError(
                    f"{path}: {original} is also in {other.file.name}, as {other.original_name}; "
                    "remove what is not part of the checkpoint"
                )
            tensors[name] = entry
    return Checkpoint(folder, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, there or not. Raises CheckpointError if the index is damaged."""
    weight_map = _weight_map(folder)
    names = {SINGLE} if weight_map is None else set(weight_map.values())
    return [folder / name for name in sorted(names)]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file, from the index; None if there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as cause:
        raise CheckpointError(
            f"{index}: not an index of weight files ({cause!r}); download it again"
        ) from cause
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is not the name of a file beside it; download it again")
    return weight_map


def _read_header(path: Path) -> Iterable[tuple[str, TensorEntry]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(HEADER_MAX_BYTES, size - 8):
            what = "a Git LFS pointer" if prefix == LFS_PREFIX else "not a whole safetensors file"
            raise CheckpointError(f"{path}: {what} ({size} bytes); download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            entries = [(name, fields) for name, fields in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError) as cause:
            raise CheckpointError(f"{path}: its safetensors header is damaged; download it again") from cause
    for name, fields in entries:
        yield name, _entry(path, name, fields, 8 + length, size)


def _entry(path: Path, name: str, fields: Any, start: int, size: int) -> TensorEntry:
    """A tensor's place, checked. start: of the data in the file; size: of the file."""
    try:
        dtype, shape = str(fields["dtype"]), tuple(int(length) for length in fields["shape"])
        begin, end = (int(position) for position in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as cause:
        raise CheckpointError(
            f"{path}: its safetensors header is damaged at {name}; download it again"
        ) from cause
    if start + end > size:
        raise CheckpointError(
            f"{path}: truncated: {name} ends at byte {start + end}, the file has {size}; download it again"
        )
    item = ITEM_BYTES.get(dtype)
    if min(begin, *shape, 0) < 0 or (item is not None and end - begin != item * math.prod(shape)):
        raise CheckpointError(
            f"{path}: {name} has {end - begin} bytes, its shape {shape} needs another number; "
            "download it again"
        )
    return TensorEntry(path, start + begin, dtype, shape, name)


def _canonical(name: str) -> str | None:
    """The name without its wrapper's prefix; None for a tensor of another modality."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            return None if short.startswith(OTHER_MODALITIES) else short
    return name


def _is_dead(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """In the checkpoint but never read: keys and values of KV-shared layers, a head that is the token table's
    copy, an audio encoder that is left out, and scales that a recipe may leave out.
    """
    if name.endswith(SCALES_LEFT_OUT):
        return True
    if name.startswith(AUDIO):
        return not any(asked.startswith(AUDIO) for asked in shapes)
    dead = (".self_attn.k_proj.", ".self_attn.v_proj.", ".self_attn.k_norm.", ".self_attn.v_norm.")
    return any(part in name for part in dead) or name.startswith("lm_head.")
