"""Cache types: what float16 and int8 caches cost in accuracy; int8 scales that need no calibration."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from gemma_edge.export.geometry import Rope, read_text_model
from gemma_edge.export.modules.values import cache_scales, inverse_frequencies, rope_table
from gemma_edge.runtime.bundle import READ, Bundle
from gemma_edge.runtime.session import Session

from .support.graph_runner import GraphRunner
from .support.tiny_bundles import export_tiny
from .support.tiny_checkpoint import write_tiny_checkpoint

S, F = "sliding_attention", "full_attention"
MODELS = {
    "last source full": dict(num_hidden_layers=4, layer_types=[S, F] * 2, num_kv_shared_layers=2),
    "last source sliding": dict(num_hidden_layers=4, layer_types=[F, S, S, F], num_kv_shared_layers=2),
}
IDS = np.random.default_rng(0).integers(300, 500, 70).tolist()


@pytest.fixture(scope="module", params=list(MODELS))
def logits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Cache type -> logits after a prompt in chunks and in decode steps that cross the window."""
    folder = tmp_path_factory.mktemp("caches")
    checkpoint = write_tiny_checkpoint(folder / "checkpoint", seed=11, head_dim=32, **MODELS[request.param])
    soften(checkpoint)
    found = {}
    for kv in ("float32", "float16", "int8"):
        tiny = export_tiny(folder / kv, checkpoint=checkpoint, kv=kv)
        graphs = GraphRunner(tiny.path)
        assert all(cache.dtype == kv for cache in graphs.caches.values())
        graphs.run(IDS[:25], keep=0)
        rows = [graphs.run(IDS[25:40])]
        rows += [graphs.run([token]) for token in IDS[40:]]
        found[kv] = np.concatenate(rows)
    return found


def soften(checkpoint: Path) -> None:
    """Random queries make attention all but one-hot, which blows rounding up: scale them down."""
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if name.endswith("q_norm.weight"):
            tensors[name] *= 0.1
    save_file(tensors, checkpoint / "model.safetensors")


@pytest.mark.parametrize(("kv", "bound"), [("float16", 0.002), ("int8", 0.05)])
def test_accuracy(logits: dict[str, np.ndarray], kv: str, bound: float):
    exact, rounded = logits["float32"], logits[kv]
    error = np.sqrt(np.square(rounded - exact).mean()) / exact.std()
    assert 0 < error < bound
    agree = (exact.argmax(-1) == rounded.argmax(-1)).mean()
    assert agree > 0.9


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@pytest.mark.parametrize("head_dim", [16, 64, 256, 512])
@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_scales_fit_normalised_keys(head_dim: int, fraction: float):
    """Keys as the graph makes them: normalised, weighted, rotated. None is clipped, the error is small."""
    rng = np.random.default_rng(head_dim)
    weight = rng.uniform(0.2, 3.0, head_dim).astype(np.float32)
    rope = Rope(1e4, fraction, 1.0)
    keys = rng.standard_normal((400, head_dim)).astype(np.float32)
    keys /= np.sqrt(np.square(keys).mean(-1, keepdims=True))
    cos, sin = rope_table(rope, head_dim, 400)
    keys = rotate(keys * weight, cos, sin)
    scales, value_scales = cache_scales(weight, rope, head_dim, kv_heads=2)
    assert scales.shape == value_scales.shape == (1, 2, 1, head_dim)
    levels = keys / scales[0, 0]
    assert np.abs(levels).max() <= 127.5
    stored = np.clip(np.rint(levels), -128, 127) * scales[0, 0]
    assert np.linalg.norm(stored - keys) / np.linalg.norm(keys) < 0.035


def test_unrotated_channels_keep_scales_of_their_own():
    weight = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], np.float32)
    scales, _ = cache_scales(weight, Rope(1e4, 0.5, 1.0), 8, kv_heads=1)
    relative = scales.reshape(-1) / scales.reshape(-1)[3]
    np.testing.assert_allclose(relative, np.array([5, 6, 3, 4, 5, 6, 7, 8]) / 4, rtol=1e-6)


def test_proportional_rope_leaves_a_tail_unrotated():
    frequencies = inverse_frequencies(Rope(1e6, 0.25, 1.0), 32)
    assert (frequencies[:4] > 0).all() and not frequencies[4:].any()
    cos, sin = rope_table(Rope(1e6, 0.25, 1.0), 32, 10)
    assert (cos[:, 4:] == 1).all() and (sin[:, 4:] == 0).all()


def test_int8_caches_are_read_without_a_copy(tiny_bundle):
    """The operator that reads another layer's int8 cache writes it too: onto itself, and changes nothing."""
    bundle = tiny_bundle(context=192, chunk=16, kv="int8").bundle
    session, unbound = Session(bundle, threads=1, longest_draft=2), GraphRunner(bundle.path)
    outputs = session.decoder.parts[0].outputs
    readers = bundle.manifest.geometry.num_kv_shared_layers
    assert len([name for name in outputs if name.startswith(READ)]) >= 2 * readers
    for start in (0, 16, 32):
        chunk = np.array(IDS[start : start + 16])
        session.prefill(chunk, start, last=True)
        np.testing.assert_array_equal(session.logits, unbound.run(chunk.tolist())[-1])
    for position, token in enumerate(IDS[48:], 48):
        session.step(token, position)
        np.testing.assert_array_equal(session.logits, unbound.run([token])[-1])
    for name, rows in session.caches.copy(len(IDS)).items():  # those in use
        held = unbound.caches[f"past_key_values.{name}"][0]
        np.testing.assert_array_equal(rows, held[:, : rows.shape[1]])
    session.step(9, len(IDS), [10, 11])
    rows = unbound.run([9, 10, 11], keep=3)
    np.testing.assert_array_equal([session.logits_after(count) for count in range(3)], rows)


def test_other_caches_have_no_such_outputs(tiny_bundle):
    session = Session(tiny_bundle(context=192, chunk=16).bundle, threads=1)
    assert not [name for name in session.decoder.parts[0].outputs if name.startswith(READ)]


def test_scales_are_calibrated(tiny_bundle):
    """On other tokens than those of the calibration: larger levels, few clip, and logits are nearer."""
    tiny = tiny_bundle(context=192, chunk=16, kv="int8")
    exact = tiny_bundle(context=192, chunk=16).bundle
    calibrated, errors, levels = tiny.bundle, {}, {}
    bound = Bundle(with_bounds(tiny.path, tiny.path.with_name("bounds")), calibrated.manifest)
    expected = rows_of(exact)[0]
    for name, bundle in (("calibrated", calibrated), ("bound", bound)):
        rows, caches = rows_of(bundle)
        errors[name] = np.sqrt(np.square(rows - expected).mean())
        levels[name] = np.concatenate([np.abs(value.astype(int)).ravel() for value in caches.values()])
    assert errors["calibrated"] < errors["bound"]
    assert np.median(levels["calibrated"]) > np.median(levels["bound"])
    assert (levels["calibrated"] >= 127).mean() < 0.002


def rows_of(bundle: Bundle) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    session, rows = Session(bundle, threads=1), []
    for position, token in enumerate(IDS):
        session.step(token, position)
        rows.append(session.logits.copy())
    return np.array(rows), session.caches.copy(len(IDS))


def with_bounds(source: Path, folder: Path) -> Path:
    """The bundle with the scales that it had before it was calibrated: those of its key norms."""
    shutil.copytree(source, folder)
    tensors = load_file(source.parent / "checkpoint" / "model.safetensors")
    text = read_text_model(source)
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        if found := re.fullmatch(r"constants\.(key|value)_scale_(\d+)", tensor.name):
            layer = text.layers[int(found[2])]
            norm = next(
                w for n, w in tensors.items() if n.endswith(f"layers.{layer.index}.self_attn.k_norm.weight")
            )
            scales = cache_scales(
                norm.float().numpy(), text.rope[layer.layer_type], layer.head_dim, layer.kv_heads
            )
            tensor.CopyFrom(onnx.numpy_helper.from_array(scales[found[1] == "value"], tensor.name))
    onnx.save(graph, folder / "decoder.onnx")
    return folder
