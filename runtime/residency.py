"""How mapped weights stay in memory: paged in when they are needed, at the start, or for good. Linux.

ONNX Runtime maps weights privately and writable, though it never writes: so pages are read in (a write would
copy them), and locked as they come.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

from .bundle import Residency

log = logging.getLogger(__name__)

MAPS = Path("/proc/self/maps")
MIB = 2**20
_MADV_POPULATE_READ = 22  # Linux 5.14
_MLOCK_ONFAULT = 1


def keep(folder: Path, residency: Residency) -> int:
    """Apply to everything that this process maps from `folder`; the bytes it was applied to.

    What the system refuses is logged: the weights are then paged in when they are needed.
    """
    if residency == "map":
        return 0
    if not MAPS.exists():
        log.warning(
            "residency %s: this system does not tell what is mapped; weights come when needed", residency
        )
        return 0
    ranges = list(mapped(folder))
    size_bytes = sum(length for _, length in ranges)
    libc = ctypes.CDLL(None, use_errno=True)
    if residency == "lock":
        try:
            _each(ranges, lambda start, length: libc.mlock2(start, length, _MLOCK_ONFAULT))
        except (OSError, AttributeError) as cause:
            limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
            has = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit // MIB} MiB"
            log.warning(
                "residency lock: %d MiB of weights are not locked (%s); the limit is %s: raise it with "
                "`ulimit -l` or systemd's LimitMEMLOCK=",
                size_bytes // MIB,
                cause,
                has,
            )
    try:
        _each(ranges, lambda start, length: libc.madvise(start, length, _MADV_POPULATE_READ))
    except OSError as cause:
        log.info("residency %s: read into the page cache only (%s)", residency, cause)
        _read_through(folder)
    return size_bytes


def mapped(folder: Path) -> Iterator[tuple[int, int]]:
    """(address, bytes) of this process's mappings of files in `folder`."""
    prefix = f"{folder.resolve()}/"
    for line in MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(prefix):
            start, end = (int(number, 16) for number in fields[0].split("-"))
            yield start, end - start


def _each(ranges: list[tuple[int, int]], call: Callable[[ctypes.c_void_p, ctypes.c_size_t], int]) -> None:
    for start, length in ranges:
        if call(ctypes.c_void_p(start), ctypes.c_size_t(length)) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _read_through(folder: Path) -> None:
    for path in folder.glob("*.data"):
        with path.open("rb") as file:
            while file.read(MIB):
                pass
