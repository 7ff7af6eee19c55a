"""Time from end of speech to first token: heard while it is spoken, against waiting for the whole clip.

python bench/voice.py BUNDLE [--lengths 2 5 10 30] [--repeats 5] [--threads N] [--speed 1]

Streamed: sound comes in blocks of 32 ms at the pace of real time, and is encoded and prefilled as it comes.
Whole: the clip is there at once; then it is encoded, in larger pieces, and prefilled. Both end when the first
token is chosen. The two take turns, so that other work on the machine meets both. Medians over repeats.
The sound is noise in syllables; what is said does not change the work.
"""

from __future__ import annotations

import argparse
import io
import sys
import threading
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, median, print_json, print_machine

from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.sounds import Ears, Feed, Sound, open_ears
from gemma_edge.runtime.stats import memory_use
from gemma_edge.runtime.tokenizer import load_tokenizer

RATE = 16_000  # Hz
BLOCK = 512  # samples, as the voice assistant's
NEVER = threading.Event()
GOAL_S, GOAL = 10.0, 5.0  # at so many seconds streamed must be so many times shorter


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("hearing_bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("--lengths", type=float, nargs="+", default=[2.0, 5.0, 10.0, 30.0], metavar="S")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--speed", type=float, default=1.0, help="of the speaker: for a quick check only")
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    bundle = open_bundle(args.hearing_bundle)
    ears = open_ears(bundle, threads=args.threads)
    if ears is None:
        print(f"{args.hearing_bundle}: hears nothing; export a model with an audio_config", file=sys.stderr)
        return 1
    engine = Engine(bundle, threads=args.threads)
    prompt = prompt_of(bundle, ears)
    bench = Bench(engine, ears, prompt, args.speed)
    recipe, threads = bundle.manifest.recipe, ears.encoder.threads
    print(f"{bundle.name}: recipe {recipe}, context {engine.context}, {threads} threads, {memory_use()}")
    bench.warm_up()
    rows = []
    for length_s in args.lengths:
        need = len(prompt) + 2 + int(length_s * ears.encoder.audio.tokens_per_s) + 1
        if length_s > ears.encoder.max_s or need >= engine.context:
            print(f"{length_s:g} s: left out; at most {ears.encoder.max_s:g} s, {engine.context} tokens")
            continue
        rows.append(bench.row(length_s, args.repeats))
    if rows:
        print_verdict(rows)
    print_json(
        {
            "bench": "voice",
            "bundle": bundle.name,
            "recipe": recipe,
            "context": engine.context,
            "threads": threads,
            "speed": args.speed,
            "repeats": args.repeats,
            "rows": rows,
            "machine": about,
        }
    )
    return 0


def prompt_of(bundle: Bundle, ears: Ears) -> list[int]:
    """A user's turn that is one sound."""
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)
    prompt = template.encode(tokenizer, [{"role": "user", "content": [{"type": "audio"}]}], [])
    if prompt.count(ears.tokens.placeholder) != 1:
        print("the chat template has no place for a sound; it goes into the middle of a typed turn")
        prompt = template.encode(tokenizer, [{"role": "user", "content": "Yes"}], [])
        prompt.insert(len(prompt) // 2, ears.tokens.placeholder)
    return prompt


class Bench:
    """One engine, its ears, and a prompt with a place for one sound."""

    def __init__(self, engine: Engine, ears: Ears, prompt: list[int], speed: float) -> None:
        self._engine, self._ears, self._prompt, self._speed = engine, ears, prompt, speed

    def warm_up(self) -> None:
        self._first_token(self._wav(syllables(1.0, 0)))

    def row(self, length_s: float, repeats: int) -> dict[str, Any]:
        streamed: list[float] = []
        whole: list[float] = []
        same = 0
        for seed in range(repeats):
            sound = syllables(length_s, seed)
            seconds, heard = self.streamed(sound)
            streamed.append(seconds)
            start = time.perf_counter()
            token = self._first_token(self._wav(sound))
            whole.append(time.perf_counter() - start)
            same += token == heard
        row = {
            "sound_s": length_s,
            "streamed_s": round(median(streamed), 4),
            "streamed_min_s": round(min(streamed), 4),
            "streamed_max_s": round(max(streamed), 4),
            "whole_s": round(median(whole), 4),
            "whole_min_s": round(min(whole), 4),
            "whole_max_s": round(max(whole), 4),
            "ratio": round(median(whole) / median(streamed), 2),
            "ratio_of_best": round(min(whole) / min(streamed), 2),  # what other work takes away is not in it
            "same_first_token": same,
        }
        print(
            f"{length_s:g} s of sound: streamed {_ms(row, 'streamed')}, whole {_ms(row, 'whole')}; "
            f"{row['ratio']} times shorter (best of each: {row['ratio_of_best']}); "
            f"same first token {same} of {repeats}",
            flush=True,
        )
        return row

    def streamed(self, sound: np.ndarray) -> tuple[float, int | None]:
        """Seconds from the end of the sound to the first token, and the token."""
        feed = Feed(RATE, max_s=len(sound) / RATE + 1)
        speaker = threading.Thread(target=self._speak, args=(feed, sound), daemon=True)
        speaker.start()
        token = self._first_token(feed)
        now = time.perf_counter()
        speaker.join()
        assert feed.ended_at is not None
        return now - feed.ended_at, token

    def _speak(self, feed: Feed, sound: np.ndarray) -> None:
        due_at = time.perf_counter()
        for start in range(0, len(sound), BLOCK):
            block = sound[start : start + BLOCK]
            due_at += len(block) / RATE / self._speed
            time.sleep(max(0.0, due_at - time.perf_counter()))
            feed.put(block)
        feed.end()

    def _first_token(self, sound: Sound) -> int | None:
        """None: the model ended at once."""
        parts = self._ears.parts(self._prompt, [sound], NEVER)
        tokens = self._engine.generate_from(parts, max_new_tokens=1)
        return next(iter(tokens), None)

    @staticmethod
    def _wav(sound: np.ndarray) -> bytes:
        data = io.BytesIO()
        with wave.open(data, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(sound.tobytes())
        return data.getvalue()


def syllables(length_s: float, seed: int) -> np.ndarray:
    """Noise that swells four times a second: int16, mono."""
    random = np.random.default_rng(seed)
    time_s = np.arange(int(length_s * RATE)) / RATE
    loudness = 0.5 - 0.5 * np.cos(2 * np.pi * 4 * time_s)
    return (random.standard_normal(len(time_s)) * loudness * 3000).astype(np.int16)


def _ms(row: dict[str, Any], name: str) -> str:
    """Median and range."""
    middle, low, high = (row[f"{name}{part}_s"] * 1e3 for part in ("", "_min", "_max"))
    return f"{middle:.0f} ms ({low:.0f} to {high:.0f})"


def print_verdict(rows: list[dict[str, Any]]) -> None:
    """The issue's two questions, answered."""
    for row in rows:
        if row["sound_s"] == GOAL_S:
            word = "reached" if row["ratio"] >= GOAL else "missed"
            print(f"at {GOAL_S:g} s: {row['ratio']} times shorter (wanted: {GOAL:g} times): {word}")
    first, last = rows[0], rows[-1]
    print(
        f"from {first['sound_s']:g} s to {last['sound_s']:g} s of sound the streamed time goes from "
        f"{first['streamed_s'] * 1e3:.0f} to {last['streamed_s'] * 1e3:.0f} ms, the whole clip's from "
        f"{first['whole_s'] * 1e3:.0f} to {last['whole_s'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
