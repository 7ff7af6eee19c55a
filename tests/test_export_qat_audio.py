"""qat-mobile checkpoints that hear: the tower's weights, outputs and activation scales are transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Gemma4ForConditionalGeneration
from transformers.integrations.gemma_quant import QuantizedLinear

from gemma_edge.export.synthetic import known_config
from gemma_edge.export.verify.weights import check_weights
from gemma_edge.runtime.errors import ConfigError, GemmaEdgeError

from .support.graph_runner import GraphRunner
from .support.onnx_graphs import attributes, load_graph
from .support.tiny_audio import AudioEncoder, random_frames
from .support.tiny_bundles import TinyBundle, export_tiny, prepare_tiny
from .support.tiny_qat import calibrate_on, without_activation_scales
from .support.tiny_qat_audio import ears_of, google_layout, hearing_qat_model, write_hearing_qat_checkpoint
from .test_audio_graphs import Ears, open_graph
from .test_export_qat_weights import run_one
from .test_verify import source_weights

# Google's, and 8 bits in attention and in the two projections that Google leaves as floats.
THREE_WIDTHS = google_layout()
THREE_WIDTHS["module_quant_configs"] = {
    r"audio_tower\.(layers\.\d+\.self_attn|output_proj|subsample)": {"num_bits": 8},
    "embed_audio": {"num_bits": 4},
} | THREE_WIDTHS["module_quant_configs"]
THREE_WIDTHS["modules_to_not_convert"] = ["relative_k_proj", "per_layer_model_projection"]

EXACT = """\
name: exact
title: qat-mobile without any rounding of our own
extends: qat-mobile
activations: float32
rules:
  - {weights: "*", method: import, block: 128}
  - {weights: "*", bits: 32, method: float}
"""
CLOSE = 2e-5  # what float32 gives: soft tokens are about 1
CHUNKS = ([4], [48], [12, 4, 100, 8])


def write(
    folder: Path, layout: dict[str, Any], *, calibrated: bool = True
) -> tuple[Path, Gemma4ForConditionalGeneration, AudioEncoder]:
    """(checkpoint, the model in transformers, its tower and embedder); only these two are calibrated"""
    model = hearing_qat_model(layout=layout)
    ears = ears_of(model)
    if calibrated:
        frames = random_frames(400, 128, seed=9)
        calibrate_on(ears, lambda: ears.soft_tokens(frames))
    return write_hearing_qat_checkpoint(folder / "checkpoint", model), model, ears


def export(folder: Path, checkpoint: Path, recipe: str) -> TinyBundle:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return export_tiny(folder, checkpoint=checkpoint, recipe=str(path))


def graphs_of(bundle: TinyBundle) -> Ears:
    made = bundle.bundle
    assert made.manifest.audio is not None
    return Ears(
        made.manifest.audio, open_graph(made.audio_encoder), open_graph(made.audio_encoder_stream), None
    )


@pytest.fixture(scope="module", params=["google", "three widths"])
def layout(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"google": google_layout(), "three widths": THREE_WIDTHS}[request.param]


@pytest.fixture(scope="module")
def hearing(layout: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    """(transformers' whole model, its tower and embedder, an exact bundle without activation scales)"""
    folder = tmp_path_factory.mktemp("hearing")
    checkpoint, model, ears = write(folder, layout)
    return model, ears, export(folder, checkpoint, EXACT)


def products_of(bundle: TinyBundle, file: str) -> dict[str, tuple[np.ndarray, int]]:
    """Module name -> (what MatMulNBits makes of the bundle's bytes times the unit matrix, bits)."""
    graph, found = load_graph(bundle.path / file), {}
    for node in graph.nodes("MatMulNBits"):
        settings = attributes(node) | dict(accuracy_level=0)
        names = list(node.input[1:3])
        values = {name: graph.value(name) for name in names}
        unit = np.eye(settings["K"], dtype=np.float32)
        product = run_one("MatMulNBits", ["x", *names], settings, values, unit)
        found[names[1].removesuffix(".weight.scales")] = (product.T, settings["bits"])
    return found


@pytest.mark.parametrize("file", ["audio_encoder.onnx", "audio_encoder_stream.onnx"])
def test_every_weight_of_the_tower_is_transformers_own_to_the_last_bit(hearing, layout, file: str):
    _, ears, bundle = hearing
    found = products_of(bundle, file)
    linears = {name: module for name, module in ears.named_modules() if isinstance(module, nn.Linear)}
    quantized = {name: module for name, module in linears.items() if isinstance(module, QuantizedLinear)}
    assert found.keys() == quantized.keys()  # what is left as floats is no MatMulNBits in this recipe
    for name, module in quantized.items():
        weight, bits = found[name]
        np.testing.assert_array_equal(weight, module._dequantize_weights(torch.float32).numpy(), err_msg=name)
        assert bits == module.num_bits
    widths = {module.num_bits for module in quantized.values()}
    assert widths == ({2, 4} if layout == google_layout() else {2, 4, 8})
    graph = load_graph(bundle.path / file)
    for name in linears.keys() - quantized.keys():
        if not name.endswith("relative_k_proj"):  # which is worked into a constant
            np.testing.assert_array_equal(graph.value(f"{name}.weight"), linears[name].weight.detach())


def test_bounds_stay_around_every_product(hearing):
    _, ears, bundle = hearing
    graph = load_graph(bundle.path / "audio_encoder.onnx")
    clips = {tuple(node.input[1:3]) for node in graph.nodes("Clip")}
    for name, module in ears.named_modules():
        for side in ("input", "output") if hasattr(module, "input_min") else ():
            bounds = (f"{name}.{side}_min", f"{name}.{side}_max")
            assert bounds in clips
            for bound in bounds:
                assert graph.value(bound).item() == module.get_buffer(bound.rpartition(".")[2]).item()


def test_soft_tokens_are_transformers(hearing):
    """Activation scales are in the checkpoint, and left out."""
    _, ears, bundle = hearing
    graphs = graphs_of(bundle)
    assert not load_graph(bundle.path / "audio_encoder.onnx").nodes("QuantizeLinear")
    scaled = {name: tensor.clone() for name, tensor in ears.state_dict().items()}
    without_activation_scales(ears)
    for length in (1, 5, 48, 203, 1000):
        frames = random_frames(length, 128, seed=length)
        expected = ears.soft_tokens(frames)
        assert np.abs(graphs.whole(frames) - expected).max() < CLOSE
        for sizes in CHUNKS:
            assert np.abs(graphs.streamed(frames, sizes) - expected).max() < CLOSE
    ears.load_state_dict(scaled)


def test_the_text_part_of_such_a_checkpoint(hearing):
    model, _, bundle = hearing
    ids = torch.randint(25, 500, (1, 30), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    graphs = GraphRunner(bundle.path)
    for start, end in ((0, 20), (20, 29), (29, 30)):
        found = graphs.run(ids[0, start:end].tolist())[-1]
        assert np.abs(found - expected[end - 1]).max() < 2e-4


def test_verify_reads_the_towers_weights_back(hearing):
    _, ears, bundle = hearing
    checks = {check.name: check for check in check_weights(bundle.bundle, source_weights(bundle.checkpoint))}
    for name, module in ears.named_modules():
        if isinstance(module, QuantizedLinear):
            check = checks[f"{name}.weight"]
            assert (check.bits, check.relative_error, check.misplaced) == (module.num_bits, 0, 0)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def test_activation_scales_and_int8_products(tmp_path: Path):
    """As in the text part: reproduced on request, left out as the recipe ships."""
    checkpoint, _, ears = write(tmp_path, google_layout())
    frames = random_frames(400, 128, seed=1)
    expected = ears.soft_tokens(frames)
    without = without_activation_scales(ears).soft_tokens(frames)
    cost = rms(without - expected)  # of leaving them out
    scaled = export(tmp_path / "scaled", checkpoint, EXACT + "activation_scales: true\n")
    graphs = graphs_of(scaled)
    for found in (graphs.whole(frames), graphs.streamed(frames, [48])):
        assert rms(found - expected) < 0.05 * cost
    shipped = export_tiny(tmp_path / "shipped", checkpoint=checkpoint, recipe="qat-mobile")
    entries = {entry.tensor: entry for entry in shipped.bundle.manifest.quantization}
    floats = {
        name: entry.bits
        for name, entry in entries.items()
        if entry.method != "import" and name.startswith(("audio_tower", "embed_audio"))
    }
    assert floats == {
        "audio_tower.subsample_conv_projection.input_proj_linear.weight": 8,
        "audio_tower.output_proj.weight": 8,
        "embed_audio.embedding_projection.weight": 8,
    }
    found = graphs_of(shipped).whole(frames)
    assert rms(found - without) < 0.05 * rms(without)  # products of int8
    reference = export_tiny(tmp_path / "reference", checkpoint=checkpoint, recipe="fp32")
    assert np.abs(graphs_of(reference).whole(frames) - without).max() < CLOSE


def change_config(folder: Path, skipped: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = skipped
    (folder / "config.json").write_text(json.dumps(config))


def test_what_cannot_be_imported_is_named(tmp_path: Path):
    checkpoint, *_ = write(tmp_path, google_layout(), calibrated=False)
    skipped = google_layout()["modules_to_not_convert"]
    change_config(checkpoint, [name for name in skipped if name != "relative_k_proj"])
    with pytest.raises(ConfigError, match=r"relative_k_proj\.weight has 2 bits .*--no-audio"):
        prepare_tiny(checkpoint, tmp_path / "out", recipe="qat-mobile")
    change_config(checkpoint, [name for name in skipped if "output_proj" not in name])
    with pytest.raises(GemmaEdgeError, match=r"output_proj\.weight has shape .* asks for \(24, 8\)"):
        prepare_tiny(checkpoint, tmp_path / "out", recipe="qat-mobile")
    recipe = tmp_path / "scales.yaml"
    recipe.write_text("name: mine\ntitle: T\nextends: qat-mobile\nactivation_scales: true\nrules: []\n")
    with pytest.raises(ConfigError, match=r"activation_scales of audio_tower\.output_proj\.weight.*bias"):
        prepare_tiny(checkpoint, tmp_path / "out", recipe=str(recipe))
    change_config(checkpoint, skipped)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.audio_tower.layers.1.lconv1d.linear_start.linear.weight_scale"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(
        GemmaEdgeError, match=r"layers\.1\.lconv1d\.linear_start\.linear\.weight_scale is missing"
    ):
        prepare_tiny(checkpoint, tmp_path / "out", recipe="qat-mobile")


def test_googles_layout_is_the_one_tested():
    """The tower's patterns of E2B and E4B are the same."""
    first, second = (known_config(model, "qat-mobile")["quantization_config"] for model in ("e2b", "e4b"))
    assert first["modules_to_not_convert"] == second["modules_to_not_convert"]
    tower = {name: bits for name, bits in first["module_quant_configs"].items() if "audio" in name}
    assert tower == {name: bits for name, bits in second["module_quant_configs"].items() if "audio" in name}
