"""Has a graph's weights read from the disk ahead of ONNX Runtime, which waits for every page that it packs.

Only a start whose files are not in memory gains: the disk works while the processor packs. Linux.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

STATM, MEMINFO = Path("/proc/self/statm"), Path("/proc/meminfo")
PIECE_BYTES = 4 << 20
PAUSE_S = 0.005


@contextmanager
def read_ahead(graph: Path) -> Iterator[None]:
    """While the block loads `graph`, its weights are read in the order of the file; ends with the block."""
    weights = graph.with_name(graph.name + ".data")
    if not hasattr(os, "posix_fadvise") or not MEMINFO.exists() or not weights.is_file():
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_read, args=(weights, ended), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(weights: Path, ended: threading.Event) -> int:
    """Ask for piece after piece, until `ended`; how many bytes were asked for.

    Where memory is short, what is read too early is dropped before it is used: so not further ahead of ONNX
    Runtime than half of what is available. How far that is shows in the memory of this process, at least
    half of it: what was read is mapped, or packed, and an original is let go of.
    """
    begin, most, offset = _resident_bytes(), _available_bytes() // 2, 0
    try:
        descriptor = os.open(weights, os.O_RDONLY)
    except OSError as cause:  # ONNX Runtime will say it
        log.debug("%s: not read ahead (%s)", weights, cause)
        return 0
    try:
        size_bytes = os.fstat(descriptor).st_size
        while offset < size_bytes and not ended.is_set():
            if offset - (_resident_bytes() - begin) > most:
                ended.wait(PAUSE_S)
                continue
            os.posix_fadvise(descriptor, offset, PIECE_BYTES, os.POSIX_FADV_WILLNEED)
            offset = min(offset + PIECE_BYTES, size_bytes)
    except OSError as cause:  # a file system without it
        log.debug("%s: not read ahead (%s)", weights, cause)
    finally:
        os.close(descriptor)
    return offset


def _resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def _available_bytes() -> int:
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
