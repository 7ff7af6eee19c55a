"""AudioEncoder from end to end: speech as transformers' extractor and encoder hear it, whole and streamed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4AudioFeatureExtractor, Gemma4Processor

from gemma_edge.runtime.audio.encoder import AudioEncoder, AudioStream
from gemma_edge.runtime.bundle import Bundle
from gemma_edge.runtime.errors import AudioError, BundleError

from .support.sounds import RATE, SPEECH, speech, waveforms
from .support.tiny_audio import TINY, random_audio_encoder

MODEL = dict(audio=TINY, num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0)
HIDDEN = 64
CLOSE = 1e-4


@pytest.fixture(scope="module")
def bundle(tiny_bundle) -> Bundle:
    return tiny_bundle(model=MODEL).bundle


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> AudioEncoder:
    return AudioEncoder(bundle, threads=1)


def streamed(stream: AudioStream, sound: np.ndarray, sizes: list[int]) -> np.ndarray:
    parts, done = [], 0
    for size in sizes:
        parts.append(stream.push(sound[done : done + size]))
        done += size
    parts += [stream.push(sound[done:]), stream.finish()]
    assert stream.tokens == sum(map(len, parts))
    return np.concatenate(parts)


def test_sounds_as_transformers_hears_them(encoder: AudioEncoder):
    """Extractor with its padding and mask, tower, embedder: the tokens that its model would take."""
    extractor, reference = Gemma4AudioFeatureExtractor(), random_audio_encoder(TINY, HIDDEN, seed=0)
    for name, sound in waveforms().items():
        features = extractor([sound], return_tensors="np")
        expected = reference.soft_tokens(features.input_features[0], features.input_features_mask[0])
        got = encoder.encode(sound, RATE)
        assert got.dtype == np.float32 and got.shape == expected.shape, name
        assert np.abs(got - expected).max() < 1e-3, name
        assert np.abs(streamed(encoder.stream(RATE), sound, [8000] * 3) - got).max() < CLOSE, name


def test_as_many_tokens_as_transformers_puts_placeholders(encoder: AudioEncoder):
    processor = Gemma4Processor.__new__(Gemma4Processor)
    processor.feature_extractor, processor.audio_seq_length = Gemma4AudioFeatureExtractor(), 750
    random = np.random.default_rng(0)
    for samples in (*range(155, 170), 640, 641, 799, 800, 801, 802, 48_000, *random.integers(1, 60_000, 10)):
        expected = processor._compute_audio_num_tokens(np.zeros(samples), RATE)
        assert len(encoder.encode(np.zeros(samples, np.float32), RATE)) == expected, samples


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9000), max_size=12),
    chunk_tokens=st.integers(1, 30),
    length=st.integers(0, 90_000),
)
def test_streaming_equals_the_whole_clip(encoder: AudioEncoder, sizes, chunk_tokens, length):
    sound = speech()[:length]
    got = streamed(encoder.stream(RATE, chunk_tokens=chunk_tokens), sound, sizes)
    assert np.abs(got - encoder.encode(sound, RATE)).max(initial=0) < CLOSE


def test_other_rates_and_channels(encoder: AudioEncoder):
    sound = np.stack([speech(44_100)] * 2, axis=1)
    whole = encoder.encode(sound, 44_100)
    stream = encoder.stream(44_100, 2)
    assert np.abs(streamed(stream, sound, [5000, 1, 70_000]) - whole).max() < CLOSE
    assert len(whole) == len(encoder.encode(speech(), RATE))
    integers = (sound * 32_767).astype(np.int16)
    assert np.abs(encoder.encode(integers, 44_100) - whole).max() < 0.2  # of about 3


def test_a_file_is_its_samples(encoder: AudioEncoder):
    sound, rate = soundfile.read(SPEECH, dtype="float32")
    expected = encoder.encode(sound, rate)
    for source in (SPEECH, SPEECH.read_bytes()):
        assert np.abs(encoder.encode_file(source) - expected).max() < CLOSE
    assert len(expected) == 154  # 6.14 s


def test_tokens_come_while_the_sound_arrives(encoder: AudioEncoder):
    """After every push all whole chunks are out; `finish` has less than a chunk left."""
    stream, samples = encoder.stream(RATE, chunk_tokens=4), 0
    for _ in range(40):
        stream.push(speech()[samples : samples + 1600])
        samples += 1600
        frames = encoder.log_mel.count(samples)
        assert frames // 4 - 4 < stream.tokens <= frames // 4
    before = stream.tokens
    assert len(stream.finish()) == stream.tokens - before <= 4


def test_streams_do_not_disturb_each_other(encoder: AudioEncoder):
    first, second = encoder.stream(RATE), encoder.stream(RATE)
    parts = []
    for start in range(0, 32_000, 4000):
        parts.append(first.push(speech()[start : start + 4000]))
        second.push(waveforms()["noise"][start : start + 4000])
    parts.append(first.finish())
    assert np.abs(np.concatenate(parts) - encoder.encode(speech()[:32_000], RATE)).max() < CLOSE


def test_short_clips_have_no_token(encoder: AudioEncoder):
    for samples in (0, 1, 160):
        assert encoder.encode(np.zeros(samples, np.float32), RATE).shape == (0, HIDDEN)
    assert encoder.encode(np.zeros(161, np.float32), RATE).shape == (1, HIDDEN)


def test_silence_and_clipping_are_sounds(encoder: AudioEncoder):
    for sound in (np.zeros(RATE, np.float32), np.sign(speech())[:RATE], np.full(RATE, -32_768, np.int16)):
        tokens = encoder.encode(sound, RATE)
        assert tokens.shape == (25, HIDDEN) and np.isfinite(tokens).all()


def test_what_is_too_long_is_refused(encoder: AudioEncoder, tmp_path: Path):
    assert encoder.max_s == 30.0
    assert len(encoder.encode(np.zeros(30 * RATE, np.float32), RATE)) == 750
    with pytest.raises(AudioError, match=r"more than 30 s of sound"):
        encoder.encode(np.zeros(30 * RATE + 1000, np.float32), RATE)
    three_hours = np.broadcast_to(
        np.zeros((), np.float32), (3 * 3600 * RATE,)
    )  # takes no memory until it is used
    tracemalloc.start()
    with pytest.raises(AudioError, match=r"more than 30 s of sound"):
        encoder.encode(three_hours, RATE)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(31 * RATE), RATE)
    with pytest.raises(AudioError, match=r"long\.wav: 31\.0 s of sound, expected at most 30 s"):
        encoder.encode_file(path)
    stream = encoder.stream(RATE, max_tokens=10)
    stream.push(np.zeros(6000, np.float32))
    with pytest.raises(AudioError, match=r"more than 0\.4 s"):
        stream.push(np.zeros(6000, np.float32))
    with pytest.raises(AudioError, match="has ended"):
        stream.push(np.zeros(1, np.float32))


def test_minutes_stream_in_the_memory_of_one(encoder: AudioEncoder):
    """Without the checkpoint's limit a stream goes on for as long as there is sound."""
    minute = np.tile(waveforms()["noise"], 30)[: 60 * RATE]
    stream = encoder.stream(RATE, max_tokens=10**9, chunk_tokens=48)
    stream.push(minute)
    tracemalloc.start()
    peaks = []
    for _ in range(6):
        tracemalloc.reset_peak()
        stream.push(minute)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert stream.tokens == pytest.approx(7 * 1500, abs=48)
    assert max(peaks) < peaks[0] * 1.1


def test_a_stream_that_failed_or_finished_has_ended(encoder: AudioEncoder):
    stream = encoder.stream(RATE)
    with pytest.raises(AudioError, match="NaN"):
        stream.push(np.array([np.nan], np.float32))
    with pytest.raises(AudioError, match="has ended"):
        stream.finish()
    stream = encoder.stream(RATE)
    stream.finish()
    with pytest.raises(AudioError, match="has ended"):
        stream.finish()


def test_bundles_that_cannot_hear(tiny_bundle, bundle: Bundle):
    deaf = tiny_bundle(model={key: value for key, value in MODEL.items() if key != "audio"}).bundle
    with pytest.raises(BundleError, match="no audio encoder"):
        AudioEncoder(deaf)
    manifest = bundle.manifest
    assert manifest.audio is not None
    other = msgspec.structs.replace(manifest.audio, state=manifest.audio.state[:-1])
    with pytest.raises(
        BundleError, match=r"its state is not the manifest's \(past\.1\.conv, present\.1\.conv\)"
    ):
        AudioEncoder(Bundle(bundle.path, msgspec.structs.replace(manifest, audio=other)))
    with pytest.raises(ValueError, match="chunk_tokens is 49"):
        AudioEncoder(bundle, threads=1).stream(RATE, chunk_tokens=49)
