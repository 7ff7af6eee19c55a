"""Describes the audio encoder for the manifest: the checkpoint's feature extractor, token ids and limits.

The feature extractor is read as transformers reads it: processor_config.json first, preprocessor_config.json
next, and transformers' defaults for what neither says.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..runtime.bundle import Audio, AudioTokens, MelSettings
from ..runtime.errors import ConfigError
from .audio_geometry import CALL_TOKENS, FRAMES_PER_TOKEN, AudioModel
from .source import read_json

PROCESSOR = "processor_config.json"
PREPROCESSOR = "preprocessor_config.json"
EXTRACTOR_TYPE = "Gemma4AudioFeatureExtractor"
DEFAULT_MAX_TOKENS = 750  # 30 s

# transformers' Gemma4AudioFeatureExtractor.
DEFAULTS: dict[str, float] = dict(
    feature_size=128,
    sampling_rate=16_000,
    frame_length_ms=20.0,
    hop_length_ms=10.0,
    min_frequency=0.0,
    max_frequency=8000.0,
    preemphasis=0.0,
    input_scale_factor=1.0,
    mel_floor=1e-3,
    dither=0.0,
)
# Token ids, under each of the names that configs have.
TOKEN_KEYS = {
    "placeholder": ("audio_token_id",),
    "begin": ("boa_token_id", "boa_token_index"),
    "end": ("eoa_token_id", "eoa_token_index"),
}
DEFAULT_TOKENS = {"placeholder": 258_881, "begin": 256_000, "end": 258_883}


def describe_audio(model: AudioModel, config: dict[str, Any], folder: Path, *, vocab_size: int) -> Audio:
    """The manifest's description of `folder`'s audio encoder. Raises ConfigError."""
    mel = read_mel_settings(folder)
    if mel.bins != model.mel_bins:
        raise ConfigError(
            f"{folder}: the feature extractor makes {mel.bins} log-mel bins, audio_config's "
            f"subsampling_conv_channels {list(model.channels)} take {model.mel_bins}; "
            "they do not belong together"
        )
    return Audio(
        hidden_size=model.text_hidden_size,
        frames_per_token=FRAMES_PER_TOKEN,
        tokens_per_s=mel.sampling_rate / mel.hop_length / FRAMES_PER_TOKEN,
        max_tokens=_max_tokens(folder),
        chunk_tokens=model.block,
        call_tokens=CALL_TOKENS,
        mel=mel,
        tokens=_tokens(config, str(folder / "config.json"), vocab_size),
        state=model.state,
    )


def read_mel_settings(folder: Path) -> MelSettings:
    """The feature extractor's settings in samples and Hz. Raises ConfigError."""
    given, where = _extractor(folder)
    if (kind := given.get("feature_extractor_type", EXTRACTOR_TYPE)) != EXTRACTOR_TYPE:
        raise ConfigError(
            f"{where}: feature_extractor_type {kind!r} is not supported, expected {EXTRACTOR_TYPE}"
        )
    reader = _Reader(given, where)
    if reader.number("dither"):
        raise ConfigError(f"{where}: dither adds random noise to sounds and is not supported, expected 0")
    rate, bins = int(reader.number("sampling_rate", above=0)), int(reader.number("feature_size", above=0))
    frame = reader.samples("frame_length", rate)
    fft = 2 ** math.ceil(math.log2(frame)) * (2 if given.get("fft_overdrive") else 1)
    low, high = reader.number("min_frequency"), reader.number("max_frequency", above=0)
    if not 0 <= low < high <= rate / 2:
        raise ConfigError(f"{where}: frequencies {low} to {high} Hz, expected a range within 0 to {rate / 2}")
    return MelSettings(
        sampling_rate=rate,
        bins=bins,
        frame_length=frame,
        hop_length=reader.samples("hop_length", rate),
        fft_length=fft,
        min_frequency=low,
        max_frequency=high,
        mel_floor=reader.number("mel_floor", above=0),
        preemphasis=reader.number("preemphasis"),
        preemphasis_htk_flavor=bool(given.get("preemphasis_htk_flavor", True)),
        input_scale_factor=reader.number("input_scale_factor"),
        per_bin_mean=reader.per_bin("per_bin_mean", bins),
        per_bin_stddev=reader.per_bin("per_bin_stddev", bins),
    )


class _Reader:
    """Reads numbers out of the feature extractor's settings, naming file and field when one is wrong."""

    def __init__(self, given: dict[str, Any], where: str) -> None:
        self._given = given
        self._where = where

    def number(self, key: str, *, above: float | None = None) -> float:
        value = self._given.get(key)
        value = DEFAULTS[key] if value is None else value
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not good or (above is not None and value <= above):
            expected = "a number" if above is None else f"a number above {above}"
            raise ConfigError(f"{self._where}: {key} is {value!r}, expected {expected}")
        return float(value)

    def samples(self, key: str, rate: int) -> int:
        """A length given in milliseconds. Saved extractors say it in samples, which transformers ignores."""
        length = round(rate * self.number(f"{key}_ms", above=0) / 1000)
        if (said := self._given.get(key, length)) != length:
            raise ConfigError(
                f"{self._where}: {key} is {said!r}, but transformers takes {key}_ms and comes to {length}; "
                "write the milliseconds"
            )
        if length < 1:
            raise ConfigError(f"{self._where}: {key}_ms is less than a sample, expected at least one")
        return length

    def per_bin(self, key: str, bins: int) -> tuple[float, ...] | None:
        value = self._given.get(key)
        if value is None:
            return None
        while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
            value = value[0]  # saved as (1, 1, bins)
        if not isinstance(value, list) or len(value) != bins or not all(map(_is_number, value)):
            raise ConfigError(f"{self._where}: {key}: expected {bins} numbers")
        if key == "per_bin_stddev" and not all(value):
            raise ConfigError(f"{self._where}: {key} has a zero, expected numbers to divide by")
        return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _extractor(folder: Path) -> tuple[dict[str, Any], str]:
    """The feature extractor's settings and where they are from."""
    nested = read_json(folder / PROCESSOR)
    for key in ("feature_extractor", "audio_processor"):
        if isinstance(nested.get(key), dict):
            return nested[key], f"{folder / PROCESSOR}: {key}"
    flat = read_json(folder / PREPROCESSOR)
    # The file may be an image processor's, under the same name.
    is_extractor = "feature_extractor_type" in flat or "feature_size" in flat
    return (flat if is_extractor else {}), str(folder / PREPROCESSOR)


def _max_tokens(folder: Path) -> int:
    limit = read_json(folder / PROCESSOR).get("audio_seq_length", DEFAULT_MAX_TOKENS)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"{folder / PROCESSOR}: audio_seq_length is {limit!r}, expected a positive integer")
    return limit


def _tokens(config: dict[str, Any], where: str, vocab_size: int) -> AudioTokens:
    found: dict[str, int] = {}
    for name, keys in TOKEN_KEYS.items():
        value = next((config[key] for key in keys if config.get(key) is not None), DEFAULT_TOKENS[name])
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < vocab_size:
            raise ConfigError(f"{where}: {keys[0]} is {value!r}, expected a token id under {vocab_size}")
        found[name] = value
    return AudioTokens(**found)
