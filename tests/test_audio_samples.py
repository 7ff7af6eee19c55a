"""Samples and sound files of every kind to mono at one rate, and what is refused, with its reason."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from gemma_edge.runtime.audio import files, samples
from gemma_edge.runtime.audio.files import open_audio, read_mono
from gemma_edge.runtime.audio.samples import MonoStream, from_pcm, to_mono
from gemma_edge.runtime.errors import AudioError

from .support.sounds import SPEECH, speech


def encoded(sound: np.ndarray, rate: int, **how: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, **how)
    return file.getvalue()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([0, 16384, -32768], np.int16), [0, 0.5, -1]),
        (np.array([0, 2**30, -(2**31)], np.int32), [0, 0.5, -1]),
        (np.array([128, 192, 0], np.uint8), [0, 0.5, -1]),
        (np.array([0, 0.5, -1], np.float64), [0, 0.5, -1]),
        (np.array([0, 0.5, -1], np.float16), [0, 0.5, -1]),
        ([0.0, 0.5, -1.0], [0, 0.5, -1]),
        (np.zeros(0, np.int16), []),
        (np.array([1.5, -3.0]), [1.5, -3.0]),  # louder than full scale: as it is
    ],
)
def test_number_types(given: Any, expected: list[float]):
    mono = to_mono(given, 1)
    assert mono.dtype == np.float32 and mono.tolist() == expected


def test_channels_are_averaged():
    stereo = np.array([[16384, 0], [-32768, -16384]], np.int16)
    assert to_mono(stereo, 2).tolist() == [0.25, -0.75]
    assert to_mono(np.ones((5, 8), np.float32), 8).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("given", "channels", "message"),
    [
        (np.array([0.1, np.nan]), 1, "NaN or infinity"),
        (np.array([0.1, -np.inf], np.float32), 1, "NaN or infinity"),
        (np.array([0.0, 20_000.0]), 1, "reach 20000.*give integers as integers"),
        (np.array([1 + 2j]), 1, "complex128"),
        (np.array([1, 2]), 1, "int64"),
        (np.array(["a"]), 1, "expected uint8"),
        (np.zeros((4, 2)), 1, r"shape \(4, 2\), expected \(samples,\)"),
        (np.zeros(4), 2, r"shape \(4,\), expected \(samples, 2\)"),
        (np.zeros((4, 2, 2)), 2, "shape"),
    ],
)
def test_what_is_no_sound_is_refused(given: Any, channels: int, message: str):
    with pytest.raises(AudioError, match=message) as raised:
        to_mono(given, channels)
    assert raised.value.code == "invalid_request"


def test_raw_pcm():
    assert from_pcm(b"\x00\x40\x00\x80").tolist() == [[16384], [-32768]]
    assert from_pcm(bytes(8), channels=2).shape == (2, 2)
    assert from_pcm(b"\x80\x00", width=1).tolist() == [[128], [0]]
    with pytest.raises(AudioError, match="3 bytes of PCM are no whole number"):
        from_pcm(bytes(3))
    with pytest.raises(AudioError, match="PCM of 3 bytes a sample"):
        from_pcm(bytes(6), width=3)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_and_any_pieces(rate: int):
    sound = np.stack([speech(rate), speech(rate)], axis=1)
    whole = soxr.resample(sound.mean(axis=1), rate, 16_000, quality="HQ")
    random = np.random.default_rng(rate)
    stream = MonoStream(rate=rate, channels=2, to_rate=16_000)
    parts, done = [], 0
    while done < len(sound):
        size = int(random.integers(0, rate // 5))
        parts.append(stream.push(sound[done : done + size]))
        done += size
    streamed = np.concatenate([*parts, stream.finish()])
    assert len(streamed) == len(whole)
    assert np.abs(streamed - whole).max() < 1e-5


def test_the_model_rate_is_not_touched():
    stream = MonoStream(rate=16_000, channels=1, to_rate=16_000)
    np.testing.assert_array_equal(stream.push(speech()), speech())
    assert stream.finish().size == 0


@pytest.mark.parametrize(("rate", "channels"), [(100, 1), (10**6, 1), (True, 1), (16_000, 0), (16_000, 33)])
def test_rates_and_channels_out_of_range(rate: int, channels: int):
    with pytest.raises(AudioError, match="expected"):
        MonoStream(rate=rate, channels=channels, to_rate=16_000)


@pytest.mark.parametrize(
    ("how", "tolerance"),
    [
        (dict(format="WAV", subtype="PCM_16"), 1e-4),
        (dict(format="WAV", subtype="PCM_24"), 1e-6),
        (dict(format="WAV", subtype="PCM_U8"), 1e-2),
        (dict(format="WAV", subtype="FLOAT"), 1e-7),
        (dict(format="WAV", subtype="ULAW"), 0.05),
        (dict(format="FLAC", subtype="PCM_16"), 1e-4),
        (dict(format="OGG", subtype="VORBIS"), 0.2),
        (dict(format="OGG", subtype="OPUS"), 0.2),
        (dict(format="MP3", subtype="MPEG_LAYER_III"), 0.2),
    ],
)
def test_file_formats(how: dict[str, Any], tolerance: float, tmp_path: Path):
    sound = speech()
    data = encoded(sound, 16_000, **how)
    path = tmp_path / "sound.anything"  # the content decides, not the name
    path.write_bytes(data)
    read = read_mono(path, 16_000)
    np.testing.assert_array_equal(read, read_mono(data, 16_000))
    assert abs(len(read) - len(sound)) < 2000
    length = min(len(read), len(sound))
    if how["subtype"] in ("MPEG_LAYER_III",):  # an encoder's delay: compare loudness only
        assert abs(read.std() / sound.std() - 1) < 0.05
    else:
        assert np.abs(read[:length] - sound[:length]).max() < tolerance


def test_wrong_files(tmp_path: Path):
    speech_bytes = SPEECH.read_bytes()
    cases: dict[str, tuple[bytes, str]] = {
        "text": (b"not a sound, but words " * 50, "not a sound file"),
        "empty": (b"", "not a sound file"),
        "header": (speech_bytes[:20], "not a sound file"),
        "zeros": (bytes(5000), "not a sound file"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        for source in (path, data):
            with pytest.raises(AudioError, match=message + r".*expected WAV, FLAC, OGG or MP3"):
                read_mono(source, 16_000)
    with pytest.raises(AudioError, match=r"gone\.wav: cannot be read \(No such file"):
        read_mono(tmp_path / "gone.wav", 16_000)
    with pytest.raises(AudioError, match="Is a directory"):
        read_mono(tmp_path, 16_000)
    with pytest.raises(AudioError, match=r"type MAT5; expected WAV"):
        read_mono(encoded(speech(), 16_000, format="MAT5", subtype="PCM_16"), 16_000)
    with pytest.raises(AudioError, match="NaN or infinity"):
        read_mono(encoded(np.array([0.0, np.nan]), 16_000, format="WAV", subtype="FLOAT"), 16_000)


def test_a_truncated_file_gives_what_is_there_or_an_error():
    whole = read_mono(SPEECH, 16_000)
    wav = encoded(speech(), 16_000, format="WAV", subtype="PCM_16")
    assert 0 < len(read_mono(wav[: len(wav) // 2], 16_000)) <= len(whole) // 2 + 1
    flac = SPEECH.read_bytes()
    try:
        assert len(read_mono(flac[: len(flac) // 2], 16_000)) < len(whole)
    except AudioError as error:
        assert "damaged" in str(error)


def test_a_long_file_is_refused_before_it_is_read_and_read_in_blocks(tmp_path: Path):
    """Three hours of sound: the header is enough to refuse them, and blocks keep the memory small."""
    path = tmp_path / "hours.wav"
    with soundfile.SoundFile(path, "w", 8_000, 1, format="WAV", subtype="PCM_U8") as file:
        for _ in range(180):
            file.write(np.zeros(8_000 * 60))
    with pytest.raises(AudioError, match=r"hours\.wav: 10800\.0 s of sound, expected at most 30 s"):
        read_mono(path, 16_000, max_s=30)
    with open_audio(path) as file:
        assert file.duration_s == 10_800
        assert {len(block) for block in file.blocks()} <= {
            files.BLOCK_SAMPLES,
            8_000 * 10_800 % files.BLOCK_SAMPLES,
        }


def test_a_header_that_lies_does_not_get_around_the_limit(monkeypatch: pytest.MonkeyPatch):
    real = files.AudioFile
    monkeypatch.setattr(
        files,
        "AudioFile",
        lambda name, rate, channels, duration_s, file: real(name, rate, channels, 0.1, file),
    )
    with pytest.raises(AudioError, match="expected at most 1 s"):
        read_mono(SPEECH, 16_000, max_s=1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(samples.importlib, "import_module", missing)
    with pytest.raises(AudioError, match=r"soundfile is not installed; pip install 'gemma-edge\[audio\]'"):
        read_mono(SPEECH, 16_000)
    with pytest.raises(AudioError, match="soxr is not installed"):
        MonoStream(rate=8_000, channels=1, to_rate=16_000)
