"""Mapped pages that are given back: which mappings are meant, that they come back, answers as before."""

from __future__ import annotations

import mmap
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.runtime import mapped_pages
from gemma_edge.runtime.mapped_pages import ROWS, MappedPages, mapped_meanwhile
from gemma_edge.runtime.prepared import make
from gemma_edge.runtime.session import Session


def pages_of(path: Path, field: str) -> int:
    """KiB of this process's mappings of `path`: Rss, or Anonymous, which were written."""
    found, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(f" {path.resolve()}")
        elif ours and line.startswith(f"{field}:"):
            found += int(line.split()[1])
    return found


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)


def test_pages_go_and_come_back(tmp_path: Path):
    path, text = tmp_path / "table with spaces", np.random.default_rng(0).bytes(1 << 20)
    path.write_bytes(text)
    with mapped_meanwhile(path) as pages:
        view = mapped(path)
    assert [length for _, length in pages.ranges] == [1 << 20]
    assert view[:] == text and pages_of(path, "Rss") == 1024
    pages.looked_up(ROWS - 1)
    assert pages_of(path, "Rss") == 1024
    pages.looked_up(1)
    assert pages_of(path, "Rss") == 0
    assert view[:] == text


def test_only_what_the_block_mapped(tmp_path: Path):
    path, other = tmp_path / "table", tmp_path / "other"
    for file in (path, other):
        file.write_bytes(bytes(1 << 16))
    first = mapped(path)
    with mapped_meanwhile(path) as pages:
        second, third = mapped(path), mapped(other)
    assert len(first[:]) == len(second[:]) == len(third[:])
    pages.give_back()
    assert (pages_of(path, "Rss"), pages_of(other, "Rss")) == (64, 64)


def test_without_proc_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mapped_pages, "MAPS", tmp_path / "maps")
    with mapped_meanwhile(tmp_path / "table") as pages:
        pass
    pages.looked_up(ROWS)
    assert pages.ranges == ()


def test_what_the_system_refuses_is_not_tried_again(tmp_path: Path):
    pages = MappedPages()
    pages.ranges = ((4096 + 1, 4096),)  # not at a page's beginning
    pages.looked_up(ROWS)
    assert pages.ranges == ()


def test_a_session_gives_its_tables_back(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch):
    """Prompts and steps, both; and the tables are only read, as giving back needs it."""
    monkeypatch.setattr(mapped_pages, "ROWS", 8)
    bundle = tiny_bundle(recipe="int4").bundle
    table = bundle.embeddings.with_suffix(".onnx.data")
    kept, session = Session(bundle), Session(bundle)
    assert session._tables.ranges and not set(session._tables.ranges) & set(kept._tables.ranges)
    kept._tables.ranges = ()
    ids = np.random.default_rng(1).integers(23, 500, 40)
    for one in (kept, session):
        for start in range(0, 32, 16):
            one.prefill(ids[start : start + 16], start, last=start == 16)
    assert np.array_equal(kept.logits, session.logits)
    held = pages_of(table, "Rss")
    for position in range(32, 40):
        for one in (kept, session):
            one.step(int(ids[position]), position)
        assert np.array_equal(kept.logits, session.logits)
    assert pages_of(table, "Rss") <= held  # the eighth step gave back
    assert pages_of(table, "Anonymous") == 0


def test_prompts_and_answers_take_turns(tiny_bundle: Any, tmp_path: Path):
    """With packed weights from a file: those of a prompt are back when it ends, and nothing is different."""
    plain = tiny_bundle(recipe="int4", prefill="int8").bundle
    make(plain, tmp_path / "prepared")
    bundle = replace(plain, prepared=tmp_path / "prepared")
    prompts, decoder = (Path(f"{graph}.data") for graph in (bundle.prefill, bundle.decoder))
    session, own = Session(bundle), Session(plain)
    assert pages_of(prompts, "Rss") == 0 < pages_of(decoder, "Rss")
    assert session._prompt_pages.size_bytes > 0
    ids = np.random.default_rng(2).integers(23, 500, 40)
    for start in range(0, 32, 16):
        for one in (session, own):
            one.prefill(ids[start : start + 16], start, last=start == 16)
        assert (pages_of(prompts, "Rss") > 0) == (start == 0)
    assert np.array_equal(session.logits, own.logits)
    for position in range(32, 40):
        for one in (session, own):
            one.step(int(ids[position]), position)
        assert np.array_equal(session.logits, own.logits)
    assert pages_of(prompts, "Anonymous") == pages_of(decoder, "Anonymous") == 0


def test_a_short_prompt_gives_back_a_share(tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch):
    """As large a share of the decoder's pages as the prompt is of a chunk: mapping them again takes time."""
    session = Session(tiny_bundle(recipe="int4", prefill="int8").bundle)
    session._prompt_pages.ranges = ((0, 16 << 20),)
    given: list[int] = []
    monkeypatch.setattr(session._decoder_pages, "give_back", given.append)
    monkeypatch.setattr(session._prompt_pages, "give_back", lambda: None)
    ids = np.random.default_rng(3).integers(23, 500, 16)
    session.prefill(ids[:9], 0, last=True)  # the last row is the decoder's
    session.prefill(ids, 0, last=False)
    session.prefill(ids[:4], 16, last=True)  # too few for the prefill graph
    assert session.chunk == 16 and given == [8 << 20, 16 << 20]


def test_as_many_as_are_wanted(tmp_path: Path):
    """Counted is what was resident: the second file is mapped, and nobody has read it."""
    paths = [tmp_path / name for name in ("first", "unread", "third", "fourth")]
    pages, views = MappedPages(), list[mmap.mmap]()
    for path in paths:
        path.write_bytes(bytes(8 << 20))
        with mapped_meanwhile(path) as one:
            views.append(mapped(path))
        pages.ranges += one.ranges
    assert sum(len(view[:]) for view in (views[0], *views[2:])) == 24 << 20 and pages.size_bytes == 32 << 20
    pages.give_back(12 << 20)
    assert [pages_of(path, "Rss") for path in paths] == [0, 0, 0, 8 << 10]
