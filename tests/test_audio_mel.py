"""The log-mel front end against transformers' feature extractor on real sounds, whole and in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4AudioFeatureExtractor

from gemma_edge.export.audio_settings import read_mel_settings
from gemma_edge.runtime.audio import mel as mel_module
from gemma_edge.runtime.audio.mel import LogMel

from .support.sounds import RATE, speech, waveforms

TOLERANCE = 1e-4
SETTINGS: dict[str, dict[str, Any]] = {
    "gemma 4": dict(),
    "htk preemphasis": dict(preemphasis=0.97, feature_size=40, mel_floor=1e-5),
    "plain preemphasis, overdrive": dict(preemphasis=0.9, preemphasis_htk_flavor=False, fft_overdrive=True),
    "per bin, scaled": dict(
        per_bin_mean=[float(bin) / 100 for bin in range(128)],
        per_bin_stddev=[1 + float(bin) / 50 for bin in range(128)],
        input_scale_factor=0.25,
        min_frequency=125.0,
        max_frequency=7500.0,
        frame_length_ms=32.0,
        hop_length_ms=8.0,
    ),
}


def reference(extractor: Gemma4AudioFeatureExtractor, sound: np.ndarray) -> np.ndarray:
    """transformers' frames that are not masked."""
    features = extractor([sound], return_tensors="np")  # a list, as its processor calls it: an array fails
    return features.input_features[0][features.input_features_mask[0]]


def front_end(tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any]) -> LogMel:
    import json

    folder = tmp_path_factory.mktemp("settings")
    (folder / "preprocessor_config.json").write_text(
        json.dumps(fields | dict(feature_size=fields.get("feature_size", 128)))
    )
    return LogMel(read_mel_settings(folder))


@pytest.fixture(scope="module", params=list(SETTINGS))
def pair(request, tmp_path_factory) -> tuple[Gemma4AudioFeatureExtractor, LogMel]:
    fields = SETTINGS[request.param]
    return Gemma4AudioFeatureExtractor(**fields), front_end(tmp_path_factory, fields)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> tuple[Gemma4AudioFeatureExtractor, LogMel]:
    return Gemma4AudioFeatureExtractor(), front_end(tmp_path_factory, {})


def test_sounds(pair):
    extractor, log_mel = pair
    for name, sound in waveforms().items():
        expected = reference(extractor, sound)
        whole = log_mel.whole(sound)
        assert whole.shape == expected.shape == (log_mel.count(len(sound)), extractor.feature_size), name
        assert whole.dtype == np.float32
        assert np.abs(whole - expected).max() < TOLERANCE, name


def test_every_length_near_a_frame(pair):
    extractor, log_mel = pair
    frame, hop = extractor.frame_length, extractor.hop_length
    sound = speech()[5000:]
    half = frame - frame // 2
    edges = {0, half, half + 1, half + hop, half + hop + 1, 127, 128, 129, 160, 161, 320, 321, 479, 480, 481}
    for length in sorted(edges - {0}):
        expected = (
            reference(extractor, sound[:length]) if length > half else np.zeros((0, extractor.feature_size))
        )
        got = log_mel.whole(sound[:length])
        assert got.shape == expected.shape, length
        assert got.size == 0 or np.abs(got - expected).max() < TOLERANCE
    assert log_mel.whole(sound[:0]).shape == (0, extractor.feature_size)


def test_thirty_seconds_as_the_reference_cuts_them(gemma):
    extractor, log_mel = gemma
    sound = np.random.default_rng(1).normal(size=31 * RATE).astype(np.float32) * 0.1
    expected = reference(extractor, sound)  # transformers drops what is beyond 30 s
    assert np.abs(log_mel.whole(sound[: 30 * RATE]) - expected).max() < TOLERANCE
    assert len(expected) == log_mel.count(30 * RATE) == 2999


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 2000), min_size=1, max_size=30))
def test_pieces_of_any_size_give_the_same_frames(gemma, sizes: list[int]):
    _, log_mel = gemma
    sound = speech()[: sum(sizes)]
    stream = log_mel.stream()
    pieces = np.split(sound, np.cumsum(sizes)[:-1])
    streamed = np.concatenate([stream.push(piece) for piece in pieces])
    assert np.abs(streamed - log_mel.whole(sound)).max(initial=0) < 1e-6


def test_many_frames_at_once_are_made_in_parts(gemma, monkeypatch: pytest.MonkeyPatch):
    _, log_mel = gemma
    whole = log_mel.whole(speech())
    monkeypatch.setattr(mel_module, "FRAMES_AT_ONCE", 7)
    assert np.abs(log_mel.whole(speech()) - whole).max() < 1e-6


def test_what_waits_is_less_than_two_frames(gemma):
    """Memory does not grow with the clip."""
    _, log_mel = gemma
    stream = log_mel.stream()
    for _ in range(50):
        stream.push(np.zeros(1234, np.float32))
        assert len(stream._waiting) <= 320
        assert stream._waiting.base is None
