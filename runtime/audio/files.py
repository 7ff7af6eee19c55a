"""Sound files (WAV, FLAC, OGG, MP3, …) as blocks of samples: a long one needs no more memory than a short."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ..errors import AudioError
from .samples import MonoStream, need

FORMATS = (
    "WAV",
    "WAVEX",
    "RF64",
    "W64",
    "AIFF",
    "AU",
    "CAF",
    "FLAC",
    "OGG",
    "MP3",
)  # as libsndfile names them
BLOCK_SAMPLES = 1 << 16
READ_MAX_S = 600.0  # what `read_mono` holds in memory at most


@dataclass(frozen=True)
class AudioFile:
    """An open sound file."""

    name: str
    rate: int  # Hz
    channels: int
    duration_s: float  # as its header says
    _file: Any

    def blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """(samples, channels) each, full scale 1. Raises AudioError."""
        while True:
            try:
                block = self._file.read(BLOCK_SAMPLES, dtype="float32", always_2d=True)
            except Exception as cause:  # LibsndfileError derives from Exception alone
                raise AudioError(f"{self.name}: damaged ({_reason(cause)}); send the file again") from cause
            if not len(block):
                return
            yield block


@contextmanager
def open_audio(source: Path | bytes, *, name: str = "the sound") -> Iterator[AudioFile]:
    """Open a file, or the bytes of one (called `name` in messages). Raises AudioError."""
    soundfile = need("soundfile")
    if isinstance(source, bytes):
        stream: IO[bytes] = io.BytesIO(source)
    else:
        name = str(source)
        try:
            stream = source.open("rb")
        except OSError as cause:
            raise AudioError(f"{name}: cannot be read ({cause.strerror}); expected a sound file") from cause
    with stream:
        try:
            file = soundfile.SoundFile(stream)
        except Exception as cause:
            raise AudioError(
                f"{name}: not a sound file ({_reason(cause)}); expected WAV, FLAC, OGG or MP3"
            ) from cause
        with file:
            if file.format not in FORMATS:
                raise AudioError(
                    f"{name}: a sound file of type {file.format}; expected WAV, FLAC, OGG or MP3"
                )
            yield AudioFile(name, file.samplerate, file.channels, file.frames / file.samplerate, file)


def read_mono(
    source: Path | bytes, rate: int, *, max_s: float = READ_MAX_S, name: str = "the sound"
) -> npt.NDArray[np.float32]:
    """A whole file as mono samples at `rate`. Raises AudioError, also when it is longer than `max_s`."""
    with open_audio(source, name=name) as file:
        check_duration(file.name, file.duration_s, max_s)
        stream = MonoStream(rate=file.rate, channels=file.channels, to_rate=rate)
        parts, samples = [], 0
        for block in file.blocks():
            samples += len(block)
            check_duration(file.name, samples / file.rate, max_s)
            parts.append(stream.push(block))
        return np.concatenate([*parts, stream.finish()])


def check_duration(name: str, duration_s: float, max_s: float) -> None:
    if duration_s > max_s:
        raise AudioError(
            f"{name}: {duration_s:.1f} s of sound, expected at most {max_s:g} s; cut it into clips"
        )


def _reason(cause: Exception) -> str:
    """libsndfile's own words, without the object that it was given."""
    return str(cause).rpartition(": ")[2].rstrip(".") or type(cause).__name__
