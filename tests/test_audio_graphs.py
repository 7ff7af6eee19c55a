"""Audio encoder graphs against transformers: four shapes, every kind of length, whole and in any chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.runtime.bundle import Audio, Bundle

from .support.tiny_audio import TINY, AudioEncoder, random_audio_encoder, random_frames

TOLERANCE = 1e-3  # what parity asks for
CLOSE = 2e-5  # what float32 gives
ONE_LAYER = dict(num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0)
HIDDEN = 64  # of the text model
LENGTHS = [*range(1, 18), 47, 48, 49, 50, 95, 96, 97, 203, 1000]

# name -> audio config; see `export.audio_geometry._relative_positions` for what the context sizes do.
SHAPES: dict[str, dict[str, Any]] = {
    "e2b": TINY,
    "positions run out, gradients clipped": TINY
    | dict(
        attention_chunk_size=3,
        attention_context_left=12,
        gradient_clipping=0.9,
        conv_kernel_size=2,
        num_attention_heads=16,
        num_hidden_layers=1,
    ),
    "positions shifted, right 1": TINY
    | dict(attention_chunk_size=16, attention_context_left=5, attention_context_right=1, num_hidden_layers=1),
    "not clipped, other numbers": dict(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=3,
        subsampling_conv_channels=[10, 3],
        conv_kernel_size=3,
        residual_weight=0.7,
        attention_chunk_size=1,
        attention_context_left=3,
        attention_logit_cap=3.0,
        use_clipped_linears=False,
        rms_norm_eps=1e-3,
        output_proj_dims=20,
        hidden_act="gelu_pytorch_tanh",
    ),
}


@dataclass(frozen=True)
class Ears:
    """The two graphs of a bundle and the same encoder in transformers."""

    audio: Audio
    whole_graph: ort.InferenceSession
    stream_graph: ort.InferenceSession
    reference: AudioEncoder | None

    def whole(self, frames: np.ndarray) -> np.ndarray:
        """(frames, bins) -> (tokens, hidden)"""
        return self.whole_graph.run(["soft_tokens"], {"input_features": frames[None]})[0][0]

    def streamed(self, frames: np.ndarray, sizes: list[int]) -> np.ndarray:
        """In chunks of `sizes` frames, the last repeated until all are taken."""
        state = [np.zeros(tensor.shape, tensor.dtype) for tensor in self.audio.state]
        names = [tensor.name for tensor in self.audio.state]
        parts, done = [], 0
        while done < len(frames):
            size = sizes[min(len(parts), len(sizes) - 1)]
            feeds = {f"past.{name}": value for name, value in zip(names, state, strict=True)}
            feeds["input_features"] = frames[None, done : done + size]
            soft_tokens, *state = self.stream_graph.run(
                ["soft_tokens", *(f"present.{name}" for name in names)], feeds
            )
            parts.append(soft_tokens[0])
            done += size
            assert state[0].tolist() == [sum(map(len, parts))]
        return np.concatenate(parts)


def open_graph(path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options)


def ears_of(bundle: Bundle, fields: dict[str, Any]) -> Ears:
    assert bundle.manifest.audio is not None
    return Ears(
        bundle.manifest.audio,
        open_graph(bundle.audio_encoder),
        open_graph(bundle.audio_encoder_stream),
        random_audio_encoder(fields, HIDDEN, seed=0),
    )


@pytest.fixture(scope="module", params=list(SHAPES))
def ears(request: pytest.FixtureRequest, tiny_bundle) -> Ears:
    fields = SHAPES[request.param]
    return ears_of(tiny_bundle(model=dict(audio=fields, **ONE_LAYER)).bundle, fields)


@pytest.fixture(scope="module")
def e2b_ears(tiny_bundle) -> Ears:
    return ears_of(tiny_bundle(model=dict(audio=TINY, **ONE_LAYER)).bundle, TINY)


def test_every_length(ears: Ears):
    for length in LENGTHS:
        frames = random_frames(length, ears.audio.mel.bins, seed=length)
        expected = ears.reference.soft_tokens(frames)
        assert len(expected) == (length + 3) // 4
        whole = ears.whole(frames)
        assert whole.shape == expected.shape
        assert np.abs(whole - expected).max() < CLOSE < TOLERANCE
        for sizes in ([4], [48], [12, 4, 100, 8]):
            assert np.abs(ears.streamed(frames, sizes) - expected).max() < CLOSE


def test_the_outputs_depend_on_all_that_they_should(ears: Ears):
    """A token changes with the frames and tokens that it sees, as far back as layers reach, and no other."""
    frames = random_frames(240, ears.audio.mel.bins)
    changed = frames.copy()
    changed[100:104] += 3  # soft token 25, and by the convolution over 4u - 3 … 4u + 3 the one after it
    moved = np.abs(ears.whole(changed) - ears.whole(frames)).max(axis=1) > 1e-5
    assert not moved[:24].any() and moved[25]
    assert moved[26:30].all()  # by attention and the causal convolution


def test_padding_with_a_mask_is_the_same_as_no_padding(ears: Ears):
    """transformers pads clips and masks the frames that are not there; a bundle's graphs never see those."""
    for length in (1, 2, 3, 4, 5, 21, 46, 47):
        frames = random_frames(length, ears.audio.mel.bins, seed=length)
        padded = np.concatenate([frames, random_frames(9, ears.audio.mel.bins)])
        mask = np.arange(len(padded)) < length
        expected = ears.reference.soft_tokens(padded * mask[:, None], mask)
        assert np.abs(ears.whole(frames) - expected).max() < CLOSE


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 150),
    groups=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_any_split_into_chunks(e2b_ears: Ears, length: int, groups: list[int], seed: int):
    frames = random_frames(length, e2b_ears.audio.mel.bins, seed)
    streamed = e2b_ears.streamed(frames, [4 * group for group in groups])
    assert np.abs(streamed - e2b_ears.whole(frames)).max() < CLOSE


def test_thirty_seconds(e2b_ears: Ears):
    frames = random_frames(2999, e2b_ears.audio.mel.bins)
    expected = e2b_ears.reference.soft_tokens(frames)
    assert expected.shape == (750, HIDDEN)
    assert np.abs(e2b_ears.whole(frames) - expected).max() < CLOSE
    assert np.abs(e2b_ears.streamed(frames, [48]) - expected).max() < CLOSE


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_quantized_to_eight_bits(tiny_bundle, e2b_ears: Ears, recipe: str):
    bundle = tiny_bundle(model=dict(audio=TINY, **ONE_LAYER), recipe=recipe).bundle
    audio_weights = [
        entry
        for entry in bundle.manifest.quantization
        if entry.tensor.startswith(("audio_tower.", "embed_audio."))
    ]
    layers = TINY["num_hidden_layers"]
    assert len(audio_weights) == 10 * layers + 3  # input, output and embedding projection
    assert {entry.bits for entry in audio_weights} == {8}
    quantized = ears_of(bundle, TINY)
    frames = random_frames(400, e2b_ears.audio.mel.bins)
    expected = e2b_ears.whole(frames)
    for got in (quantized.whole(frames), quantized.streamed(frames, [48])):
        error = np.sqrt(np.square(got - expected).mean() / np.square(expected).mean())
        assert 1e-4 < error < 0.05
    for path in (bundle.audio_encoder, bundle.audio_encoder_stream):
        nodes = onnx.load(path, load_external_data=False).graph.node
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        assert len(products) == len(audio_weights)
        for node in products:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            assert (attributes["bits"], attributes["accuracy_level"]) == (8, 4)
        # Each of a layer's ten linears is clipped before and after.
        bounds = [node for node in nodes if node.op_type == "Clip" and "put_m" in node.input[1]]
        assert len(bounds) == 2 * 10 * layers


def test_both_graphs_hold_the_same_bytes(tiny_bundle):
    bundle = tiny_bundle(model=dict(audio=TINY, **ONE_LAYER), recipe="int8").bundle
    places: list[dict[str, tuple[str, ...]]] = []
    for path in (bundle.audio_encoder, bundle.audio_encoder_stream):
        graph = onnx.load(path, load_external_data=False).graph
        places.append(
            {
                tensor.name: tuple(entry.value for entry in tensor.external_data)
                for tensor in graph.initializer
                if tensor.external_data
            }
        )
    whole, stream = places
    assert {place[0] for place in whole.values()} == {"audio_encoder.onnx.data"}
    assert stream and stream.items() <= whole.items()
    assert sum(path.stat().st_size for path in (bundle.audio_encoder, bundle.audio_encoder_stream)) < 600_000
