"""Moves a process's big anonymous memory onto huge pages, in the background; where there are none, nothing.

A decode step reads every weight once, and with pages of 4 KiB looking addresses up and the end of what the
processor prefetches cost a tenth or more of its time (docs/decisions.md). Weights that ONNX Runtime repacked
lie in ordinary memory, so that Linux can move them (MADV_COLLAPSE, since 6.1). What is mapped stays.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
PAGE_BYTES = 4096  # where this is larger, so are the units of address translation
PRESENT = np.uint64(63)  # the bit of a page's entry
LEAST_PRESENT = 0.75  # of a huge page's pages; the rest would be new memory
WORTH_BYTES = 256 << 20  # of weights; smaller models live in caches
_MADV_COLLAPSE = 25


def start(weights_bytes: int) -> threading.Thread | None:
    """Begin moving; the thread, or None where there is nothing to gain."""
    size_bytes = huge_page_bytes()
    if weights_bytes < WORTH_BYTES or not size_bytes:
        return None
    thread = threading.Thread(target=collapse, args=(size_bytes,), name="huge-pages", daemon=True)
    thread.start()
    return thread


def huge_page_bytes() -> int:
    """The size of a huge page, 0 where the system has none for ordinary memory."""
    try:
        enabled = (SETTINGS / "enabled").read_text()
        size_bytes = int((SETTINGS / "hpage_pmd_size").read_text())
        small = ctypes.CDLL(None).getpagesize() == PAGE_BYTES
    except (OSError, ValueError, AttributeError):
        return 0
    return 0 if "[never]" in enabled or not small else size_bytes


def collapse(size_bytes: int) -> int:
    """Move all that is mostly present; the bytes moved."""
    libc = ctypes.CDLL(None, use_errno=True)
    moved = refused = 0
    for address in list(_candidates(size_bytes)):
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), _MADV_COLLAPSE) == 0:
            moved += size_bytes
            continue
        if ctypes.get_errno() == errno.EINVAL and not moved:
            log.debug("huge pages: this kernel cannot move memory onto them")
            return 0
        refused += size_bytes  # freed meanwhile, or no free huge page
    log.debug("huge pages: %d MiB moved, %d MiB not", moved >> 20, refused >> 20)
    return moved


def _candidates(size_bytes: int) -> Iterator[int]:
    """Addresses of aligned pieces of private, writable, anonymous memory that is mostly present."""
    count = size_bytes // PAGE_BYTES
    with PAGEMAP.open("rb", buffering=0) as pagemap:
        for start, end in _anonymous():
            first, last = -(-start // size_bytes) * size_bytes, end // size_bytes * size_bytes
            if last <= first:
                continue
            pagemap.seek(first // PAGE_BYTES * 8)
            entries = np.frombuffer(pagemap.read((last - first) // PAGE_BYTES * 8), np.uint64)
            entries = entries[: len(entries) // count * count].reshape(-1, count)
            present = (entries >> PRESENT).sum(axis=1)
            for piece in np.flatnonzero(present >= LEAST_PRESENT * count):
                yield first + int(piece) * size_bytes


def _anonymous() -> Iterator[tuple[int, int]]:
    for line in MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        if found := re.match(r"(\w+)-(\w+) rw.p \w+ 00:00 0\s*(\[heap\])?$", line):
            yield int(found[1], 16), int(found[2], 16)
