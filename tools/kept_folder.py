"""A folder that takes minutes to make, kept: whole, or made anew. What is in it is not known here."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".making-"


def kept_folder(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, as `make(empty folder)` left it the last time; made now if it is missing or has changed.

    It is made beside its place and moved there when it is whole, so whatever ends `make`, a power failure
    included, leaves nothing that is taken for a folder. One process makes, others wait for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    record = folder.with_name(f"{folder.name}.sha256")
    with _alone(folder.parent):
        if folder.exists():
            if record.exists() and record.read_text().strip() == fingerprint(folder):
                return folder
            print(f"{folder} is damaged or was not finished: making it anew", file=sys.stderr)
            shutil.rmtree(folder)
        for left in folder.parent.glob(f"{PARTIAL}*"):  # of a process that was killed: nobody is making now
            shutil.rmtree(left, ignore_errors=True)  # its downloads may be still alive
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=PARTIAL) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(made)
            record.write_text(f"{fingerprint(made)}\n")
            made.rename(folder)
    return folder


def fingerprint(folder: Path) -> str:
    """Of all names, links and contents, but for the bytecode that Python writes beside what it runs."""
    digest = hashlib.sha256()
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted([*files, *folders]):
            path = Path(parent, name)
            digest.update(f"\0{path.relative_to(folder)}\0".encode())
            if path.is_symlink():
                digest.update(os.fsencode(path.readlink()))
            elif path.is_file():
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process is in here for `folder` at the same time. The lock ends with the process."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
