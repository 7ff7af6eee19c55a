"""Speaks an answer while it is being written: one thread makes sound of sentences, another plays it.

say(sentence) --queue--> voice --queue--> output        stop() ends both within 50 ms
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import wave
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...runtime.errors import GemmaEdgeError
from .sentences import speakable
from .voices import Pcm, Voice, VoiceError

log = logging.getLogger(__name__)

PIECE_S = 0.05  # played at a time: so soon an interruption is obeyed
AHEAD = 8  # pieces of sound made before they are played


class Output(Protocol):
    """Where sound goes. One thread plays."""

    def play(self, samples: Pcm, rate: int) -> None:
        """Takes about as long as the sound."""

    def stop(self) -> None:
        """Silence now: forget what was not heard yet."""

    def finish(self) -> None:
        """Return when all was heard."""

    def close(self) -> None: ...


class Speaker:
    """A voice and its output; without them answers are shown only. Used by one thread, stopped by any."""

    def __init__(self, voice: Voice | None, output: Output | None) -> None:
        self.voice, self.output = voice, output

    def begin(self) -> Speech:
        return Speech(self.voice, self.output)

    def close(self) -> None:
        if self.output is not None:
            self.output.close()


class Speech:
    """One answer. said: the sentences that were heard, or begun."""

    def __init__(self, voice: Voice | None, output: Output | None) -> None:
        self._voice, self._output = voice, output
        self.said: list[str] = []
        self.first_sound_at: float | None = None  # time.perf_counter()
        self._stopped = threading.Event()
        # As many as an answer has sentences, so bounded by its tokens.
        self._sentences: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._sounds: queue.Queue[tuple[str, Pcm] | None] = queue.Queue(AHEAD)
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for run, name in ((self._make, "voice"), (self._play, "output"))
        ]
        if voice is not None:
            for thread in self._threads:
                thread.start()

    def say(self, sentence: str) -> None:
        if self._stopped.is_set():
            return
        if self._voice is None:
            self.said.append(sentence)
        else:
            self._sentences.put(sentence)

    def finish(self) -> None:
        """Return when everything was heard, or `stop` was called."""
        if self._voice is not None:
            self._sentences.put(None)
            for thread in self._threads:
                thread.join()

    def stop(self) -> None:
        """No more, at once."""
        self._stopped.set()
        if self._voice is not None and self._output is not None:
            self._output.stop()
            self._sentences.put(None)

    def _make(self) -> None:
        assert self._voice is not None
        try:
            while (sentence := self._sentences.get()) is not None and not self._stopped.is_set():
                text = speakable(sentence)
                if not text:
                    self._put((sentence, np.zeros(0, np.int16)))
                    continue
                for samples in self._voice.say(text):
                    self._put((sentence, samples))
        except VoiceError as error:
            log.error("the answer cannot be spoken: %s", error)
        except Exception:
            log.exception("the answer cannot be spoken")
        finally:
            self._put(None)

    def _put(self, sound: tuple[str, Pcm] | None) -> None:
        while True:
            with contextlib.suppress(queue.Full):
                self._sounds.put(sound, timeout=0.1)
                return
            if self._stopped.is_set() and sound is not None:
                return

    def _play(self) -> None:
        assert self._voice is not None and self._output is not None
        rate = self._voice.rate
        step = max(1, int(PIECE_S * rate))
        last: str | None = None
        failed = False
        while (sound := self._sounds.get()) is not None:
            if self._stopped.is_set() or failed:
                continue
            sentence, samples = sound
            if sentence is not last:
                self.said.append(sentence)
                last = sentence
            try:
                for start in range(0, len(samples), step):
                    if self._stopped.is_set():
                        break
                    if self.first_sound_at is None:
                        self.first_sound_at = time.perf_counter()
                    self._output.play(samples[start : start + step], rate)
            except Exception:
                log.exception("the sound output failed")
                failed = True
        if not self._stopped.is_set() and not failed:
            self._output.finish()


class WavFile:
    """Speech into a file. speed: play at so many times real time; 0: at once."""

    def __init__(self, path: Path, speed: float = 0.0) -> None:
        self._path, self._speed = path, speed
        self._file: wave.Wave_write | None = None
        try:
            path.open("wb").close()
        except OSError as cause:
            raise GemmaEdgeError(f"--speak {path}: cannot be written ({cause.strerror})") from cause

    def play(self, samples: Pcm, rate: int) -> None:
        if self._file is None:
            self._file = wave.open(str(self._path), "wb")  # noqa: SIM115 - `close` closes it
            self._file.setnchannels(1)
            self._file.setsampwidth(2)
            self._file.setframerate(rate)
        self._file.writeframes(samples.astype("<i2").tobytes())
        if self._speed:
            time.sleep(len(samples) / rate / self._speed)

    def stop(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Loudspeaker:
    """The sound card, by sounddevice (PortAudio)."""

    def __init__(self, rate: int, device: str | int | None = None) -> None:
        from .microphone import need_sounddevice

        sounddevice = need_sounddevice()
        self._lock = threading.Lock()
        self._playing = False
        try:
            self._stream: Any = sounddevice.OutputStream(
                samplerate=rate, channels=1, dtype="int16", device=device, latency="low"
            )
        except (sounddevice.PortAudioError, ValueError) as cause:
            raise GemmaEdgeError(
                f"no sound output ({cause}); name one with --output, or use --speak off or FILE.wav"
            ) from cause

    def play(self, samples: Pcm, rate: int) -> None:
        with self._lock:
            if not self._playing:
                self._stream.start()
                self._playing = True
            self._stream.write(np.ascontiguousarray(samples[:, None]))

    def stop(self) -> None:
        with self._lock:
            if self._playing:
                self._stream.abort()
                self._playing = False

    def finish(self) -> None:
        with self._lock:
            if self._playing:
                self._stream.stop()  # after what it still holds
                self._playing = False

    def close(self) -> None:
        self.stop()
        self._stream.close()
