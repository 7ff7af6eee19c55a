"""Endless batches of dialogues for training, packed into rows; drawn by worker processes, seeded."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .corpus import Encoder, Messages, random_dialogue
from .hearing import ALPHABET, MAX_SAMPLES, TOKEN, soft_tokens
from .speech import RATE_HZ, UNKNOWN, Speech, random_speaker, say
from .spoken import spoken_dialogue

ROW = 1536  # tokens; longer dialogues are left out
USES = 2  # of one spoken sentence: each time in another room, with other noise


class Batches(IterableDataset[dict[str, Tensor]]):
    """Packed rows of text dialogues; each worker draws its own."""

    def __init__(self, folder: Path, seed: int, rows: int, row: int = ROW) -> None:
        self.folder, self.seed, self.rows, self.row = folder, seed, rows, row

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng, encoder = _start(self.folder, self.seed)
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        while True:
            rows = _Rows(self.rows, self.row)
            for r in range(self.rows):
                while True:
                    while len(waiting) < 12:
                        dialogue = encoder.encode(*random_dialogue(rng))
                        if len(dialogue[0]) <= self.row:
                            waiting.append(dialogue)
                    fitting = [i for i, (ids, _) in enumerate(waiting) if len(ids) <= rows.room(r)]
                    if not fitting:
                        break
                    rows.add(r, *waiting.pop(max(fitting, key=lambda i: len(waiting[i][0]))))
            yield rows.tensors()


class SpokenBatches(IterableDataset[dict[str, Tensor]]):
    """Packed rows of dialogues with spoken turns, their clips in the order of the rows, and what is said.

    `clips` (clips, MAX_SAMPLES) int16, clean speech; `samples` (clips,): 0 for one that is not used; `sounds`
    (clips, tokens): the class of each soft token; `words` (clips, tokens): the text's token that is
    known there, 0 for none; `said` (clips, chars): the sentence, 0 behind it.
    """

    def __init__(self, folder: Path, seed: int, rows: int, clips: int, row: int = ROW) -> None:
        self.folder, self.seed, self.rows, self.row, self.clips = folder, seed, rows, row, clips

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng, encoder = _start(self.folder, self.seed)
        waiting: list[_Spoken] = []
        while True:
            rows = _Rows(self.rows, self.row)
            clips = np.zeros((self.clips, MAX_SAMPLES), np.int16)
            samples = np.zeros(self.clips, np.int64)
            sounds = np.full((self.clips, soft_tokens(MAX_SAMPLES + 1)), UNKNOWN, np.int64)
            words = np.full_like(sounds, UNKNOWN)
            said: list[str] = []
            for r in range(self.rows):
                while True:
                    while len(waiting) < 24:
                        waiting += _draw(rng, encoder, self.row)
                        rng.shuffle(waiting)
                    fitting = [
                        i
                        for i, (ids, _, spoken) in enumerate(waiting)
                        if len(ids) <= rows.room(r) and len(said) + len(spoken) <= self.clips
                    ]
                    if not fitting:
                        break
                    ids, learned, spoken = waiting.pop(fitting[0])
                    rows.add(r, ids, learned)
                    for clip in spoken:
                        at = len(said)
                        clips[at, clip.before : clip.before + len(clip.speech.samples)] = (
                            clip.speech.samples * 32767
                        )
                        samples[at] = clip.length
                        count = soft_tokens(clip.length)
                        sounds[at, :count] = clip.speech.sounds_at(np.arange(count) * TOKEN - clip.before)
                        words[at, :count] = known_words(
                            encoder, clip.text, clip.before + clip.speech.ends, count
                        )
                        said.append(clip.text)
            yield rows.tensors() | {
                "clips": torch.from_numpy(clips),
                "samples": torch.from_numpy(samples),
                "sounds": torch.from_numpy(sounds),
                "words": torch.from_numpy(words),
                "said": torch.from_numpy(characters(said, self.clips)),
            }


@dataclass(frozen=True)
class _Clip:
    """A sentence with silence around it."""

    text: str
    speech: Speech
    before: int  # samples
    length: int  # samples, silence included


_Spoken = tuple[np.ndarray, np.ndarray, list[_Clip]]  # ids, learned, clips


def characters(texts: list[str], count: int) -> np.ndarray:
    """(count, longest) int64: the texts' characters by number, 0 beyond them."""
    numbers = [[ALPHABET.index(c) + 1 for c in text.lower() if c in ALPHABET] for text in texts]
    found = np.zeros((count, 160), np.int64)
    for row, line in zip(found, numbers, strict=False):
        row[: len(line)] = line[:160]
    return found


def _draw(rng: random.Random, encoder: Encoder, row: int) -> list[_Spoken]:
    """One spoken dialogue, as heard in several rooms; none if it is too long."""
    messages, tools = spoken_dialogue(rng)
    speaker = random_speaker(rng)
    speech = [(text, say(text, speaker)) for text in spoken_texts(messages)]
    found: list[_Spoken] = []
    for _ in range(USES):
        clips = []
        for text, said in speech:
            before, after = silence(rng)
            clips.append(_Clip(text, said, before, before + len(said.samples) + after))
        if any(clip.length > MAX_SAMPLES for clip in clips):
            continue
        ids, learned = encoder.encode(messages, tools, [soft_tokens(clip.length) for clip in clips])
        if len(ids) <= row:
            found.append((ids, learned, clips))
    return found


def silence(rng: random.Random) -> tuple[int, int]:
    """Samples of it before and after a sentence; an ear that waits for the end of speech hears the second."""
    return int(RATE_HZ * rng.uniform(0.05, 0.45)), int(RATE_HZ * rng.uniform(0.15, 0.6))


def known_words(encoder: Encoder, text: str, ends: np.ndarray, count: int) -> np.ndarray:
    """(count,) int64: the text's tokens, one a soft token, each when its word has been said; 0 elsewhere.

    `ends`: the sample at which each word ends. If the clip is too short for all, the last come earlier.
    """
    encoded = encoder.tokenizer.encode(text, add_special_tokens=False)
    last = [match.end() for match in re.finditer(r"\S+", text)]
    found = np.zeros(count, np.int64)
    places: list[int] = []
    for _, end in encoded.offsets:
        word = next(i for i, place in enumerate(last) if place >= end)
        due = int(ends[word] // TOKEN) + 1
        places.append(max(due, places[-1] + 1 if places else 0))
    for behind, index in enumerate(range(len(places) - 1, -1, -1)):
        places[index] = min(places[index], count - 1 - behind)
    if places and places[0] >= 0:
        found[places] = encoded.ids
    return found


def spoken_texts(messages: Messages) -> list[str]:
    """What is said in the dialogue, in order."""
    return [
        part["say"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "audio"
    ]


def _start(folder: Path, seed: int) -> tuple[random.Random, Encoder]:
    worker = get_worker_info()
    torch.set_num_threads(1)
    return random.Random(f"{seed}/{worker.id if worker else 0}"), Encoder(folder)


class _Rows:
    """Rows being filled with dialogues."""

    def __init__(self, rows: int, row: int) -> None:
        self._ids = np.zeros((rows, row), dtype=np.int64)
        self._document = np.full((rows, row), -1, dtype=np.int32)
        self._position = np.zeros((rows, row), dtype=np.int64)
        self._learned = np.zeros((rows, row), dtype=bool)
        self._used, self._count = [0] * rows, [0] * rows

    def room(self, r: int) -> int:
        return self._ids.shape[1] - self._used[r]

    def add(self, r: int, ids: np.ndarray, learned: np.ndarray) -> None:
        place = slice(self._used[r], self._used[r] + len(ids))
        self._ids[r, place], self._document[r, place] = ids, self._count[r]
        self._position[r, place], self._learned[r, place] = np.arange(len(ids)), learned
        self._used[r], self._count[r] = place.stop, self._count[r] + 1

    def tensors(self) -> dict[str, Any]:
        fields = {
            "ids": self._ids,
            "document": self._document,
            "position": self._position,
            "learned": self._learned,
        }
        return {name: torch.from_numpy(values) for name, values in fields.items()}
