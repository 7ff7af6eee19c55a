"""Files that requests may name: every way out of the folder is closed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.transports.openai_api import ApiError
from gemma_edge.runtime.transports.sound_folder import SoundFolder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """tmp/sounds is the folder; beside it lies what must not be read."""
    folder = tmp_path / "sounds"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.wav").write_bytes(b"a")
    (folder / "deep" / "er" / "b.wav").write_bytes(b"b")
    (tmp_path / "secret.wav").write_bytes(b"secret")
    (tmp_path / "sounds-too").mkdir()
    (tmp_path / "sounds-too" / "c.wav").write_bytes(b"secret")
    return folder


def read(folder: Path, path: str, max_bytes: int = 100) -> bytes:
    return SoundFolder(folder).read(path, max_bytes=max_bytes)


def test_files_inside(root: Path, tmp_path: Path) -> None:
    (root / "link.wav").symlink_to("deep/er/b.wav")
    (root / "short").symlink_to(root / "deep" / "er")
    (tmp_path / "alias").symlink_to(root)
    assert read(root, "a.wav") == b"a" == read(root, "./deep/../a.wav")
    assert read(root, "deep/er/b.wav") == b"b" == read(root, "link.wav") == read(root, "short/b.wav")
    assert read(root, str(root / "a.wav")) == b"a"
    assert read(tmp_path / "alias", "a.wav") == b"a"


@pytest.mark.parametrize(
    "path",
    [
        "../secret.wav",
        "deep/../../secret.wav",
        "deep/er/../../../secret.wav",
        "../sounds-too/c.wav",
        "/etc/passwd",
        "//etc/passwd",
        "../nothing",
        "..",
        "out.wav",
        "out/secret.wav",
        "up/secret.wav",
        "out-of-nowhere.wav",
    ],
)
def test_no_way_out(root: Path, tmp_path: Path, path: str) -> None:
    (root / "out.wav").symlink_to(tmp_path / "secret.wav")
    (root / "out").symlink_to(tmp_path)
    (root / "up").symlink_to("..")
    (root / "out-of-nowhere.wav").symlink_to(tmp_path / "nothing")
    with pytest.raises(ApiError, match="not in the sound folder") as error:
        read(root, path)
    assert error.value.param == "path"


@pytest.mark.parametrize(
    "path", ["", ".", "deep/..", "a.wav\0", "x" * 2000, "nothing.wav", "deep", "a.wav/x"]
)
def test_what_is_no_file(root: Path, path: str) -> None:
    with pytest.raises(ApiError) as error:
        read(root, path)
    assert error.value.code == "invalid_request" and error.value.param == "path"
    assert len(str(error.value)) < 300


def test_pipes_loops_and_devices_do_not_hang_it(root: Path) -> None:
    os.mkfifo(root / "pipe.wav")
    (root / "loop").symlink_to("loop")
    for path in ("pipe.wav", "loop"):
        with pytest.raises(ApiError):
            read(root, path)


def test_size(root: Path) -> None:
    (root / "large.wav").write_bytes(bytes(101))
    with pytest.raises(ApiError) as error:
        read(root, "large.wav")
    assert error.value.code == "payload_too_large" and "100 bytes" in str(error.value)
    (root / "large.wav").write_bytes(bytes(100))
    assert len(read(root, "large.wav")) == 100


def test_a_link_that_is_put_in_meanwhile_is_not_followed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is looked at, then a folder on it becomes a link that leads out."""
    folder = SoundFolder(root)
    looked_at = Path.resolve
    (tmp_path / "er").mkdir()
    (tmp_path / "er" / "b.wav").write_bytes(b"secret")

    def resolve(self: Path, strict: bool = False) -> Path:
        found = looked_at(self, strict)
        (root / "deep").rename(root / "was-deep")
        (root / "deep").symlink_to(tmp_path)
        return found

    monkeypatch.setattr(Path, "resolve", resolve)
    with pytest.raises(ApiError):
        folder.read("deep/er/b.wav", max_bytes=100)


def test_no_descriptor_is_lost(root: Path) -> None:
    os.mkfifo(root / "pipe.wav")
    before = len(os.listdir("/proc/self/fd"))
    folder = SoundFolder(root)
    for path in ("deep", "pipe.wav", "deep/er/b.wav", "deep/x/y", "../secret.wav") * 5:
        with contextlib.suppress(ApiError):
            folder.read(path, max_bytes=100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_must_be_there(root: Path) -> None:
    for path in (root / "none", root / "a.wav"):
        with pytest.raises(ConfigError):
            SoundFolder(path)
