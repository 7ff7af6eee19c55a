"""Sound files that requests may name: those in one folder, and no way out of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import ConfigError
from .openai_api import ApiError

MAX_PATH_CHARS = 1_000


class SoundFolder:
    """Raises ConfigError if it is no folder."""

    def __init__(self, folder: Path) -> None:
        try:
            self._folder = folder.resolve(strict=True)
        except OSError as cause:
            raise ConfigError(f"{folder}: no such folder ({cause.strerror})") from cause
        if not self._folder.is_dir():
            raise ConfigError(f"{folder}: not a folder")

    def read(self, path: str, *, max_bytes: int) -> bytes:
        """A file's bytes. Raises ApiError: not in the folder, not there, no file, too large."""
        if not path or len(path) > MAX_PATH_CHARS or "\0" in path:
            raise _refused(path, "expected a path inside the sound folder")
        try:
            found = (self._folder / path).resolve()  # links are followed, and must not lead out
            inside = found.relative_to(self._folder).parts
        except (OSError, ValueError, RuntimeError) as cause:
            raise _refused(path, "it is not in the sound folder") from cause
        if not inside:
            raise _refused(path, "that is the sound folder; name a file in it")
        try:
            return self._read(inside, path, max_bytes)
        except OSError as cause:
            raise _refused(path, cause.strerror or "it cannot be read") from cause

    def _read(self, parts: tuple[str, ...], path: str, max_bytes: int) -> bytes:
        """Go down step by step without following links: one that was put there meanwhile is refused."""
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts[:-1]:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                deeper = os.open(part, flags, dir_fd=folder)
                os.close(folder)
                folder = deeper
            # A pipe would block an ordinary open.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(parts[-1], flags, dir_fd=folder)
        finally:
            os.close(folder)
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise _refused(path, "it is no ordinary file")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(max_bytes + 1) if info.st_size <= max_bytes else None
        finally:
            os.close(descriptor)
        if data is None or len(data) > max_bytes:
            raise ApiError(
                f"path: more than {max_bytes} bytes; send a shorter sound", "path", "payload_too_large"
            )
        return data


def _refused(path: str, why: str) -> ApiError:
    return ApiError(f"path {path[:100]!r}: {why}", "path")
