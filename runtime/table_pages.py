"""Gives the pages of mapped embedding tables back while a session runs; knows the mapping, not the tables.

A row takes two or three pages, and Linux maps 16 around each: a prompt of 1,024 tokens has 200 MB of tables
that are never read again. Given back they stay in the page cache, where the system takes them first, and do
not count as memory of this process. Linux; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .residency import MAPS

log = logging.getLogger(__name__)

ROWS = 256  # looked up between two times; giving back takes 0.4 ms
_MADV_DONTNEED = 4

Range = tuple[int, int]  # address, bytes


class TablePages:
    """The mappings that one session has of one file: they live as long as it does."""

    def __init__(self) -> None:
        self.ranges: tuple[Range, ...] = ()
        self._rows = 0

    def looked_up(self, rows: int) -> None:
        """So many rows were read: now and then their pages are given back."""
        self._rows += rows
        if self._rows >= ROWS:
            self._rows = 0
            self.give_back()

    def give_back(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for start, length in self.ranges:
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED):
                log.debug("tables: their pages stay, errno %d (locked?)", ctypes.get_errno())
                self.ranges = ()
                return


@contextmanager
def mapped_meanwhile(path: Path) -> Iterator[TablePages]:
    """What the block maps of `path`; known when it ends.

    For files that are only read: a page that was written would be the file's again.
    """
    pages = TablePages()
    before = _mappings(path)
    yield pages
    pages.ranges = tuple(sorted(_mappings(path) - before))


def _mappings(path: Path) -> set[Range]:
    """This process's, of one file."""
    wanted, found = str(path.resolve()), set[Range]()
    if MAPS.exists():
        for line in MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == wanted:
                start, end = (int(number, 16) for number in fields[0].split("-"))
                found.add((start, end - start))
    return found
