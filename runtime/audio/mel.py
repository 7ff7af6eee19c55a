"""Log-mel frames as transformers' Gemma 4 feature extractor makes them, whole or as samples arrive.

Frame i looks at `frame_length + 1` samples from `i * hop_length - frame_length // 2` on, with zeros before
the first. A frame counts once all its samples are there, so what is left at the end gives none. Every step
has the reference's number type: rounding errors of a loud tone are what quiet bins are made of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..bundle import MelSettings

Samples = npt.NDArray[np.float32]
Frames = npt.NDArray[np.float32]

FRAMES_AT_ONCE = 1024  # bounds the memory of a long clip: a frame's intermediates are some 10 KB


@dataclass(frozen=True)
class _Tables:
    window: npt.NDArray[np.float32]  # (frame_length,) periodic Hann
    filters: npt.NDArray[np.float64]  # (fft_length / 2 + 1, bins)


class LogMel:
    """Makes frames of mono samples at `settings.sampling_rate`."""

    def __init__(self, settings: MelSettings) -> None:
        self.settings = settings
        self._tables = _Tables(_hann(settings.frame_length), _mel_filters(settings))

    def count(self, samples: int) -> int:
        """Frames of a clip of so many samples."""
        return _count(samples + self.settings.frame_length // 2, self.settings)

    def whole(self, samples: Samples) -> Frames:
        """(samples,) -> (frames, bins)"""
        return self.stream().push(samples)

    def stream(self) -> LogMelStream:
        return LogMelStream(self.settings, self._tables)


class LogMelStream:
    """The frames of one clip, as its samples arrive."""

    def __init__(self, settings: MelSettings, tables: _Tables) -> None:
        self._settings = settings
        self._tables = tables
        self._waiting = np.zeros(settings.frame_length // 2, np.float32)  # samples that later frames need

    def push(self, samples: Samples) -> Frames:
        """(samples,) of any number -> the frames they complete, (frames, bins)"""
        settings = self._settings
        waiting = np.concatenate([self._waiting, samples.astype(np.float32, copy=False)])
        count = _count(len(waiting), settings)
        frames = np.empty((count, settings.bins), np.float32)
        for first in range(0, count, FRAMES_AT_ONCE):
            part = frames[first : first + FRAMES_AT_ONCE]
            start = first * settings.hop_length
            stop = start + (len(part) - 1) * settings.hop_length + settings.frame_length + 1
            part[:] = _log_mel(waiting[start:stop], settings, self._tables)
        self._waiting = waiting[count * settings.hop_length :].copy()
        return frames


def _count(waiting: int, settings: MelSettings) -> int:
    """Whole frames in so many samples, of which the first `frame_length // 2` stand before the clip."""
    return max(0, (waiting - settings.frame_length - 1) // settings.hop_length + 1)


def _log_mel(samples: Samples, settings: MelSettings, tables: _Tables) -> npt.NDArray[np.float64]:
    """(samples,) -> (frames, bins)"""
    if settings.input_scale_factor != 1.0:
        samples = samples * settings.input_scale_factor
    windows = np.lib.stride_tricks.sliding_window_view(samples, settings.frame_length + 1)
    frames = _emphasize(windows[:: settings.hop_length], settings) * tables.window
    magnitudes = np.abs(np.fft.rfft(frames, n=settings.fft_length, axis=-1))  # (frames, fft / 2 + 1)
    log_mel = np.log(magnitudes @ tables.filters + settings.mel_floor)
    if settings.per_bin_mean is not None:
        log_mel = log_mel - np.array(settings.per_bin_mean)
    if settings.per_bin_stddev is not None:
        log_mel = log_mel / np.array(settings.per_bin_stddev)
    return log_mel


def _emphasize(windows: npt.NDArray[np.float32], settings: MelSettings) -> npt.NDArray[np.float32]:
    """(frames, frame_length + 1) -> (frames, frame_length)"""
    amount = settings.preemphasis
    if amount <= 0:
        return windows[:, :-1]
    if not settings.preemphasis_htk_flavor:
        return windows[:, 1:] - amount * windows[:, :-1]
    first = windows[:, :1] * (1.0 - amount)
    return np.concatenate([first, windows[:, 1:-1] - amount * windows[:, :-2]], axis=1)


def _hann(length: int) -> npt.NDArray[np.float32]:
    return np.hanning(length + 1)[:-1].astype(np.float32)


def _mel_filters(settings: MelSettings) -> npt.NDArray[np.float64]:
    """Triangles between neighbours of `bins + 2` points that are evenly spaced on the HTK mel scale."""
    low, high = (
        2595.0 * np.log10(1.0 + hz / 700.0) for hz in (settings.min_frequency, settings.max_frequency)
    )
    points = 700.0 * (np.power(10, np.linspace(low, high, settings.bins + 2) / 2595.0) - 1.0)  # Hz
    frequencies = np.linspace(0, settings.sampling_rate // 2, settings.fft_length // 2 + 1)
    widths = np.diff(points)
    distances = points[None, :] - frequencies[:, None]
    rising = -distances[:, :-2] / widths[:-1]
    falling = distances[:, 2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling))
