"""Sentences as a recording, one turn each, spoken by espeak-ng: something to hear without a microphone.

    python -m gemma_edge.examples.voice_assistant.say "Lock the front door. Good night." -o talk.wav

Every sentence is followed by a pause that ends a turn.
"""

from __future__ import annotations

import argparse
import sys
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...runtime.errors import ConfigError, GemmaEdgeError
from .config import Speak
from .sentences import Sentences
from .voices import Pcm, Voice, open_voice

LEAD_S = 0.5  # of silence before the first sentence
PAUSE_S = 1.5  # after each; `hangover_s` of the home's settings must be less
MAX_CHARS = 10_000  # a quarter of an hour of speech


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m gemma_edge.examples.voice_assistant.say",
        description="Write a recording in which espeak-ng says each sentence as one turn.",
    )
    parser.add_argument("text", nargs="+", help="one sentence or several")
    parser.add_argument("-o", "--out", metavar="FILE.wav", type=Path, required=True)
    parser.add_argument("--voice", default=Speak().espeak_voice, help="of espeak-ng (default: %(default)s)")
    parser.add_argument("--words-per-minute", type=int, default=Speak().words_per_minute, metavar="N")
    parser.add_argument("--pause", type=float, default=PAUSE_S, metavar="S", help="default: %(default)g s")
    args = parser.parse_args(argv)
    try:
        if not 0 <= args.pause <= 60:
            raise ConfigError(f"--pause: expected 0 to 60 s, got {args.pause:g}")
        if not 80 <= args.words_per_minute <= 450:
            raise ConfigError(f"--words-per-minute: expected 80 to 450, got {args.words_per_minute}")
        settings = Speak(espeak_voice=args.voice, words_per_minute=args.words_per_minute)
        turns = sentences(args.text)
        duration_s = write_recording(args.out, turns, open_voice(settings, "espeak"), pause_s=args.pause)
    except GemmaEdgeError as error:
        print(f"say: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {len(turns)} turns, {duration_s:.1f} s")
    return 0


def sentences(texts: Sequence[str]) -> list[str]:
    """The sentences of some texts; an end of a text is one of a sentence. Raises ConfigError."""
    length = sum(len(text) for text in texts)
    if length > MAX_CHARS:
        raise ConfigError(f"expected at most {MAX_CHARS} characters to say, got {length}; say less")
    found: list[str] = []
    for text in texts:
        cutter = Sentences()
        found += [*cutter.push(text), *cutter.finish()]
    found = [sentence for sentence in found if any(c.isalnum() for c in sentence)]
    if not found:
        raise ConfigError(f"expected a sentence to say, got {' '.join(texts)[:40]!r}")
    return found


def write_recording(path: Path, turns: Sequence[str], voice: Voice, *, pause_s: float = PAUSE_S) -> float:
    """A WAV file of the turns in the voice's rate; its length in seconds. Raises ConfigError."""
    pause = np.zeros(int(pause_s * voice.rate), np.int16)
    parts: list[Pcm] = [np.zeros(int(LEAD_S * voice.rate), np.int16)]
    for turn in turns:
        parts += [*voice.say(turn), pause]
    samples = np.concatenate(parts)
    try:
        with path.open("wb") as raw, wave.open(raw, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(voice.rate)
            file.writeframes(samples.astype("<i2").tobytes())
    except OSError as cause:
        raise ConfigError(f"{path}: cannot be written ({cause.strerror})") from cause
    return len(samples) / voice.rate


if __name__ == "__main__":
    sys.exit(main())
