"""Snapshots on disk: there after a restart, of this bundle alone, private, and never damaged ones."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gemma_edge.runtime import snapshot_files
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.errors import ConfigError

from .support.tiny_bundles import TinyBundle
from .test_prefix import CHUNK, CONTEXT, MARK, PLENTY, answer, endless, ids_of, open_engine, reused

SYSTEM = [*ids_of(60), MARK]


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def expected(tiny: TinyBundle) -> list[int]:
    return answer(endless(Engine(tiny.bundle)), [*SYSTEM, 40, 41])


def filled(tiny: TinyBundle, folder: Path) -> Path:
    """The one file that an engine leaves in `folder` after a prompt with a system turn."""
    engine = open_engine(tiny, folder=folder)
    answer(engine, SYSTEM + ids_of(20, seed=3))
    answer(engine, ids_of(80, seed=4))  # a conversation's end is for this process only
    engine.close()
    (file,) = folder.glob("*/*")
    return file


def test_a_system_turn_outlives_the_process(tiny: TinyBundle, expected: list[int], tmp_path: Path):
    file = filled(tiny, tmp_path)
    written = file.stat().st_mtime_ns
    os.utime(file, (1, 1))
    later = open_engine(tiny, folder=tmp_path)
    assert later._reuse.snapshots.size_bytes == 0  # read when it is used
    assert answer(later, [*SYSTEM, 40, 41]) == expected
    assert reused(later) == len(SYSTEM)
    assert later._reuse.snapshots.size_bytes == later._session.caches.size_bytes(len(SYSTEM))
    later.close()
    assert [*tmp_path.glob("*/*")] == [file]
    assert file.stat().st_mtime_ns >= written  # used just now


def test_it_is_its_owners_alone(tiny: TinyBundle, tmp_path: Path):
    file = filled(tiny, tmp_path / "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def flip(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flip(0),
        flip(9),
        flip(20),
        flip(100),
        flip(-1),
        flip(-4000),
        lambda data: data[:-1],
        lambda data: data[:70],
        lambda data: data + b"\0",
        lambda data: b"",
    ],
    ids="magic length checksum header end middle short beginning long empty".split(),
)
def test_damaged_files_are_dropped_and_said_so(
    tiny: TinyBundle, expected: list[int], tmp_path: Path, damage, caplog: pytest.LogCaptureFixture
):
    file = filled(tiny, tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        engine = open_engine(tiny, folder=tmp_path)
        assert answer(engine, [*SYSTEM, 40, 41]) == expected
    assert reused(engine) == 0
    assert [text for text in caplog.messages if text.startswith(f"{file}: dropped")]
    engine.close()
    assert answer(open_engine(tiny, folder=tmp_path), [*SYSTEM, 40, 41]) == expected  # it was written anew


def test_a_file_that_vanishes_is_run_again(tiny: TinyBundle, expected: list[int], tmp_path: Path):
    file = filled(tiny, tmp_path)
    engine = open_engine(tiny, folder=tmp_path)
    file.unlink()
    assert answer(engine, [*SYSTEM, 40, 41]) == expected
    assert reused(engine) == 0


def test_another_bundle_has_another_folder(tiny: TinyBundle, tmp_path: Path):
    filled(tiny, tmp_path / "kept")
    copy = tmp_path / "copy"
    shutil.copytree(tiny.path, copy)
    manifest = copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    engine = open_engine(TinyBundle(open_bundle(copy), tiny.checkpoint), folder=tmp_path / "kept")
    answer(engine, [*SYSTEM, 40, 41])
    assert reused(engine) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_another_onnxruntime_has_another_folder(
    tiny: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    filled(tiny, tmp_path)
    monkeypatch.setattr(snapshot_files.ort, "__version__", "99.0")
    engine = open_engine(tiny, folder=tmp_path)
    answer(engine, [*SYSTEM, 40, 41])
    assert reused(engine) == 0


def test_the_least_recently_used_make_room(tiny: TinyBundle, tmp_path: Path):
    one = open_engine(tiny)._session.caches.size_bytes(len(SYSTEM)) + 2000  # with a header
    turns = [[*ids_of(60, seed=seed), MARK] for seed in range(3)]
    for number, turn in enumerate(turns):
        engine = open_engine(tiny, 2 * one, folder=tmp_path)
        answer(engine, [*turn, 40])
        engine.close()
        for age, file in enumerate(sorted(tmp_path.glob("*/*"), key=lambda file: file.stat().st_mtime)):
            os.utime(file, (number * 10 + age, number * 10 + age))
    assert len(list(tmp_path.glob("*/*"))) == 2
    engine = open_engine(tiny, 2 * one, folder=tmp_path)
    got = []
    for turn in (turns[1], turns[2], turns[0]):
        answer(engine, [*turn, 40])
        got.append(reused(engine))
    assert got == [61, 61, 0]
    engine.close()


def test_a_disk_that_takes_nothing_costs_nothing(
    tiny: TinyBundle, expected: list[int], tmp_path: Path, monkeypatch, caplog
):
    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot_files.os, "fsync", full)
    engine = open_engine(tiny, folder=tmp_path)
    assert answer(engine, [*SYSTEM, 40, 41]) == expected
    engine.close()
    assert list(tmp_path.glob("*/*")) == []
    assert "No space left" in caplog.text
    answer(engine, [*SYSTEM, 42])
    assert reused(engine) == len(SYSTEM)  # from memory


def test_a_folder_that_cannot_be_made_is_an_error(tiny: TinyBundle, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot keep snapshots there"):
        open_engine(tiny, folder=tmp_path / "file")


def test_what_a_killed_process_left_is_cleared(tiny: TinyBundle, tmp_path: Path):
    file = filled(tiny, tmp_path)
    old, new = file.with_suffix(".partial1"), file.with_suffix(".partial2")
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (1, 1))
    open_engine(tiny, folder=tmp_path).close()
    assert not old.exists() and new.exists()


def test_a_conversation_is_not_written(tiny: TinyBundle, tmp_path: Path):
    engine = open_engine(tiny, PLENTY, folder=tmp_path)
    answer(engine, ids_of(60, seed=5))
    answer(engine, ids_of(60, seed=6))
    assert len(list(engine._reuse.snapshots)) == 1
    engine.close()
    assert list(tmp_path.glob("*/*")) == []
