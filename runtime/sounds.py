"""Sounds of a request: taken out of its messages, and turned into parts of the prompt while they arrive.

A sound is a file's bytes, or a `Feed` that a transport fills while somebody speaks. Knows the audio encoder,
not the engine: the worker thread pulls the parts.
"""

from __future__ import annotations

import base64
import binascii
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from .audio.files import check_duration, open_audio
from .errors import AudioError, RequestError
from .prompt import NOW, Part, Soft

if TYPE_CHECKING:
    from .audio.encoder import AudioEncoder
    from .bundle import Bundle

MAX_SOUNDS = 16  # of one request
MAX_SOUND_BYTES = 32 << 20  # of all files of one request, decoded from base64
FEED_IDLE_S = 30.0  # a feed that brings nothing for so long has failed


class Stop(Protocol):
    """What a waiting reader asks now and then."""

    def is_set(self) -> bool: ...


class Feed:
    """Sound that is still being made. One thread puts, another reads; `put` never blocks.

    It is bounded by its length in all: at most `max_s` seconds are taken. Once it was heard whole, later
    requests may name it again, as the turns of a dialogue do: it is not encoded again.
    """

    def __init__(self, rate: int, channels: int = 1, *, max_s: float = 60.0) -> None:
        self.rate, self.channels, self.max_s = rate, channels, max_s
        self._blocks: deque[npt.NDArray[Any]] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._error: RequestError | None = None
        self._samples = 0
        self.ended_at: float | None = None  # time.perf_counter() when the last sample was there
        self.soft: npt.NDArray[np.float32] | None = None  # (tokens, hidden), once it was heard whole

    def put(self, samples: npt.NDArray[Any]) -> None:
        """(samples,) or (samples, channels). Raises AudioError when the sound has ended or is too long."""
        with self._changed:
            if self._ended:
                raise AudioError("this sound has ended; begin a new one")
            self._samples += len(samples)
            if self._samples > self.max_s * self.rate:
                self._end(AudioError(f"more than {self.max_s:g} s of sound; cut it into shorter pieces"))
                raise self._error or AudioError("too long")
            self._blocks.append(samples)
            self._changed.notify_all()

    def end(self) -> None:
        """No more is coming. The prompt goes on with what follows the sound."""
        with self._changed:
            self._end(None)

    def fail(self, error: RequestError) -> None:
        """The sound cannot be had: the request fails with `error`."""
        with self._changed:
            self._end(error)

    def blocks(self, stop: Stop) -> Iterator[npt.NDArray[Any] | None]:
        """What was put, in order and all that is there at once; None each time nothing more is there.

        Ends with the sound, or early when `stop` is set. Raises what `fail` was given, or AudioError when
        nothing has come for FEED_IDLE_S.
        """
        heard_at = time.monotonic()
        while not stop.is_set():
            with self._changed:
                if not self._blocks and not self._ended:
                    self._changed.wait(0.1)
                waiting = list(self._blocks)
                self._blocks.clear()
                ended, error = self._ended, self._error
            if error is not None:
                raise error
            if waiting:
                heard_at = time.monotonic()
                # Who is behind catches up: one long piece is encoded faster than several short ones.
                yield np.concatenate(waiting)
                if not self._blocks and not self._ended:
                    yield None
            elif ended:
                return
            elif time.monotonic() - heard_at > FEED_IDLE_S:
                raise AudioError(f"no sound came for {FEED_IDLE_S:g} s; send it, or its end")

    def _end(self, error: RequestError | None) -> None:
        if not self._ended:
            self._ended, self._error, self.ended_at = True, error, time.perf_counter()
            self._changed.notify_all()


Sound = bytes | Feed


def take_sounds(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Sound]]:
    """The messages with `{"type": "audio"}` in place of each sound, and the sounds in order.

    A sound is OpenAI's part {"type": "input_audio", "input_audio": {"data": base64, "format": …}}, or, within
    the process, {"type": "audio", "feed": Feed} or {"type": "audio", "file": bytes}. Its true format is read
    from its bytes. Raises RequestError.
    """
    sounds: list[Sound] = []
    taken: list[dict[str, Any]] = []
    size = 0
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = []
            for number, part in enumerate(content):
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "input_audio":
                    data = _decoded(part.get("input_audio"), f"messages[{index}].content[{number}]")
                    size += len(data)
                    sounds.append(data)
                    part = {"type": "audio"}
                elif kind == "audio" and isinstance(part.get("feed"), Feed):
                    sounds.append(part["feed"])
                    part = {"type": "audio"}
                elif kind == "audio" and isinstance(part.get("file"), bytes):
                    size += len(part["file"])
                    sounds.append(part["file"])
                    part = {"type": "audio"}
                elif kind == "audio":
                    raise RequestError(
                        "invalid_request",
                        f"messages[{index}].content[{number}]: expected a part of type 'input_audio'",
                    )
                parts.append(part)
            message = message | {"content": parts}
        taken.append(message)
    if len(sounds) > MAX_SOUNDS or size > MAX_SOUND_BYTES:
        raise RequestError(
            "invalid_request",
            f"{len(sounds)} sounds of {size} bytes; at most {MAX_SOUNDS} of {MAX_SOUND_BYTES} bytes in all",
        )
    return taken, sounds


def _decoded(field: Any, where: str) -> bytes:
    data = field.get("data") if isinstance(field, dict) else None
    if not isinstance(data, str) or not data:
        raise RequestError(
            "invalid_request",
            f"{where}.input_audio: expected {{'data': base64 of a sound file, 'format': 'wav'}}",
        )
    if len(data) > MAX_SOUND_BYTES * 4 // 3 + 4:
        raise RequestError("invalid_request", f"{where}: more than {MAX_SOUND_BYTES} bytes of sound")
    try:
        return base64.b64decode(data.partition(",")[2] if data.startswith("data:") else data, validate=True)
    except (ValueError, binascii.Error) as cause:
        raise RequestError(
            "invalid_request", f"{where}.input_audio.data: not base64 ({cause}); send a file's bytes"
        ) from cause


def open_ears(bundle: Bundle, *, threads: int | None = None) -> Ears | None:
    """What a bundle hears with; None if its model hears nothing."""
    if bundle.manifest.audio is None:
        return None
    from .audio.encoder import AudioEncoder

    return Ears(AudioEncoder(bundle, threads=threads))


class Ears:
    """Turns the sounds of a prompt into parts for the engine. The worker thread owns it."""

    def __init__(self, encoder: AudioEncoder) -> None:
        self.encoder = encoder
        self.tokens = encoder.audio.tokens

    def check(self, sound: Sound) -> int:
        """How many prompt tokens a sound takes at most. Raises AudioError: no sound, or too long a one."""
        marks = 2
        if isinstance(sound, Feed):
            return marks + (1 if sound.soft is None else len(sound.soft))  # known when it was heard
        with open_audio(sound) as file:
            check_duration(file.name, file.duration_s, self.encoder.max_s)
            return marks + int(file.duration_s * self.encoder.audio.tokens_per_s) + 1

    def parts(self, prompt_ids: Sequence[int], sounds: Sequence[Sound], stop: Stop) -> Iterator[Part]:
        """The prompt with its sounds' soft tokens for placeholders, between the marks of begin and end."""
        waiting = iter(sounds)
        ids: list[int] = []
        for token in prompt_ids:
            if token != self.tokens.placeholder:
                ids.append(token)
                continue
            yield [*ids, self.tokens.begin]
            sound = next(waiting)
            yield from self._feed(sound, stop) if isinstance(sound, Feed) else self._file(sound)
            ids = [self.tokens.end]
        yield ids

    def _file(self, data: bytes) -> Iterator[Part]:
        soft = self.encoder.encode_file(data)
        if not len(soft):
            raise AudioError("too short a sound to hear anything; expected at least 20 ms")
        yield Soft(soft)

    def _feed(self, feed: Feed, stop: Stop) -> Iterator[Part]:
        if feed.soft is not None:
            yield Soft(feed.soft)
            return
        yield NOW
        stream = self.encoder.stream(feed.rate, feed.channels)
        heard = []
        for block in feed.blocks(stop):
            if block is None:
                yield NOW
            elif len(soft := stream.push(block)):
                heard.append(soft)
                yield Soft(soft)
        if stop.is_set():
            return
        last = stream.finish()
        if not stream.tokens:
            raise AudioError("too short a sound to hear anything; expected at least 20 ms")
        feed.soft = np.concatenate([*heard, last])
        if len(last):
            yield Soft(last)
