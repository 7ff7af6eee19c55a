"""Packed weights that the device wrote for itself: do they fit, and how they are made; no command line.

When ONNX Runtime loads a graph it repacks the weights of every matrix product for this CPU, into memory that
the system cannot take back. A prepared folder holds the same graphs with packed weights beside them, which
are mapped instead:

    BUNDLE/prepared/  prepared.json · decoder.onnx(.data), or its parts · prefill… · audio_encoder_stream…

It is of use to one bundle, one onnxruntime and one kind of CPU, which `prepared.json` names. ONNX Runtime
packs again when it loads, compares, and refuses what differs; so the folder saves memory more than time, and
holds the weights twice. The embedding tables stay where they are.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import onnxruntime as ort

from .aside import written_aside
from .bundle import MANIFEST, Bundle, FileEntry, Struct, sha256_file
from .errors import BundleError, GemmaEdgeError
from .machine import Machine, read_machine
from .strict import decode_json_file

FOLDER = "prepared"
DESCRIPTION = "prepared.json"
FORMAT_VERSION = 1
MIB = 2**20
COPIES = 2.2  # of the weights that are written: as they were, and packed


class PrepareError(GemmaEdgeError):
    """Packed weights cannot be made or written."""


class Key(Struct, frozen=True):
    """What packed weights depend on."""

    manifest_sha256: str
    onnxruntime: str
    machine: str  # as `uname -m` says
    cpus: tuple[str, ...]
    cpu_features: tuple[str, ...]


class Description(Struct, frozen=True):
    """prepared.json."""

    format_version: int
    key: Key
    files: dict[str, FileEntry]


def default_folder(bundle: Bundle) -> Path:
    return bundle.path / FOLDER


def key_of(bundle: Bundle, machine: Machine | None = None) -> Key:
    """The key on this machine."""
    seen = machine or read_machine()
    return Key(
        sha256_file(bundle.path / MANIFEST),
        ort.__version__,
        seen.machine,
        seen.cpus,
        tuple(sorted(seen.cpu_features)),
    )


def graphs(bundle: Bundle) -> list[Path]:
    """What there is to pack: graphs that run on the CPU, with matrix products. Not the embedding tables."""
    plain = dataclasses.replace(bundle, prepared=None)
    manifest, found = bundle.manifest, list[Path]()
    if manifest.runtime.execution_provider == "cpu":
        found += plain.decoder_graphs if manifest.prefill is None else [*plain.decoder_graphs, plain.prefill]
    return found if manifest.audio is None else [*found, plain.audio_encoder_stream]


def misfit(
    bundle: Bundle, folder: Path, machine: Machine | None = None, *, verify_hashes: bool = False
) -> str | None:
    """Why what is in `folder` cannot be used for `bundle` here; None if it can.

    verify_hashes: reads all of it; without, sizes are compared and no weights read.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return f"{folder}: no packed weights there"
    try:
        description = decode_json_file(path, Description, BundleError)
    except BundleError as cause:
        return str(cause)
    if description.format_version != FORMAT_VERSION:
        return f"{folder}: of format {description.format_version}, expected {FORMAT_VERSION}"
    made, here = description.key, key_of(bundle, machine)
    for name in ("manifest_sha256", "onnxruntime", "machine", "cpus"):
        if getattr(made, name) != getattr(here, name):
            theirs, ours = (_short(getattr(key, name)) for key in (made, here))
            return f"{folder}: made for {name} {theirs}, this is {ours}"
    if differing := sorted(set(made.cpu_features) ^ set(here.cpu_features)):
        return f"{folder}: made for another CPU, which differs in {', '.join(differing[:6])}"
    for name, entry in description.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size_bytes:
            return f"{file}: {size} bytes, expected {entry.size_bytes}"
        if verify_hashes and sha256_file(file) != entry.sha256:
            return f"{file}: damaged, its SHA-256 is another"
    if missing := [graph.name for graph in graphs(bundle) if graph.name not in description.files]:
        return f"{folder}: {', '.join(missing)} is missing"
    return None


def make(bundle: Bundle, folder: Path) -> int:
    """Pack, and put the result in place of what is in `folder`; its size in bytes. Raises PrepareError."""
    todo = graphs(bundle)
    if not todo:
        raise PrepareError(
            f"{bundle.path}: made for {bundle.manifest.runtime.execution_provider}, which packs nothing; "
            "there is nothing to prepare"
        )
    _check_destination(folder)
    _check_space(bundle, folder)
    with written_aside(folder, PrepareError) as partial:
        for graph in todo:
            _pack(graph, partial)
        files = {
            path.name: FileEntry(path.stat().st_size, sha256_file(path)) for path in sorted(partial.iterdir())
        }
        description = Description(FORMAT_VERSION, key_of(bundle), files)
        (partial / DESCRIPTION).write_bytes(msgspec.json.format(msgspec.json.encode(description)) + b"\n")
    return sum(entry.size_bytes for entry in files.values())


def _pack(graph: Path, folder: Path) -> None:
    command = [sys.executable, "-m", f"{__package__}.pack", str(graph), str(folder)]
    child = None
    try:
        with _interrupts_held():  # one that came inside Popen would leave a process that nobody knows of
            child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
        _, said = child.communicate()
    except BaseException:
        if child is not None:
            child.kill()
            child.communicate()
        raise
    if child.returncode < 0:
        raise PrepareError(f"{graph}: packing was ended by signal {-child.returncode}; nothing of it is kept")
    if child.returncode or not (folder / graph.name).is_file():
        why = said.strip()[-500:] or f"exit status {child.returncode}"
        raise PrepareError(
            f"{graph}: onnxruntime could not write it packed ({why}); nothing of it is kept: free some "
            "space, or go on without"
        )


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C is heard when the block ends. Only the main thread is ever interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


def _check_destination(folder: Path) -> None:
    """Nothing is replaced but packed weights."""
    if (
        folder.exists()
        and not (folder / DESCRIPTION).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise PrepareError(
            f"{folder}: exists and holds no packed weights, so it is not replaced; choose another"
        )


def _check_space(bundle: Bundle, folder: Path) -> None:
    memory = bundle.manifest.memory
    needed = int(COPIES * (memory.weights_bytes + memory.audio_bytes))
    place = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise PrepareError(
            f"{folder}: packed weights need some {needed // MIB} MiB, the disk has {free // MIB} MiB left; "
            "free some space, choose another folder, or go on without"
        )


def _short(value: str | tuple[str, ...]) -> str:
    return value[:16] if isinstance(value, str) else ", ".join(value[:2])[:60]
