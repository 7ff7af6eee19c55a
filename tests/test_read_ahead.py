"""Weights are asked for in the order of the file while a graph loads: all, and not too far ahead."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from gemma_edge.runtime import read_ahead
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.read_ahead import PIECE_BYTES
from gemma_edge.runtime.session import Session, open_graph

Asked = list[tuple[int, int]]  # offset, bytes


class Pauses(threading.Event):
    """Ends at the third pause."""

    count = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.count += 1
        if self.count == 3:
            self.set()
        return self.is_set()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the system was asked to read; nothing else is replaced."""
    seen: Asked = []
    real = os.posix_fadvise

    def note(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        seen.append((offset, length))
        real(descriptor, offset, length, advice)

    monkeypatch.setattr(read_ahead.os, "posix_fadvise", note)
    return seen


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A file of two and a half pieces, with holes."""
    path = tmp_path / "decoder.onnx.data"
    path.touch()
    os.truncate(path, 5 * PIECE_BYTES // 2)
    return path


def test_all_of_a_file_is_asked_for_in_its_order(weights: Path, asked: Asked):
    assert read_ahead._read(weights, threading.Event()) == weights.stat().st_size
    assert asked == [(piece * PIECE_BYTES, PIECE_BYTES) for piece in range(3)]


def test_it_waits_while_it_is_too_far_ahead(weights: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read_ahead, "_available_bytes", lambda: 2 * PIECE_BYTES)
    resident = [100, 100, 100]  # nothing was loaded so far
    monkeypatch.setattr(read_ahead, "_resident_bytes", lambda: resident.pop() if resident else 100)
    pauses = Pauses()
    assert read_ahead._read(weights, pauses) == 2 * PIECE_BYTES
    assert pauses.count == 3 and len(asked) == 2


def test_it_goes_on_when_that_was_loaded(weights: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(read_ahead, "_available_bytes", lambda: 2 * PIECE_BYTES)
    monkeypatch.setattr(read_ahead, "_resident_bytes", lambda: 100 + PIECE_BYTES * len(asked))
    pauses = Pauses()
    assert read_ahead._read(weights, pauses) == weights.stat().st_size
    assert pauses.count == 0


def test_it_ends_with_the_load(weights: Path, asked: Asked):
    ended = threading.Event()
    ended.set()
    assert read_ahead._read(weights, ended) == 0 and not asked


def test_a_file_that_cannot_be_opened_is_left_to_who_loads_it(tmp_path: Path):
    assert read_ahead._read(tmp_path / "decoder.onnx.data", threading.Event()) == 0


def test_memory_is_told_in_bytes():
    total = os.sysconf("SC_PAGESIZE") * os.sysconf("SC_PHYS_PAGES")
    assert PIECE_BYTES < read_ahead._resident_bytes() < total
    assert 0 < read_ahead._available_bytes() <= total


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def test_the_thread_ends_with_the_block(weights: Path):
    graph = weights.with_suffix("")
    with pytest.raises(ValueError), read_ahead.read_ahead(graph):
        raise ValueError
    assert "read-ahead" not in threads()
    with read_ahead.read_ahead(graph.with_name("other.onnx")):  # has no file of weights
        assert "read-ahead" not in threads()


def test_a_session_reads_what_it_packs_and_no_tables(tiny_bundle, monkeypatch: pytest.MonkeyPatch):
    bundle, read = tiny_bundle(context=192, chunk=16).bundle, list[str]()
    assert bundle.embeddings.with_name("embeddings.onnx.data").is_file()
    monkeypatch.setattr(read_ahead, "_read", lambda weights, ended: read.append(weights.name))
    Session(bundle, threads=1)
    assert read == ["decoder.onnx.data"]


def test_a_graph_that_does_not_load_leaves_no_thread(weights: Path):
    graph = weights.with_suffix("")
    graph.write_bytes(b"damage")
    with pytest.raises(BundleError, match="cannot load it"):
        open_graph(graph, 1, "cpu")
    assert "read-ahead" not in threads()
