"""Snapshots of caches as files: written aside and renamed, checked when read; damaged ones are dropped.

    GEKV0001 | bytes of the header | BLAKE2b of the header | header, JSON | rows of each buffer

A folder of them belongs to one bundle and one onnxruntime, and is named after both. A file holds what was
said in the prompt, so folder and files are their owner's alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import BufferedReader
from pathlib import Path

import msgspec
import numpy as np
import onnxruntime as ort

from .cache import KvCaches, Rows
from .errors import ConfigError

log = logging.getLogger(__name__)

MAGIC = b"GEKV0001"
DIGEST_BYTES = 32
MOST_HEADER_BYTES = 16 << 20
MOST_WAITING = 4  # snapshots to be written
STALE_S = 3600.0  # an unfinished file so old is nobody's


class Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    shape: tuple[int, int, int]  # kv_heads, rows, head_dim
    dtype: str


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[int, ...]
    tensors: dict[str, Tensor]  # in the order of their bytes
    payload_blake2b: str


class DamagedError(Exception):
    """A file that is not whole."""


class SnapshotFolder:
    """Files by digest of their keys. Writes in a thread of its own; everything else is its owner's thread."""

    def __init__(self, root: Path, manifest_sha256: str, budget_bytes: int) -> None:
        """Raises ConfigError if the folder cannot be used."""
        self.path = root / f"{manifest_sha256[:16]}-onnxruntime-{ort.__version__}"
        self._budget_bytes = budget_bytes
        self._files: dict[str, Future[None] | None] = {}  # digest -> None when it is there
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, "gemma-edge-snapshots")
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for stray in self.path.glob("*.partial*"):
                if time.time() - stray.stat().st_mtime > STALE_S:
                    stray.unlink()
        except OSError as cause:
            raise ConfigError(
                f"{self.path}: cannot keep snapshots there ({cause}); name a folder that can be written to"
            ) from cause

    def load(self, caches: KvCaches) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(digest, keys) of every whole file, the least recently used first; only headers are read."""
        for path in sorted(self.path.glob("*.kv"), key=lambda path: path.stat().st_mtime):
            try:
                with path.open("rb") as file:
                    header = _read_header(file)
                    left = path.stat().st_size - file.tell()
                expected = {
                    name: Tensor(shape, dtype)
                    for name, (shape, dtype) in caches.shapes(len(header.keys)).items()
                }
                if header.tensors != expected or len(header.keys) > caches.context:
                    raise DamagedError("its buffers are not this bundle's")
                if left != sum(_size_bytes(tensor) for tensor in expected.values()):
                    raise DamagedError(f"expected other than {left} bytes after its header")
            except (OSError, DamagedError) as cause:
                self._drop(path, cause)
                continue
            self._files[path.stem] = None
            yield path.stem, header.keys

    def holds(self, digest: str) -> bool:
        with self._lock:
            return digest in self._files

    def save(self, digest: str, keys: tuple[int, ...], rows: Rows) -> None:
        """Write in the background. The least recently used make room; what cannot be written is said."""
        with self._lock:
            waiting = sum(1 for future in self._files.values() if future is not None)
            if digest in self._files:
                return
            if waiting >= MOST_WAITING:
                log.warning("a snapshot of %d tokens is not written: the disk is behind", len(keys))
                return
            self._files[digest] = self._writer.submit(self._write, digest, keys, rows)

    def read(self, digest: str) -> Rows | None:
        """The rows, if the file is whole; otherwise it is dropped."""
        with self._lock:
            future = self._files.get(digest)
        if future is not None:
            future.result()
        path = self._path(digest)
        try:
            with path.open("rb") as file:
                header = _read_header(file)
                rows = _read_rows(file, header)
            os.utime(path)
        except (OSError, DamagedError) as cause:
            self._drop(path, cause)
            return None
        return rows

    def close(self) -> None:
        """Wait for what is being written."""
        with self._lock:
            futures = [future for future in self._files.values() if future is not None]
        wait(futures)

    def _path(self, digest: str) -> Path:
        return self.path / f"{digest}.kv"

    def _write(self, digest: str, keys: tuple[int, ...], rows: Rows) -> None:
        partial = self.path / f"{digest}.partial{os.getpid()}"
        try:
            self._make_room(sum(array.nbytes for array in rows.values()))
            _write_file(partial, keys, rows)
            os.replace(partial, self._path(digest))
            _sync_folder(self.path)
            with self._lock:
                self._files[digest] = None
        except OSError as cause:
            log.warning("%s: a snapshot is not kept: %s", self.path, cause)
            with contextlib.suppress(OSError):
                partial.unlink()
            with self._lock:
                self._files.pop(digest, None)

    def _make_room(self, new_bytes: int) -> None:
        files = sorted(((path.stat(), path) for path in self.path.glob("*.kv")), key=lambda f: f[0].st_mtime)
        total = sum(stat.st_size for stat, _ in files) + new_bytes
        for stat, path in files:
            if total <= self._budget_bytes:
                break
            path.unlink()
            total -= stat.st_size
            with self._lock:
                self._files.pop(path.stem, None)

    def _drop(self, path: Path, cause: Exception) -> None:
        log.warning("%s: dropped, the prompt will be run again: %s", path, cause)
        with self._lock:
            self._files.pop(path.stem, None)
        with contextlib.suppress(OSError):
            path.unlink()


def _write_file(path: Path, keys: tuple[int, ...], rows: Rows) -> None:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for array in rows.values():
        digest.update(array.data)
    tensors = {}
    for name, array in rows.items():
        heads, count, width = array.shape
        tensors[name] = Tensor((heads, count, width), str(array.dtype))
    header = msgspec.json.encode(Header(keys, tensors, digest.hexdigest()))
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(opened, "wb") as file:
        file.write(MAGIC + len(header).to_bytes(8, "little"))
        file.write(hashlib.blake2b(header, digest_size=DIGEST_BYTES).digest() + header)
        for array in rows.values():
            file.write(array.data)
        file.flush()
        os.fsync(file.fileno())


def _read_header(file: BufferedReader) -> Header:
    start = file.read(len(MAGIC) + 8 + DIGEST_BYTES)
    length = int.from_bytes(start[len(MAGIC) : len(MAGIC) + 8], "little")
    if start[: len(MAGIC)] != MAGIC or length > MOST_HEADER_BYTES:
        raise DamagedError(f"expected a snapshot ({MAGIC.decode()}), got {start[: len(MAGIC)]!r}")
    header = file.read(length)
    if hashlib.blake2b(header, digest_size=DIGEST_BYTES).digest() != start[len(MAGIC) + 8 :]:
        raise DamagedError("its header's checksum differs")
    try:
        return msgspec.json.decode(header, type=Header)
    except msgspec.DecodeError as cause:
        raise DamagedError(f"its header is of another version ({cause})") from cause


def _read_rows(file: BufferedReader, header: Header) -> Rows:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    rows: Rows = {}
    for name, tensor in header.tensors.items():
        array = np.empty(tensor.shape, tensor.dtype)
        if file.readinto(array.data.cast("B")) != array.nbytes:
            raise DamagedError("it ends early")
        digest.update(array.data)
        rows[name] = array
    if digest.hexdigest() != header.payload_blake2b:
        raise DamagedError("its checksum differs")
    return rows


def _size_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
