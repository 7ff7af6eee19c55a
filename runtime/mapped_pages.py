"""Gives pages of mapped weights and tables back while a session runs; knows mappings, not what is in them.

Given back, they stay in the page cache, where the system takes them first, and do not count as memory of
this process; touched again, they are mapped again, 16 and more at a time. Two uses:
- Embedding tables. A row takes two or three pages, and Linux maps 16 around each: a prompt of 1,024 tokens
  has 200 MB of tables that are never read again.
- Packed weights from a file (`prepared`). Prompts and answers run different graphs, so the weights of the
  one take the place of the other's. Packed in memory, they are not mapped, and nothing happens.
Linux; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .residency import MAPS

log = logging.getLogger(__name__)

STATM = Path("/proc/self/statm")
ROWS = 256  # of tables, looked up between two times; giving back takes 0.4 ms
_MADV_DONTNEED = 4

Range = tuple[int, int]  # address, bytes


class MappedPages:
    """The mappings that sessions have of their files: they live as long as those do."""

    def __init__(self) -> None:
        self.ranges: tuple[Range, ...] = ()
        self._rows = 0

    @property
    def size_bytes(self) -> int:
        return sum(length for _, length in self.ranges)

    def looked_up(self, rows: int) -> None:
        """So many rows of a table were read: now and then its pages are given back."""
        self._rows += rows
        if self._rows >= ROWS:
            self._rows = 0
            self.give_back()

    def give_back(self, least_bytes: int | None = None) -> None:
        """All of them, or the first ones until at least so much less is resident.

        A mapping's length would not do: of rotary tables, as large as the context, a few rows are ever there.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        goal = None if least_bytes is None or not self.ranges else _resident_bytes() - least_bytes
        for start, length in self.ranges:
            if goal is not None and _resident_bytes() <= goal:
                return
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED):
                log.debug("mapped pages stay, errno %d (locked?)", ctypes.get_errno())
                self.ranges = ()
                return


def _resident_bytes() -> int:
    """Of files, in this process; the kernel's figure, which may lag some hundred KiB behind."""
    return int(STATM.read_text().split()[2]) * os.sysconf("SC_PAGESIZE")


_opening: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def mapped_meanwhile(*paths: Path) -> Iterator[MappedPages]:
    """What the block maps of these files; known when it ends.

    One block a file at a time, or it would see another's. For files that are only read: a page that was
    written would be the file's again.
    """
    pages, files = MappedPages(), sorted({path.resolve() for path in paths})
    with ExitStack() as stack:
        for path in files:  # sorted: two blocks never wait for each other
            stack.enter_context(_opening[path])
        before = _mappings(files)
        yield pages
        pages.ranges = tuple(sorted(_mappings(files) - before))


def _mappings(files: Sequence[Path]) -> set[Range]:
    """This process's, of these files."""
    wanted, found = {str(path) for path in files}, set[Range]()
    if MAPS.exists():
        for line in MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted:
                start, end = (int(number, 16) for number in fields[0].split("-"))
                found.add((start, end - start))
    return found
