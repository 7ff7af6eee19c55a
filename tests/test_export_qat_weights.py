"""Weights of method gemma against transformers: bits by config.json, and every tensor's values, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    GemmaQuantizationConfig,
)
from transformers.integrations.gemma_quant import (
    QuantizedEmbedding,
    QuantizedLinear,
    replace_with_quant_layers,
)
from transformers.quantizers.base import HfQuantizer

from gemma_edge.export.checkpoint import open_checkpoint
from gemma_edge.export.geometry import parse_text_model
from gemma_edge.export.plan import TOKEN_TABLE, make_plan
from gemma_edge.export.qat import Held
from gemma_edge.export.qat_rows import find_held, float_rows, import_rows
from gemma_edge.export.quantize import dequantize_rows
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.synthetic import known_config

from .support.onnx_graphs import attributes, load_graph
from .support.tiny_bundles import TinyBundle, export_tiny, tiny_profile
from .support.tiny_qat import LAYOUT, tiny_qat_model, write_qat_checkpoint


def dequantized(module: nn.Module) -> np.ndarray:
    """The float32 weight that transformers computes with."""
    if isinstance(module, QuantizedEmbedding):
        return module.weight.detach().numpy()
    assert isinstance(module, QuantizedLinear)
    return module._dequantize_weights(torch.float32).detach().numpy()


@pytest.fixture(scope="module", params=[True, False], ids=["equal head", "own head"])
def qat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(transformers' model, the bundle of its checkpoint, whether the head is the token table's copy)"""
    folder = tmp_path_factory.mktemp("qat")
    model = tiny_qat_model(seed=1, equal_head=request.param)
    checkpoint = write_qat_checkpoint(folder / "checkpoint", model)
    return model, export_tiny(folder, checkpoint=checkpoint, recipe="qat-mobile"), request.param


def test_every_weight_is_transformers_own_to_the_last_bit(qat):
    model, bundle, _ = qat
    modules = {
        name.removeprefix("model."): module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedEmbedding | QuantizedLinear)
    }
    found = weights_by_operator(bundle)
    seen: set[tuple[str, int]] = set()
    for name, module in modules.items():
        weight, bits = found[name]
        np.testing.assert_array_equal(weight, dequantized(module), err_msg=name)
        assert bits == module.num_bits
        seen.add((type(module).__name__, bits))
    # Tables with a scale a row and a scale a block, products of each width.
    assert seen == {("QuantizedEmbedding", 2), ("QuantizedEmbedding", 4)} | {
        ("QuantizedLinear", bits) for bits in (2, 4, 8)
    }
    assert modules["embed_tokens_per_layer"].embedding_scale.shape[1] == 10
    by_name = {entry.tensor: entry for entry in bundle.bundle.manifest.quantization}
    assert {entry.relative_error for entry in by_name.values() if entry.method == "import"} == {0.0}
    floats = [name for name, entry in by_name.items() if entry.method != "import"]
    assert floats == ["per_layer_model_projection.weight"]


def weights_by_operator(bundle: TinyBundle) -> dict[str, tuple[np.ndarray, int]]:
    """Module name -> what ONNX Runtime's operator makes of the bundle's bytes, and the bits it reads.

    A product with the unit matrix, a look-up of all rows.
    """
    found: dict[str, tuple[np.ndarray, int]] = {}
    for file in ("embeddings.onnx", "decoder.onnx"):
        graph = load_graph(bundle.path / file)
        for node in graph.nodes("MatMulNBits", "GatherBlockQuantized"):
            settings = attributes(node) | dict(accuracy_level=0)
            is_table = node.op_type == "GatherBlockQuantized"
            names = [node.input[0], node.input[2]] if is_table else list(node.input[1:3])
            values = {name: graph.value(name) for name in names}
            if is_table:
                settings.pop("accuracy_level")
                inputs, rows = [names[0], "x", names[1]], np.arange(len(values[names[0]]))
            else:
                inputs, rows = ["x", *names], np.eye(settings["K"], dtype=np.float32)
            result = run_one(node.op_type, inputs, settings, values, rows)
            # The head's node is named by its placeholder; its bytes may be the token table's.
            is_head = not is_table and settings["N"] == 512 and settings["K"] == 64
            name = "lm_head" if is_head else names[1].removesuffix(".weight.scales")
            found[name] = (result if is_table else result.T, settings["bits"])
    return found


def run_one(
    op_type: str, inputs: list[str], settings: dict[str, Any], values: dict[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    node = helper.make_node(op_type, inputs, ["y"], domain="com.microsoft", **settings)
    x_type = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", x_type, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def test_an_equal_head_shares_the_tables_bytes(qat):
    _, bundle, equal = qat
    embeddings, decoder = (load_graph(bundle.path / f"{name}.onnx") for name in ("embeddings", "decoder"))
    table = embeddings.region(TOKEN_TABLE + ".rows")
    heads = [decoder.region(name) for name in decoder.initializers if name in HEAD_BLOCKS]
    assert (heads == [table]) == equal
    assert ("lm_head.weight" in {entry.tensor for entry in bundle.bundle.manifest.quantization}) != equal


HEAD_BLOCKS = ("lm_head.weight.blocks", TOKEN_TABLE + ".blocks")


@pytest.mark.parametrize("width", [64, 70, 33, 1])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32])
def test_rows_of_any_width(tmp_path: Path, bits: int, width: int, block: int):
    """Random bytes: also the bits that no value needs, and level -2^(bits-1)."""
    random = torch.Generator().manual_seed(bits * width)
    module = QuantizedLinear(width, 6, num_bits=bits)
    raw = torch.randint(0, 256, module.weight.shape, generator=random, dtype=torch.uint8)
    module.weight.data = raw.view(module.weight.dtype)
    module.weight_scale.data = torch.rand(6, 1, generator=random) + 0.1
    source = held_in(tmp_path, {"m.weight": module.weight, "m.weight_scale": module.weight_scale}, bits, 1)
    for first, count in ((0, 6), (2, 3)):
        expected = dequantized(module)[first : first + count]
        rows = import_rows(source, first, count, width=width, block=block)
        back = dequantize_rows(rows.packed, rows.scales, bits=bits, width=width)
        np.testing.assert_array_equal(back, expected)
        np.testing.assert_array_equal(float_rows(source, first, count, width=width), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 3, 6])
def test_tables_with_scales_for_blocks(tmp_path: Path, bits: int, columns: int):
    random = torch.Generator().manual_seed(bits + columns)
    module = QuantizedEmbedding(7, 96, torch.float32, num_bits=bits)
    shape = module.embedding_quantized.shape
    raw = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    module.embedding_quantized.data = raw.view(module.embedding_quantized.dtype)
    module.embedding_scale = nn.Parameter(torch.rand(7, columns, generator=random))
    tensors = {"m.weight": module.embedding_quantized, "m.weight_scale": module.embedding_scale}
    source = held_in(tmp_path, tensors, bits, columns)
    rows = import_rows(source, 0, 7, width=96, block=16)
    assert rows.scales.shape == (7, 6)
    back = dequantize_rows(rows.packed, rows.scales, bits=bits, width=96)
    np.testing.assert_array_equal(back, dequantized(module))


def held_in(folder: Path, tensors: dict[str, torch.Tensor], bits: int, columns: int):
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return find_held(open_checkpoint(folder), Held(bits, columns, "m.weight", "m.weight_scale"))


TRICKY: dict[str, Any] = dict(
    num_bits=8,
    quantize_embeddings=True,
    module_quant_configs={
        # The leftmost match decides, not the first pattern; among those at one place, the first.
        r"mlp\.down_proj$": {"num_bits": 2},
        r"layers\.0\.mlp": {"num_bits": 4},
        r"layers\.0\.mlp\.up": {"num_bits": 2},
        r"(self_attn)\.(q|k)_proj": {},
        r"language_model\.layers\.1\.self_attn": {"num_bits": 4},
        "embed_tokens": {"num_bits": 4},
    },
    modules_to_not_convert=["layers.1.mlp", "per_layer_input_gate", r"model\..*\.2\.self_attn", "proj"],
)


@pytest.mark.parametrize("multimodal", [True, False])
@pytest.mark.parametrize("layout", ["e2b", "e4b", "tiny", "tricky", "tables as floats", "no exceptions"])
def test_bits_of_every_module_are_those_transformers_gives(layout: str, multimodal: bool):
    if layout in ("e2b", "e4b"):
        fields = known_config(layout, "qat-mobile")["quantization_config"]
    else:
        fields = {
            "tiny": LAYOUT,
            "tricky": TRICKY,
            "tables as floats": LAYOUT | dict(quantize_embeddings=False),
            "no exceptions": LAYOUT | dict(modules_to_not_convert=None),
        }[layout]
    fields = {name: value for name, value in fields.items() if name != "quant_method"}
    reference = transformers_bits(fields, multimodal)
    config = text_fields() | dict(quantization_config=dict(fields, quant_method="gemma"))
    if multimodal:
        config = dict(model_type="gemma4", tie_word_embeddings=False, text_config=text_fields())
        config["quantization_config"] = dict(fields, quant_method="gemma")
    model = parse_text_model(config, "config.json")
    recipe = load_recipe("qat-mobile")
    plan = make_plan(model, tiny_profile(block=16), recipe, context=32)
    ours = {
        weight.name.removesuffix(".weight"): weight.held.bits if weight.held else None
        for weight in plan.weights
    }
    assert ours == {name: reference[name] for name in ours}
    assert len(ours) > 30


def text_fields() -> dict[str, Any]:
    layers = 4
    return dict(
        model_type="gemma4_text",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=64,
        tie_word_embeddings=False,
    )


def transformers_bits(fields: dict[str, Any], multimodal: bool) -> dict[str, int | None]:
    """Canonical module name -> bits of transformers' module, None for one left in floats."""
    text = Gemma4TextConfig(**{name: value for name, value in text_fields().items() if name != "model_type"})
    with torch.device("meta"):
        model: Any
        if multimodal:
            config = Gemma4Config(text_config=text, vision_config=None, audio_config=None)
            config.tie_word_embeddings = False
            model = Gemma4ForConditionalGeneration(config)
        else:
            model = Gemma4ForCausalLM(text)
        skipped = HfQuantizer.get_modules_to_not_convert(model, fields["modules_to_not_convert"])
        replace_with_quant_layers(model, GemmaQuantizationConfig(**fields), skipped)
    bits: dict[str, int | None] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | QuantizedEmbedding):
            short = name.removeprefix("model.").removeprefix("language_model.")
            bits[short] = getattr(module, "num_bits", None)
    return bits


def test_google_sizes():
    """E2B and E4B by config.json alone: bytes read for a token, and of the data files."""
    figures = {}
    for model in ("e2b", "e4b"):
        text = parse_text_model(known_config(model, "qat-mobile"), "config.json")
        profile = tiny_profile(block=128, budget_mib=8000)
        plan = make_plan(text, profile, load_recipe("qat-mobile"), context=512, head_is_table=True)
        figures[model] = (plan.memory.read_per_token_bytes, plan.file_bytes)
        assert {weight.storage.bits for weight in plan.weights if weight.held} == {2, 4, 8}
    assert 0.80e9 < figures["e2b"][0] < 0.88e9
    assert 1.9e9 < figures["e2b"][1] < 2.1e9
