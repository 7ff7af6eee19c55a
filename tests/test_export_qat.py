"""qat-mobile checkpoints: logits against transformers' own quantized model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma4ForCausalLM

from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.engine import Engine, SamplingParams
from gemma_edge.runtime.errors import ConfigError, GemmaEdgeError

from .support.graph_runner import GraphRunner
from .support.onnx_graphs import load_graph
from .support.tiny_bundles import export_tiny, prepare_tiny
from .support.tiny_checkpoint import write_tiny_checkpoint
from .support.tiny_qat import calibrate, tiny_qat_model, without_activation_scales, write_qat_checkpoint
from .test_export_genai import generate

TOKENS = 48
# Everything as the checkpoint has it: no rounding of activations, bfloat16 weights widened.
EXACT = """\
name: exact
title: qat-mobile without any rounding of our own
extends: qat-mobile
activations: float32
rules:
  - {weights: per_layer_model_projection.weight, bits: 32, method: float}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], np.ndarray, np.ndarray]:
    """(checkpoint, token ids, transformers' logits without activation scales, and with them)"""
    model = tiny_qat_model(seed=3)
    ids = torch.randint(3, 500, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    calibrate(model, ids)
    checkpoint = write_qat_checkpoint(tmp_path_factory.mktemp("qat") / "checkpoint", model)
    rounded = logits_of(model, ids)
    return checkpoint, ids[0].tolist(), logits_of(without_activation_scales(model), ids), rounded


def logits_of(model: Gemma4ForCausalLM, ids: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits[0].numpy()


def difference(path: Path, ids: list[int], expected: np.ndarray, chunks: list[int]) -> float:
    """Root mean square over the last rows of all chunks."""
    graphs = GraphRunner(path)
    errors = []
    for count in chunks:
        done = graphs.tokens
        logits = graphs.run(ids[done : done + count])
        errors.append(logits[-1] - expected[done + count - 1])
    return float(np.sqrt(np.mean(np.square(errors))))


SHIPPED = "name: mine\ntitle: A test\nextends: qat-mobile\nrules: []\n"


def export(folder: Path, checkpoint: Path, recipe: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe)
    return export_tiny(folder, checkpoint=checkpoint, recipe=str(path)).path


CHUNKS = [[20] + [1] * (TOKENS - 20), [7, 13, 9, 1, 1, 12, 5]]


def test_logits_are_transformers(made, tmp_path: Path):
    checkpoint, ids, expected, _ = made
    bundle = export(tmp_path, checkpoint, EXACT)
    assert not load_graph(bundle / "decoder.onnx").nodes("QuantizeLinear")
    for chunks in CHUNKS:
        assert difference(bundle, ids, expected, chunks) < 2e-4


def test_activation_scales_can_be_reproduced(made, tmp_path: Path):
    """Rounding makes last bits count: a value beside a boundary may fall to the other side."""
    checkpoint, ids, without, expected = made
    bundle = export(tmp_path, checkpoint, EXACT + "activation_scales: true\n")
    cost = float(np.sqrt(np.mean(np.square(expected - without))))  # of leaving them out
    for chunks in CHUNKS:
        assert difference(bundle, ids, expected, chunks) < 0.05 * cost
        assert difference(bundle, ids, without, chunks) > 0.5 * cost


@pytest.mark.parametrize("scales", [False, True], ids=["as it ships", "with activation scales"])
def test_with_int8_activations(made, tmp_path: Path, scales: bool):
    """8 bits for what is bfloat16, products of int8: near transformers' logits, in a model that amplifies.

    onnxruntime-genai and the engine read the same bundle.
    """
    checkpoint, ids, without, rounded = made
    bundle = export(tmp_path, checkpoint, SHIPPED + f"activation_scales: {str(scales).lower()}\n")
    expected = rounded if scales else without
    assert difference(bundle, ids, expected, CHUNKS[0]) < (0.5 if scales else 0.3) * float(expected.std())
    tokens, logits = generate(bundle, ids[:20], 6)
    graphs = GraphRunner(bundle)
    ours = graphs.run(ids[:20])[-1]
    for token, theirs in zip(tokens, logits, strict=True):
        keep = np.isfinite(theirs) & (theirs > -1e30)
        assert np.abs(theirs - ours)[keep].max() < 1e-3
        ours = graphs.run([token])[-1]
    engine = Engine(open_bundle(bundle))
    answer = list(engine.generate(ids[:20], SamplingParams(temperature=0), max_new_tokens=6))
    assert answer
    if not scales:  # whose rounding may fall to the other side in chunks of another length
        assert answer == tokens[: len(answer)]


def test_as_floats_for_reference(made, tmp_path: Path):
    checkpoint, ids, expected, _ = made
    bundle = export_tiny(tmp_path, checkpoint=checkpoint, recipe="fp32")
    assert difference(bundle.path, ids, expected, CHUNKS[0]) < 2e-4


def test_a_recipe_that_does_not_suit_the_checkpoint_is_refused(made, tmp_path: Path):
    quantized, *_ = made
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight has 2 bits .* already.*--recipe qat-mobile"):
        prepare_tiny(quantized, tmp_path / "out", recipe="int4")
    floats = write_tiny_checkpoint(tmp_path / "floats", num_hidden_layers=2, num_kv_shared_layers=0)
    with pytest.raises(
        ConfigError, match=r"recipe qat-mobile imports .* no quantization_config.*--recipe int4"
    ):
        prepare_tiny(floats, tmp_path / "out", recipe="qat-mobile")
    recipe = tmp_path / "scales.yaml"
    recipe.write_text("name: scales\ntitle: A test\nextends: int8\nactivation_scales: true\nrules: []\n")
    with pytest.raises(ConfigError, match=r"recipe scales: activation_scales .* no quantization_config"):
        prepare_tiny(floats, tmp_path / "out", recipe=str(recipe))


SMALL: dict[str, Any] = dict(num_hidden_layers=2, num_kv_shared_layers=0, hidden_size_per_layer_input=16)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_qat_checkpoint(tmp_path / "small", tiny_qat_model(**SMALL))


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of the text model, remove those that are None."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        assert tensors.pop(name) is not None
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({UP: None}, r"layers\.0\.mlp\.up_proj\.weight is missing"),
        ({UP + "_scale": None}, r"layers\.0\.mlp\.up_proj\.weight_scale is missing"),
        ({UP: torch.zeros(128, 64, dtype=torch.bfloat16)}, r"up_proj\.weight has shape \(128, 64\)"),
        ({UP: torch.zeros(128, 32, dtype=torch.bfloat16)}, r"up_proj\.weight is BF16, expected U8"),
        (
            {UP: torch.zeros(128, 16, dtype=torch.uint8)},
            r"shape \(128, 16\), config.json asks for \(128, 32\)",
        ),
        ({UP + "_scale": torch.ones(128, 4)}, r"weight_scale has shape \(128, 4\)"),
        ({"model.embed_tokens.embedding_scale": torch.ones(512, 3)}, r"3 scales for a row of 64 values"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.uint8)}, r"norm\.weight is U8, expected BF16"),
    ],
)
def test_tensors_that_do_not_fit_are_named(small: Path, tmp_path: Path, changes: dict, named: str):
    change_tensors(small, **changes)
    with pytest.raises(GemmaEdgeError, match=named):
        prepare_tiny(small, tmp_path / "out", recipe="qat-mobile")


def test_scales_that_are_no_numbers_are_named(small: Path, tmp_path: Path):
    change_tensors(small, **{UP + "_scale": torch.full((128, 1), float("nan"))})
    with pytest.raises(GemmaEdgeError, match=r"up_proj\.weight_scale holds numbers that are not finite"):
        export_tiny(tmp_path, checkpoint=small, recipe="qat-mobile")


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (dict(quant_method="awq"), r"quant_method 'awq' is not supported; expected 'gemma'"),
        (dict(num_bits=3), r"num_bits has num_bits 3, expected 2, 4 or 8"),
        (dict(module_quant_configs={"mlp": {"num_bits": 5}}), r"mlp has num_bits 5"),
        (dict(module_quant_configs={"mlp": {"group_size": 32}}), r"group_size"),
        (dict(module_quant_configs={"m(lp": {"num_bits": 4}}), r"'m\(lp' is no regular expression"),
        (dict(modules_to_not_convert=["*"]), r"'\*' is no regular expression"),
    ],
)
def test_layouts_that_cannot_be_read_are_named(small: Path, tmp_path: Path, fields: dict, named: str):
    change_config(small, fields)
    with pytest.raises(ConfigError, match=named):
        prepare_tiny(small, tmp_path / "out", recipe="qat-mobile")


def test_a_tied_head_is_refused(small: Path, tmp_path: Path):
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | dict(tie_word_embeddings=True)))
    with pytest.raises(ConfigError, match=r"tie_word_embeddings with a quantized token table"):
        prepare_tiny(small, tmp_path / "out", recipe="qat-mobile")


def change_config(folder: Path, fields: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
