"""Folders and files written aside: one takes its name when it is whole and synced, and vanishes otherwise.

Also SIGTERM as Ctrl-C, so that whoever writes one gets to remove what is unfinished.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from .errors import GemmaEdgeError


@contextlib.contextmanager
def written_aside(
    out: Path, error: type[GemmaEdgeError], check: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yields a folder beside `out` that replaces it if all goes well.

    error: raised if the disk fails, or if somebody else is writing there. check: called before it takes
    its place.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(out.name + ".partial")
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as cause:
        raise error(f"{out}: cannot be written ({cause}); choose another folder") from cause
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as cause:
            raise error(
                f"{partial}: another process is writing there; wait for it or choose another folder"
            ) from cause
        try:
            for left in partial.iterdir():  # by one that was killed
                left.unlink()
            yield partial
            for path in partial.iterdir():
                _sync(path)
            _sync(partial)
            check()
            _take_place(partial, out)
        except BaseException as cause:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(cause, OSError):
                raise error(
                    f"{out}: cannot be written ({cause}); nothing of it is kept: free some space, or choose "
                    "another folder"
                ) from cause
            raise
    finally:
        os.close(lock)


def write_file_aside(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there. Raises OSError."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        _sync(partial)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _take_place(partial: Path, out: Path) -> None:
    replaced = out.with_name(out.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)
    _sync(out.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
