"""Folders that are kept, as the emulated boards' are: made once, and made anew when they are not whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.kept_folder import PARTIAL, kept_folder

ROOT = Path(__file__).parents[1]
# Makes FOLDER, but for its second file: says so and waits to be killed, or is told to go on.
MAKER = """
import sys
from pathlib import Path
from tools.kept_folder import kept_folder

def make(folder):
    (folder / "first").write_text("1")
    print("half", flush=True)
    sys.stdin.readline()
    (folder / "second").write_text("2")

kept_folder(Path(sys.argv[1]), make)
print("whole", flush=True)
"""


class Maker:
    """Makes a small tree; counts how often."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, folder: Path) -> None:
        self.made += 1
        (folder / "usr" / "lib").mkdir(parents=True)
        (folder / "usr" / "lib" / "library.so").write_bytes(b"\x7fELF" * 1000)
        (folder / "lib").symlink_to("usr/lib")
        (folder / "empty").mkdir()


@pytest.fixture
def make() -> Maker:
    return Maker()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "root"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_it_is_made_once(folder: Path, make: Maker, capfd: pytest.CaptureFixture[str]) -> None:
    assert kept_folder(folder, make) == kept_folder(folder, make) == folder
    assert make.made == 1 and (folder / "lib" / "library.so").stat().st_size == 4000
    assert names(folder.parent) == {"root", "root.sha256", ".lock"}
    assert capfd.readouterr().err == ""


def test_bytecode_of_what_ran_there_is_no_damage(folder: Path, make: Maker) -> None:
    kept_folder(folder, make)
    (folder / "usr" / "lib" / "__pycache__").mkdir()
    (folder / "usr" / "lib" / "__pycache__" / "module.pyc").write_bytes(b"x")
    kept_folder(folder, make)
    assert make.made == 1


def cut(folder: Path) -> None:
    (folder / "usr" / "lib" / "library.so").write_bytes(b"\x7fELF" * 500)


def zeroed(folder: Path) -> None:
    (folder / "usr" / "lib" / "library.so").write_bytes(bytes(4000))


def gone(folder: Path) -> None:
    (folder / "usr" / "lib" / "library.so").unlink()


def linked_elsewhere(folder: Path) -> None:
    (folder / "lib").unlink()
    (folder / "lib").symlink_to("usr")


def without_a_record(folder: Path) -> None:
    folder.with_name("root.sha256").unlink()


def without_an_empty_folder(folder: Path) -> None:
    (folder / "empty").rmdir()


@pytest.mark.parametrize(
    "damage", [cut, zeroed, gone, linked_elsewhere, without_a_record, without_an_empty_folder]
)
def test_damage_is_noticed_told_and_mended(
    folder: Path, make: Maker, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]
) -> None:
    kept_folder(folder, make)
    damage(folder)
    kept_folder(folder, make)
    assert make.made == 2 and (folder / "lib" / "library.so").read_bytes() == b"\x7fELF" * 1000
    assert f"{folder} is damaged" in capfd.readouterr().err
    kept_folder(folder, make)
    assert make.made == 2


def test_a_failure_leaves_nothing(folder: Path, make: Maker) -> None:
    def fail(made: Path) -> None:
        (made / "half").touch()
        raise ConnectionError("no network")

    with pytest.raises(ConnectionError, match="no network"):
        kept_folder(folder, fail)
    assert names(folder.parent) == {".lock"}
    kept_folder(folder, make)
    assert make.made == 1


def start_maker(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAKER, str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    return process


def test_one_that_was_killed_on_the_way_is_made_anew(folder: Path, make: Maker) -> None:
    with start_maker(folder) as process:
        process.send_signal(signal.SIGKILL)
    assert any(name.startswith(PARTIAL) for name in names(folder.parent))
    assert not folder.exists()
    kept_folder(folder, make)
    assert make.made == 1
    assert names(folder.parent) == {"root", "root.sha256", ".lock"}


def test_a_second_process_waits_and_takes_what_the_first_made(folder: Path) -> None:
    with start_maker(folder) as first:
        second = subprocess.Popen(
            [sys.executable, "-c", MAKER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        with second:
            assert first.communicate("\n")[0] == "whole\n"
            assert second.communicate()[0] == "whole\n"  # without "half": it made nothing
    assert names(folder) == {"first", "second"}
