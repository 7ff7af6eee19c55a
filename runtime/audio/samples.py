"""Samples of any number type, rate and channel count to mono float32 at one rate, whole or as they arrive."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import AudioError

Mono = npt.NDArray[np.float32]

RATES = (4_000, 384_000)  # Hz
CHANNELS_MAX = 32
# Sound louder than its format allows happens (float files, gain); integers taken for floats are a mistake.
LOUDEST = 16.0

# Integer type -> what stands for silence, and full scale.
_INTEGERS = {"u1": (128, 128.0), "i2": (0, 32_768.0), "i4": (0, 2_147_483_648.0)}


class MonoStream:
    """One clip's samples, as they arrive: channels are averaged; soxr resamples and is a little behind."""

    def __init__(self, *, rate: int, channels: int, to_rate: int) -> None:
        if isinstance(rate, bool) or not RATES[0] <= rate <= RATES[1]:
            raise AudioError(f"a sampling rate of {rate} Hz, expected {RATES[0]} to {RATES[1]}")
        if not 1 <= channels <= CHANNELS_MAX:
            raise AudioError(f"{channels} channels of sound, expected 1 to {CHANNELS_MAX}")
        self._channels = channels
        self._resampler: Any = None
        if rate != to_rate:
            soxr = need("soxr")
            self._resampler = soxr.ResampleStream(rate, to_rate, 1, dtype="float32", quality="HQ")

    def push(self, samples: npt.ArrayLike) -> Mono:
        """(samples,) or (samples, channels) -> the mono samples that are ready, (n,). Raises AudioError."""
        mono = to_mono(samples, self._channels)
        return mono if self._resampler is None else self._resampler.resample_chunk(mono)

    def finish(self) -> Mono:
        """What the resampler still holds."""
        nothing = np.zeros(0, np.float32)
        return nothing if self._resampler is None else self._resampler.resample_chunk(nothing, last=True)


def to_mono(samples: npt.ArrayLike, channels: int) -> Mono:
    """(samples,) or (samples, channels) of any supported type -> (samples,) float32, full scale 1."""
    given = np.asarray(samples)
    if given.ndim == 1 and channels == 1:
        given = given[:, None]
    if given.ndim != 2 or given.shape[1] != channels:
        expected = "(samples,)" if channels == 1 else f"(samples, {channels})"
        raise AudioError(f"samples of shape {given.shape}, expected {expected}")
    return np.ascontiguousarray(_as_float(given).mean(axis=1, dtype=np.float32))


def from_pcm(data: bytes, *, channels: int = 1, width: int = 2) -> npt.NDArray[Any]:
    """Raw little-endian PCM, as Wyoming and WAV have it, as (samples, channels); `width` bytes a sample."""
    types = {1: "u1", 2: "<i2", 4: "<i4"}
    if width not in types:
        raise AudioError(f"PCM of {width} bytes a sample, expected {', '.join(map(str, types))}")
    if channels < 1 or len(data) % (width * channels):
        raise AudioError(
            f"{len(data)} bytes of PCM are no whole number of samples of {channels} x {width} bytes; "
            "check width and channels"
        )
    return np.frombuffer(data, types[width]).reshape(-1, channels)


def need(package: str) -> ModuleType:
    """Import one of the packages of the extra `audio`. Raises AudioError saying how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as cause:  # also OSError's kin: a library that soundfile does not find
        raise AudioError(f"{package} is not installed; pip install 'gemma-edge[audio]'") from cause


def _as_float(given: npt.NDArray[Any]) -> npt.NDArray[np.floating]:
    kind = f"{given.dtype.kind}{given.dtype.itemsize}"
    if kind in _INTEGERS:
        silence, full_scale = _INTEGERS[kind]
        return ((given.astype(np.float64) - silence) / full_scale).astype(np.float32)
    if given.dtype.kind != "f":
        raise AudioError(f"samples of type {given.dtype}, expected uint8, int16, int32 or float")
    if given.size:
        loudest = np.abs(given).max()
        if not np.isfinite(loudest):
            raise AudioError("the samples hold NaN or infinity; expected numbers from -1 to 1")
        if loudest > LOUDEST:
            raise AudioError(
                f"float samples reach {loudest:.6g}, expected -1 to 1; "
                "give integers as integers, or divide them"
            )
    return given
