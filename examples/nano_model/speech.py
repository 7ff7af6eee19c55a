"""Speech for the corpus: espeak-ng in many voices, and when it says what; seeded, nothing is stored.

`held_out=True` takes voices, an accent and rates that training never uses.
"""

from __future__ import annotations

import ctypes
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import espeakng_loader
import numpy as np

RATE_HZ = 16_000
_SYNCHRONOUS = 2
_UTF8 = 1
_PHONEME_EVENTS = 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER

ACCENTS = ("en", "en-us", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-us-nyc", "en-029")
HELD_OUT_ACCENTS = ("en", "en-us", "en-gb-x-gbcwmd", "en-us-nyc")
VARIANTS = (
    """
f1 f2 f3 f5 m1 m2 m4 m5 m6 m8 Alex Andrea Andy Annie Denis Diogo Gene Henrique Hugo Jacky Lee Mario Michael
Mike Nguyen adam anika announcer antonio aunty belinda benjamin boris david ed edward gustave iven iven3 john
kaukovalta klatt klatt3 klatt5 linda marcelo max miguel norbert paul pedro quincy rob sandro shelby steph3
travis victor zac grandma grandpa
"""
).split()
HELD_OUT_VARIANTS = "f4 m3 m7 Alicia Marco caleb michel pablo robert steph klatt2 Gene2".split()
# Words a minute.
RATES = ((110, 148), (163, 198), (213, 240))
HELD_OUT_RATES = ((150, 161), (200, 211))


@dataclass(frozen=True)
class Speaker:
    """How one voice speaks."""

    voice: str  # "en-us+f3"
    rate: int  # words a minute
    pitch: int  # 0 to 99
    range: int  # of the pitch


def random_speaker(rng: random.Random, *, held_out: bool = False) -> Speaker:
    """A voice of the training set, or with `held_out` one that training never hears, at other rates."""
    accent = rng.choice(HELD_OUT_ACCENTS if held_out else ACCENTS)
    variant = rng.choice(HELD_OUT_VARIANTS if held_out else VARIANTS)
    rate = rng.randint(*rng.choice(HELD_OUT_RATES if held_out else RATES))
    return Speaker(f"{accent}+{variant}", rate, rng.randint(25, 75), rng.randint(25, 75))


# espeak-ng's phonemes for English, without stress marks. A sound's class is its place, from 1; 0 is silence.
PHONEMES = (
    """
t n s l r d I m @ D E p k f z w v aI i @2 i: I2 3 b 0 eI g a a# h V tS 3: u: oU ; o@ T A@ aU N O: O@ t# S e@
dZ j r- @L aa O2 I# t2 i@ U OI t[ w# A: VR @5 @- aI2 Z U@ IR aI@ i@3 aI3
"""
).split()
_CLASSES = {phoneme: number for number, phoneme in enumerate(PHONEMES, start=1)}
UNKNOWN = -100  # a class that no loss looks at


@dataclass(frozen=True)
class Speech:
    """What somebody said."""

    samples: np.ndarray  # (n,) float32 at 16 kHz, peak 1, no silence around
    starts: np.ndarray  # (sounds,) the sample at which each sound begins
    sounds: np.ndarray  # (sounds,) their classes
    ends: np.ndarray  # (words,) the sample at which each word of the text has been said

    def sounds_at(self, samples: np.ndarray) -> np.ndarray:
        """The class of the sound at each of these samples; silence outside."""
        index = np.searchsorted(self.starts, samples, side="right") - 1
        inside = (index >= 0) & (samples < len(self.samples))
        return np.where(inside, self.sounds[np.maximum(index, 0)], 0)


class _Name(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Name),
    )


_LIST_TERMINATED, _WORD, _PHONEME = 0, 1, 7


class _Espeak:
    """The library, one for each process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path()
        self._variants = Path(data) / "voices" / "!v"
        self.rate_hz: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _PHONEME_EVENTS)
        if self.rate_hz <= 0:
            raise RuntimeError("espeak-ng could not be started; reinstall espeakng-loader")
        self._chunks: list[np.ndarray] = []
        self._marks: list[tuple[int, str]] = []
        self._words: list[tuple[int, int]] = []
        kind = ctypes.CFUNCTYPE(
            ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
        )
        self._callback = kind(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count: int, events) -> int:  # type: ignore[no-untyped-def]
        if count > 0 and samples:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while events and events[index].type != _LIST_TERMINATED:
            if events[index].type == _WORD:
                self._words.append((events[index].sample, events[index].text_position - 1))
            if events[index].type == _PHONEME:
                self._marks.append((events[index].sample, events[index].id.string.decode("utf-8", "replace")))
            index += 1
        return 0

    def say(
        self, text: str, speaker: Speaker
    ) -> tuple[np.ndarray, list[tuple[int, str]], list[tuple[int, int]]]:
        """(samples,) int16 at `rate_hz`; (sample, phoneme) of each sound; (sample, place) of each word.

        A place is that in `text`. A number may be several words: "37" is thirty and seven.
        """
        self._chunks.clear()
        self._marks.clear()
        self._words.clear()
        _, _, variant = speaker.voice.partition("+")
        known = not variant or (self._variants / variant).is_file()  # espeak-ng speaks without an unknown one
        if not known or self._library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {speaker.voice!r}")
        for parameter, value in ((_RATE, speaker.rate), (_PITCH, speaker.pitch), (_RANGE, speaker.range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        data = text.encode()
        self._library.espeak_SetSynthCallback(self._callback)  # others may have set theirs
        self._library.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        samples = np.concatenate(self._chunks) if self._chunks else np.zeros(0, np.int16)
        return samples, list(self._marks), list(self._words)


@cache
def _espeak() -> _Espeak:
    return _Espeak()


def say(text: str, speaker: Speaker) -> Speech:
    """`text` spoken. Raises ValueError if there is nothing to hear."""
    espeak = _espeak()
    raw, marks, words = espeak.say(text, speaker)
    samples = raw.astype(np.float32)
    loud = np.flatnonzero(np.abs(samples) > 30)
    if not len(loud):
        raise ValueError(f"espeak-ng says nothing to {text!r}")
    samples = resample(samples[loud[0] : loud[-1] + 1], espeak.rate_hz)

    def here(places: list[int]) -> np.ndarray:
        return (np.array(places) - loud[0]) * RATE_HZ / espeak.rate_hz

    sounds = np.array([_sound_class(phoneme) for _, phoneme in marks])
    starts = here([sample for sample, _ in marks])
    ends = _ends(text, here([sample for sample, _ in words]), [place for _, place in words])
    pauses = starts[sounds == 0]
    for word, end in enumerate(ends):  # a pause behind a word is not part of it
        begin = ends[word - 1] if word else 0.0
        inside = pauses[(pauses > begin + RATE_HZ * 0.03) & (pauses < end)]
        ends[word] = min(inside[-1] if len(inside) else end, len(samples))
    return Speech(samples / max(1e-6, float(np.abs(samples).max())), starts, sounds, ends)


def _ends(text: str, samples: np.ndarray, places: list[int]) -> np.ndarray:
    """When the word behind each word of `text` begins; infinity where none does."""
    begins = []
    for word in re.finditer(r"\S+", text):
        said = [s for s, place in zip(samples, places, strict=True) if word.start() <= place < word.end()]
        begins.append(min(said, default=np.nan))
    following = np.append(np.array(begins[1:]), np.inf)
    for word in range(len(following) - 2, -1, -1):  # nothing was said of a word: it ends with the one before
        if np.isnan(following[word]):
            following[word] = following[word + 1]
    return following


def _sound_class(phoneme: str) -> int:
    bare = phoneme.lstrip("',")
    return 0 if bare.startswith("_") else _CLASSES.get(bare, UNKNOWN)


def resample(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """To 16 kHz, exact in the band that both rates share (by way of the whole spectrum)."""
    size = -(-len(samples) // 441) * 441  # 16,000 / 22,050 = 320 / 441
    spectrum = np.fft.rfft(samples, size)
    padded = round(size * RATE_HZ / rate_hz)
    kept = np.zeros(padded // 2 + 1, np.complex64)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    count = round(len(samples) * RATE_HZ / rate_hz)
    return (np.fft.irfft(kept, padded)[:count] * (padded / size)).astype(np.float32)
