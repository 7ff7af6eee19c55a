"""`tools.arm64` where something is missing, and the command line that it starts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import arm64

from .test_makefile import program


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with all that is needed in it; the key ring too."""
    folder = tmp_path / "bin"
    for name in ("qemu-aarch64-static", "apt-get", "dpkg-deb"):
        program(folder / name, "exit 1")
    keyring = tmp_path / "keyring.gpg"
    keyring.touch()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(arm64, "KEYRING", keyring)
    monkeypatch.setattr(arm64.platform, "system", lambda: "Linux")
    return folder


def test_nothing_is_missing(tools: Path) -> None:
    assert arm64.main(["--check"]) == 0
    (tools / "qemu-aarch64-static").rename(tools / "qemu-aarch64")  # Debian 13's qemu-user
    assert arm64.main(["--check"]) == 0


@pytest.mark.parametrize(
    "gone, said",
    [
        ("bin/qemu-aarch64-static", "apt install qemu-user-static"),
        ("bin/apt-get", "on Debian or Ubuntu"),
        ("bin/dpkg-deb", "on Debian or Ubuntu"),
        ("keyring.gpg", "apt install debian-archive-keyring"),
    ],
)
def test_what_is_missing_is_named_with_its_package(
    tools: Path, gone: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tools.parent / gone).unlink()
    assert arm64.main(["--check"]) == 1
    words = capsys.readouterr().err
    assert words.startswith("arm64: ") and said in words and len(words.splitlines()) == 1


def test_other_systems_are_told_so(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arm64.platform, "system", lambda: "Darwin")
    assert arm64.main(["--check"]) == 1
    assert "needs Linux; this is Darwin" in capsys.readouterr().err


def test_a_package_index_out_of_reach_leaves_no_half_made_root(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """apt-get is a stand-in that fails."""
    program(tools / "apt-get", "echo 'Could not resolve deb.debian.org' >&2\nexit 100")
    cache = tmp_path / "cache"
    monkeypatch.setenv("GEMMA_EDGE_ARM64", str(cache))
    assert arm64.main(["--python", "3.13"]) == 1
    words = capsys.readouterr().err
    assert "GEMMA_EDGE_DEBIAN_MIRROR" in words and "Could not resolve deb.debian.org" in words
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_all_behind_the_two_dashes_is_for_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what looks like an option of its own."""
    started = []
    monkeypatch.setattr(arm64, "open_machine", lambda python, cpu: arm64.Machine(tmp_path, python, cpu))
    monkeypatch.setattr(arm64, "build_wheel", lambda folder: folder / "wheel")
    monkeypatch.setattr(arm64, "install", lambda wheel, python, folder: [])
    monkeypatch.setattr(subprocess, "call", lambda command, env: started.append(command) or 0)
    given = ["--cpu", "cortex-a72", "--python", "3.13", "--", "-m", "x", "--python", "3.9", "--", "y"]
    assert arm64.main(given) == 0
    interpreter = str(tmp_path / "usr/bin/python3.13")
    assert started == [["nice", "-n", "15", interpreter, "-m", "x", "--python", "3.9", "--", "y"]]
