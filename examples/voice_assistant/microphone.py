"""Where sound comes from: a microphone, or a sound file at the pace of real time.

Blocks of 32 ms, 16 kHz mono; what is done with them is not known here.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from ...runtime.audio.files import open_audio
from ...runtime.audio.samples import MonoStream
from ...runtime.errors import GemmaEdgeError
from .listener import BLOCK, RATE, Samples

log = logging.getLogger(__name__)

WAITING_MAX = 1000  # blocks: 32 s; then the oldest are lost
WARN_EVERY_S = 10.0
TRAIL_S = 2.0  # of silence after a recording, so that its last turn ends as any other
MOST_BEHIND_S = 0.2  # a file that was held up goes on from where it is


class Blocks:
    """Samples of any number, cut into blocks."""

    def __init__(self) -> None:
        self._rest = np.zeros(0, np.int16)

    def cut(self, samples: Samples) -> Iterator[Samples]:
        joined = np.concatenate([self._rest, samples])
        whole = len(joined) // BLOCK * BLOCK
        self._rest = joined[whole:]
        yield from joined[:whole].reshape(-1, BLOCK)


def as_int16(mono: Any) -> Samples:
    """Mono float samples of full scale 1."""
    return np.clip(np.round(np.asarray(mono) * 32768.0), -32768, 32767).astype(np.int16)


class Recording:
    """A sound file, played at `speed` times real time; 0: as fast as it is taken. Silence follows it."""

    def __init__(self, path: Path, speed: float = 1.0) -> None:
        self._path, self._speed = path, speed
        with open_audio(path) as file:
            self.duration_s = file.duration_s

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[Samples]:
        due_at = time.monotonic()
        for block in self._blocks():
            if self._speed:
                due_at = max(due_at + BLOCK / RATE / self._speed, time.monotonic() - MOST_BEHIND_S)
                time.sleep(max(0.0, due_at - time.monotonic()))
            yield block

    def _blocks(self) -> Iterator[Samples]:
        blocks = Blocks()
        with open_audio(self._path) as file:
            stream = MonoStream(rate=file.rate, channels=file.channels, to_rate=RATE)
            for samples in file.blocks():
                yield from blocks.cut(as_int16(stream.push(samples)))
            yield from blocks.cut(as_int16(stream.finish()))
        yield from blocks.cut(np.zeros(int(TRAIL_S * RATE), np.int16))


class Microphone:
    """The microphone, by sounddevice (PortAudio). `with` opens and closes it; iterating waits for sound."""

    def __init__(self, device: str | int | None = None, stop: threading.Event | None = None) -> None:
        self._sounddevice = need_sounddevice()
        self._device = device
        self._stop = stop or threading.Event()
        self._waiting: queue.Queue[Samples] = queue.Queue(WAITING_MAX)
        self._blocks = Blocks()
        self._mono: MonoStream | None = None
        self._lost = 0  # blocks since the last warning
        self._warn_at = 0.0
        self._stream: Any = None

    def __enter__(self) -> Microphone:
        try:
            self._stream = self._open(RATE)
        except self._sounddevice.PortAudioError:  # a device that knows only its own rate
            try:
                rate = int(self._sounddevice.query_devices(self._device, "input")["default_samplerate"])
                self._mono = MonoStream(rate=rate, channels=1, to_rate=RATE)
                self._stream = self._open(rate)
            except (self._sounddevice.PortAudioError, ValueError) as cause:
                raise _no_microphone(cause) from cause
        self._stream.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def __iter__(self) -> Iterator[Samples]:
        while not self._stop.is_set():
            try:
                block = self._waiting.get(timeout=0.2)
            except queue.Empty:
                if not self._stream.active:
                    raise GemmaEdgeError("the microphone is gone; plug it in and start again") from None
                continue
            if self._lost and time.monotonic() > self._warn_at:
                log.warning("%d blocks of sound were lost: this machine is too slow", self._lost)
                self._lost, self._warn_at = 0, time.monotonic() + WARN_EVERY_S
            yield block

    def _open(self, rate: int) -> Any:
        block = BLOCK * rate // RATE
        return self._sounddevice.InputStream(
            samplerate=rate, channels=1, dtype="int16", blocksize=block, device=self._device,
            latency="low", callback=self._take,
        )  # fmt: skip

    def _take(self, samples: Any, count: int, time_info: Any, status: Any) -> None:
        """PortAudio's thread: never waits."""
        mono = samples[:, 0].copy()
        if self._mono is not None:
            mono = as_int16(self._mono.push(mono))
        if status and getattr(status, "input_overflow", False):
            self._lost += 1
        for block in self._blocks.cut(mono):
            while True:
                try:
                    self._waiting.put_nowait(block)
                    break
                except queue.Full:
                    self._lost += 1
                    try:
                        self._waiting.get_nowait()
                    except queue.Empty:
                        continue


def find_microphone(device: str | int | None = None) -> None:
    """Raises GemmaEdgeError if there is none, before anything is loaded."""
    sounddevice = need_sounddevice()
    try:
        sounddevice.query_devices(device, "input")
    except (sounddevice.PortAudioError, ValueError) as cause:
        raise _no_microphone(cause) from cause


def _no_microphone(cause: Exception) -> GemmaEdgeError:
    return GemmaEdgeError(
        f"no microphone ({cause}); name one with --input (--list-devices), or do without: --say TEXT, "
        "--wav FILE or --text (make voice SAY='Turn on the light in the kitchen.', WAV=FILE, TYPED=1)"
    )


def need_sounddevice() -> ModuleType:
    """Raises GemmaEdgeError saying what is missing."""
    try:
        import sounddevice
    except ImportError as cause:
        raise GemmaEdgeError("sounddevice is not installed; pip install 'gemma-edge[voice]'") from cause
    except OSError as cause:  # the package is there, the library is not
        raise GemmaEdgeError(f"{cause}; on Debian: apt install libportaudio2") from cause
    return sounddevice
