"""Sounds for tests: real synthesised speech, and waveforms that are hard on a front end.

`data/speech.flac` is espeak-ng's, 6.1 s at 22,050 Hz: espeak-ng -v en-us -s 150 -w speech.wav "Turn on the
kitchen light, please. What was the highest temperature in the greenhouse yesterday?"
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gemma_edge.runtime.audio.files import read_mono

SPEECH = Path(__file__).parent.parent / "data" / "speech.flac"
RATE = 16_000  # Hz


def speech(rate: int = RATE) -> np.ndarray:
    return read_mono(SPEECH, rate)


def waveforms() -> dict[str, np.ndarray]:
    """Mono, 16 kHz, full scale 1."""
    random = np.random.default_rng(0)
    t = np.arange(2 * RATE) / RATE
    chord = sum(np.sin(2 * np.pi * hz * t) * np.exp(-t * hz / 400) for hz in (220, 277.2, 329.6, 440, 1318.5))
    sweep = np.sin(2 * np.pi * (20 * t + (7900 - 20) / 4 * t**2))
    step = np.where(np.arange(2 * RATE) % 3000 < 40, 1.0, 0.0)
    sounds = dict(
        speech=speech(),
        noise=random.normal(size=len(t)) * 0.1,
        sweep=sweep,
        chord=chord / np.abs(chord).max() * 0.8,
        loud_tone=np.sin(2 * np.pi * 100 * t),
        clipped=np.clip(speech() * 30, -1, 1),
        silence=np.zeros(len(t)),
        clicks=step,
        quiet=random.normal(size=len(t)) * 1e-6,
        over_full_scale=sweep * 4,
        offset=np.full(len(t), 0.7),
    )
    return {name: sound.astype(np.float32) for name, sound in sounds.items()}
