"""Slow: E2B's audio encoder at full size with random weights, whole and streamed, against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_edge.runtime.audio.encoder import AudioEncoder

from .support.tiny_audio import FULL_SIZE, random_audio_encoder, random_frames
from .support.tiny_bundles import export_tiny
from .support.tiny_checkpoint import write_tiny_checkpoint
from .test_audio_graphs import Ears, open_graph

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
HIDDEN = 1536  # of E2B's text model
TEXT = dict(hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0)
LENGTHS = [1, 2, 3, 4, 5, 46, 47, 48, 49, 333, 998, 2999]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of 1,024: 1.2 GB."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("full") / "checkpoint", audio=FULL_SIZE, **TEXT)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[int, np.ndarray]:
    """length in frames -> transformers' soft tokens"""
    torch.set_num_threads(2)
    reference = random_audio_encoder(FULL_SIZE, HIDDEN, seed=0)
    return {length: reference.soft_tokens(random_frames(length, 128, length)) for length in LENGTHS}


def test_parity(checkpoint: Path, expected: dict[int, np.ndarray], tmp_path: Path):
    bundle = export_tiny(tmp_path, checkpoint=checkpoint, budget_mib=4096).bundle
    assert bundle.manifest.audio is not None
    whole = open_graph(bundle.audio_encoder)
    for length in LENGTHS:
        frames = random_frames(length, 128, length)
        got = whole.run(["soft_tokens"], {"input_features": frames[None]})[0][0]
        assert got.shape == expected[length].shape
        assert np.abs(got - expected[length]).max() < TOLERANCE
    stream = open_graph(bundle.audio_encoder_stream)
    ears = Ears(bundle.manifest.audio, whole, stream, None)
    for length in LENGTHS:
        frames = random_frames(length, 128, length)
        for sizes in ([48], [4, 100, 16, 48]):
            assert np.abs(ears.streamed(frames, sizes) - expected[length]).max() < TOLERANCE


def test_eight_bits(checkpoint: Path, expected: dict[int, np.ndarray], tmp_path: Path):
    """Random weights with bounds that clip are a hard case: 8 bits add up over 123 products."""
    bundle = export_tiny(tmp_path, checkpoint=checkpoint, recipe="int4", budget_mib=4096).bundle
    encoder = AudioEncoder(bundle, threads=2)
    for length in (48, 998):
        stream = encoder.stream(16_000)
        stream._frames = random_frames(length, 128, length)
        got = stream.finish()
        error = np.sqrt(np.square(got - expected[length]).mean() / np.square(expected[length]).mean())
        assert error < 0.08
