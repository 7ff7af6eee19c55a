"""One utterance that arrives in pieces of PCM: cut into whole samples, put into a `Feed`, bounded. No I/O."""

from __future__ import annotations

import time

from ..audio.samples import CHANNELS_MAX, RATES, from_pcm
from ..errors import RequestError
from ..sounds import MAX_SOUND_BYTES, Feed
from .wyoming_events import AudioFields

PUT_S = 0.01  # sound is handed on in pieces of at least this length
IDLE_S = 10.0  # silence on the line, which is no silence of a microphone
LONGEST_S = 120.0  # from the first event to the last, however slowly the sound comes


class Speech:
    """Raises RequestError for a format that cannot be heard."""

    def __init__(self, form: AudioFields, *, max_s: float) -> None:
        for name, value, least, most in (
            ("rate", form.rate, *RATES),
            ("channels", form.channels, 1, CHANNELS_MAX),
        ):
            if not least <= value <= most:
                raise RequestError("invalid_request", f"{name}: expected {least} to {most}, got {value}")
        from_pcm(b"", channels=form.channels, width=form.width)
        self.form = form
        self.feed = Feed(form.rate, form.channels, max_s=max_s)
        self.ends_by = time.monotonic() + LONGEST_S
        self._frame_bytes = form.width * form.channels
        self._waiting = bytearray()
        self._taken_bytes = 0

    def add(self, form: AudioFields, audio: bytes) -> bool:
        """Take a chunk. Whether there is sound in the feed now. Raises RequestError."""
        if form != self.form:
            raise RequestError(
                "invalid_request",
                f"audio-chunk: the format changed from {self.form} to {form}; stay with one",
            )
        self._taken_bytes += len(audio)
        if self._taken_bytes > MAX_SOUND_BYTES:
            raise RequestError("invalid_request", f"more than {MAX_SOUND_BYTES} bytes of sound; send less")
        self._waiting += audio
        if len(self._waiting) >= self._frame_bytes * max(1, int(PUT_S * self.form.rate)):
            self._put()
        return self._taken_bytes > len(self._waiting)

    def end(self) -> None:
        """The last chunk was there. Raises RequestError if samples are not whole."""
        if self._waiting:
            self._put()
        if self._waiting:
            from_pcm(bytes(self._waiting), channels=self.form.channels, width=self.form.width)
        self.feed.end()

    def drop(self) -> None:
        """Nobody wants an answer, and the job is cancelled: let its reader wake up."""
        self.feed.end()

    def idle_s(self) -> float:
        """How long the next event may take; 0: it is over."""
        return max(0.0, min(IDLE_S, self.ends_by - time.monotonic()))

    def _put(self) -> None:
        whole = len(self._waiting) // self._frame_bytes * self._frame_bytes
        if whole:
            data = bytes(self._waiting[:whole])
            del self._waiting[:whole]
            self.feed.put(from_pcm(data, channels=self.form.channels, width=self.form.width))
