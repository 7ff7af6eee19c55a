"""Memory on huge pages: the same bytes, and nothing where the system has none."""

from __future__ import annotations

import mmap
from pathlib import Path

from gemma_edge.runtime import huge_pages

MIB = 1 << 20


def huge_kib() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("AnonHugePages"))


def test_memory_is_moved_and_keeps_its_bytes() -> None:
    size_bytes = huge_pages.huge_page_bytes()
    if not size_bytes:
        assert huge_pages.start(1 << 40) is None
        return
    with mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        pattern = bytes(range(251)) * (16 * MIB // 251)
        memory[: len(pattern)] = pattern
        before = huge_kib()
        moved = huge_pages.collapse(size_bytes)
        assert memory[: len(pattern)] == pattern
        if moved:  # an older kernel moves nothing, and says so
            assert moved >= 12 * MIB
            assert huge_kib() - before >= 12 << 10


def test_memory_that_is_not_there_is_not_made() -> None:
    size_bytes = huge_pages.huge_page_bytes()
    with mmap.mmap(-1, 16 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for offset in range(0, 16 * MIB, 16384):  # a quarter of the pages
            memory[offset] = 1
        found = huge_pages._candidates(size_bytes or 2 * MIB)
        address = _address(memory)
        assert not [piece for piece in found if address <= piece < address + 16 * MIB]


def test_a_small_model_is_left_where_it_is() -> None:
    assert huge_pages.start(huge_pages.WORTH_BYTES - 1) is None


def _address(memory: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
