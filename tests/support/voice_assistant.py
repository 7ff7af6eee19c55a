"""For tests of the voice assistant: spoken sentences, and a model that knows only them, by their sound.

The model stands where the real one stands: under the real service, chat template, tokenizer and `Ears`. Its
encoder makes log-mel frames, its engine finds out which sentence they are, and a script answers it. So what
is heard decides what happens.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
import time
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from gemma_edge.examples.voice_assistant.brain import Brain, make_brain
from gemma_edge.examples.voice_assistant.turn import Call, Turn
from gemma_edge.examples.voice_assistant.voices import EspeakLibrary
from gemma_edge.runtime.audio.mel import LogMel
from gemma_edge.runtime.audio.samples import MonoStream
from gemma_edge.runtime.bundle import AudioTokens, MelSettings
from gemma_edge.runtime.chat import ChatTemplate
from gemma_edge.runtime.prompt import Part, Soft
from gemma_edge.runtime.service import Service
from gemma_edge.runtime.sounds import Ears
from gemma_edge.runtime.stats import EngineFinish, GenerationStats

from .tokenizer_files import NANO, tokenizer_pair

RATE = 16_000  # Hz
MEL = MelSettings(RATE, 128, 320, 160, 512, 0.0, 8000.0, 1e-3, 0.0, True, 1.0, None, None)
FRAMES_PER_TOKEN = 4
SURE = 0.65  # similarity of a sentence to itself is above 0.8, to the others below 0.5


@functools.cache
def said(text: str, voice: str = "en-us", words_per_minute: int = 150) -> np.ndarray:
    """A sentence as espeak-ng speaks it: int16, mono, 16 kHz."""
    speaker = EspeakLibrary(voice, words_per_minute)
    samples = np.concatenate(list(speaker.say(text)))
    stream = MonoStream(rate=speaker.rate, channels=1, to_rate=RATE)
    mono = np.concatenate([stream.push(samples), stream.finish()])
    return (np.clip(mono, -1, 1) * 32767).astype(np.int16)


def recording(path: Path, *parts: str | float) -> Path:
    """A WAV file of sentences and of silences in seconds."""
    sound = [np.zeros(int(p * RATE), np.int16) if isinstance(p, float) else said(p) for p in parts]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.concatenate(sound).tobytes())
    return path


class PhraseEncoder:
    """Log-mel frames, four to a soft token, in place of an audio encoder."""

    def __init__(self, tokens: AudioTokens) -> None:
        self.audio = SimpleNamespace(tokens=tokens, tokens_per_s=RATE / MEL.hop_length / FRAMES_PER_TOKEN)
        self.max_s = 30.0
        self.log_mel = LogMel(MEL)

    def stream(self, rate: int, channels: int = 1) -> _PhraseStream:
        assert (rate, channels) == (RATE, 1)
        return _PhraseStream(self.log_mel)

    def rows(self, samples: np.ndarray) -> np.ndarray:
        stream = self.stream(RATE)
        return np.concatenate([stream.push(samples), stream.finish()])


class _PhraseStream:
    def __init__(self, log_mel: LogMel) -> None:
        self._mel = log_mel.stream()
        self._frames = np.zeros((0, MEL.bins), np.float32)
        self.tokens = 0

    def push(self, samples: np.ndarray) -> np.ndarray:
        self._frames = np.concatenate([self._frames, self._mel.push(samples.astype(np.float32) / 32768)])
        count = len(self._frames) // FRAMES_PER_TOKEN
        whole, self._frames = np.split(self._frames, [count * FRAMES_PER_TOKEN])
        self.tokens += count
        return whole.reshape(count, FRAMES_PER_TOKEN, MEL.bins).mean(axis=1)

    def finish(self) -> np.ndarray:
        return np.zeros((0, MEL.bins), np.float32)


class Recognizer:
    """Which of a few sentences it was."""

    def __init__(self, encoder: PhraseEncoder, phrases: Sequence[str]) -> None:
        self._known = {phrase: _shape(*_spoken(encoder.rows(said(phrase)))) for phrase in phrases}

    def phrase(self, rows: np.ndarray) -> str:
        _, start, stop = _spoken(rows)
        near = itertools.product(range(max(0, start - 3), start + 4), range(stop - 3, stop + 4))
        shapes = np.stack([_shape(rows, a, b) for a, b in near])
        scores = {phrase: float((shapes @ known).max()) for phrase, known in self._known.items()}
        best = max(scores, key=scores.__getitem__)
        return best if scores[best] > SURE else f"??? {scores}"


def _spoken(rows: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The rows, and where speech begins and ends in them."""
    loudness = rows.mean(axis=1)
    loud = np.flatnonzero(loudness > loudness.max() - 2.5)
    return rows, int(loud[0]), int(loud[-1]) + 1


def _shape(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Some rows stretched to one length: a unit vector."""
    spoken = rows[start:stop]
    at = np.linspace(0, len(spoken) - 1, 32).round().astype(int)
    vector = (spoken[at] - spoken.mean(axis=0)).ravel()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


class HearingEngine:
    """Reads its prompt as text, with every sound as ⟨the sentence⟩, and says what `script` makes of it."""

    def __init__(
        self, recognizer: Recognizer, script: Callable[[str], str], *, context: int, step_s: float
    ) -> None:
        self.tokenizer = tokenizer_pair("nano")[1]
        self.context = context
        self.eos = frozenset({self.tokenizer.controls["<turn|>"]})
        self.last_stats: GenerationStats | None = None
        self.prompts: list[str] = []
        self.first_sound_at: list[float] = []  # of each spoken prompt: when its first soft tokens came
        self.stopped = 0  # generations that were cancelled
        self._recognizer, self._script, self._step_s = recognizer, script, step_s

    def generate(self, prompt_ids: Sequence[int], params: Any, **options: Any) -> Iterator[int]:
        return self.generate_from([prompt_ids], params, **options)

    def generate_from(
        self, parts: Iterable[Part], params: Any, *, max_new_tokens: int | None, cancel: Any = None
    ) -> Iterator[int]:
        started, finish = time.perf_counter(), "cancelled"
        count = length = 0
        try:
            prompt, length = self._read(parts)
            if cancel is not None and cancel.is_set():
                self.stopped += 1
                return
            self.prompts.append(prompt)
            for token in self.tokenizer.encode(self._script(prompt)):
                time.sleep(self._step_s)
                if cancel is not None and cancel.is_set():
                    self.stopped += 1
                    return
                count += 1
                yield token
                if count == max_new_tokens:
                    finish = "length"
                    return
            finish = "stop"
        finally:
            spent_s = time.perf_counter() - started
            ended: EngineFinish = finish  # type: ignore[assignment]
            self.last_stats = GenerationStats(length, count, spent_s, spent_s, 0.0, count, ended)

    def _read(self, parts: Iterable[Part]) -> tuple[str, int]:
        text, rows, length = "", [], 0
        for part in parts:
            if isinstance(part, Soft):
                if not rows:
                    self.first_sound_at.append(time.perf_counter())
                rows.append(part.rows)
                length += len(part.rows)
            elif isinstance(part, Sequence):
                if rows:
                    text += f"⟨{self._recognizer.phrase(np.concatenate(rows))}⟩"
                    rows = []
                text += self.tokenizer.decode(list(part), skip_special=False)
                length += len(part)
        return text, length


@contextmanager
def hearing_brain(
    phrases: Sequence[str],
    script: Callable[[str], str],
    *,
    context: int = 4096,
    step_s: float = 0.0,
) -> Iterator[tuple[Brain, HearingEngine]]:
    tokenizer = tokenizer_pair("nano")[1]
    controls = tokenizer.controls
    tokens = AudioTokens(controls["<|audio|>"], controls["<|audio>"], controls["<audio|>"])
    encoder = PhraseEncoder(tokens)
    engine = HearingEngine(Recognizer(encoder, phrases), script, context=context, step_s=step_s)
    template = ChatTemplate((NANO.parent / "chat_template.jinja").read_text(), {"bos_token": "<bos>"})
    ears = Ears(encoder)  # type: ignore[arg-type]
    with Service(engine, tokenizer, template, model_name="phrases", ears=ears) as service:
        yield make_brain(service, context, lambda m, t: template.encode(tokenizer, m, t), ears), engine


def last_turn(prompt: str) -> tuple[str, str]:
    """(what the user said last, what the model's turn holds so far)."""
    user, _, rest = prompt.rpartition("<|turn>user\n")[2].partition("<turn|>")
    return re.sub(r"<\|audio>⟨|⟩<audio\|>", "", user), rest.rpartition("<|turn>model\n")[2]


class Seen:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.turns: list[Turn] = []
        self._changed = threading.Condition()

    def heard(self, turn: Turn) -> None:
        self._add(f"heard {turn.number}")

    def called(self, turn: Turn, call: Call) -> None:
        self._add(f"called {call.name}: {call.outcome.done}")

    def sentence(self, turn: Turn, text: str) -> None:
        self._add(f"said {text}")

    def finished(self, turn: Turn) -> None:
        self.turns.append(turn)
        self._add(f"finished {turn.number}")

    def wait_for(self, line: str, timeout_s: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: line in self.lines, timeout_s), (line, self.lines)

    def _add(self, line: str) -> None:
        with self._changed:
            self.lines.append(line)
            self._changed.notify_all()
