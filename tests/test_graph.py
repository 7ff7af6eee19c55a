"""What the graphs consist of: caches, no float matmul, weights stored once, tables mapped, not copied."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import Gemma4TextConfig

from .support.graph_runner import GraphRunner
from .support.onnx_graphs import attributes, load_graph
from .support.tiny_bundles import export_tiny
from .support.tiny_checkpoint import random_model

S, F = "sliding_attention", "full_attention"
MODEL = dict(seed=7, num_hidden_layers=6, layer_types=[S, S, F] * 2, num_kv_shared_layers=3)

QUANTIZED = MODEL | dict(layout="multimodal", shards=2)

# Operators that multiply matrices of floats, whatever they are called.
FLOAT_MATMULS = {
    *("MatMul", "Gemm", "Einsum", "FusedMatMul", "FusedGemm", "TransposeMatMul", "Conv", "Attention"),
    *("MultiHeadAttention", "DotProduct", "BatchMatMul"),
}


def test_caches_are_inputs_of_layers_that_own_one_and_sized_by_the_device(tiny_bundle):
    tiny = tiny_bundle(model=MODEL, context=96)
    shapes = load_graph(tiny.path / "decoder.onnx").inputs()
    caches = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
    assert len(caches) == 2 * 3  # six layers, three of them KV-shared
    for part in ("key", "value"):
        for index in range(2):
            assert caches[f"past_key_values.{index}.{part}"] == (1, 1, 8 + 4, 16)
        assert caches[f"past_key_values.2.{part}"] == (1, 1, 96, 32)
    assert shapes["inputs_embeds"][::2] == (1, 64)
    assert shapes["per_layer_inputs"][::2] == (1, 6 * 16)
    assert shapes["logits_to_keep"] == (1,)


def test_shared_layers_write_nothing_and_only_one_row_may_enter_them(tiny_bundle):
    graph = load_graph(tiny_bundle(model=MODEL, context=96, kv="float16").path / "decoder.onnx")
    attention = graph.nodes("GroupQueryAttention")
    writers = [node for node in attention if len(node.output) == 3]
    readers = [node for node in attention if len(node.output) == 1]
    # Of the three layers that own a cache the last writes with TensorScatter: its attention is skipped too.
    assert (len(writers), len(readers), len(graph.nodes("TensorScatter"))) == (2, 4, 2)
    for node in readers:
        assert graph.value(node.input[1]).shape[1] == 0 and node.input[1] == node.input[2]
        assert "sliding_window_cache" not in attributes(node)
    assert all(attributes(node)["sliding_window_cache"] == 1 for node in writers)
    assert not {node.op_type for node in graph.nodes()} & {"If", "Loop", "Scan"}


def test_float32_caches_are_read_with_plain_products_and_cut_once_for_all_readers(tiny_bundle):
    graph = load_graph(tiny_bundle(model=MODEL, context=96).path / "decoder.onnx")
    (writers, scatters) = (graph.nodes("GroupQueryAttention"), graph.nodes("TensorScatter"))
    assert (len(writers), len(scatters)) == (2, 2)
    assert all(len(node.output) == 3 for node in writers)
    products = graph.nodes("FusedMatMul")
    # The others multiply with weights.
    scores = [node for node in products if node.input[1] not in graph.initializers]
    outputs = graph.nodes("MatMul")
    assert len(scores) == len(outputs) == 4  # three shared layers, and the last one that owns a cache
    cut = [node.input[0] for node in graph.nodes("Slice") if node.input[0].startswith("present.")]
    assert sorted(cut) == [f"present.{index}.{part}" for index in (1, 2) for part in ("key", "value")]
    assert not {node.op_type for node in graph.nodes()} & {"If", "Loop", "Scan"}


@pytest.mark.parametrize("recipe", ["int4", "int8"])
def test_no_matmul_stays_in_float(tiny_bundle, recipe: str):
    tiny = tiny_bundle(recipe=recipe, block=32, model=QUANTIZED)
    for name in ("decoder.onnx", "embeddings.onnx", "text.onnx"):
        graph = load_graph(tiny.path / name)
        left = [node for node in graph.nodes() if node.op_type in FLOAT_MATMULS]
        assert not [name for node in left for name in node.input if name in graph.initializers]
        assert {node.op_type for node in left} <= {"MatMul", "FusedMatMul"}  # of queries and caches
        assert not any(node.domain == "gemma_edge" for node in graph.nodes())
        assert not graph.nodes("Gather", "DequantizeLinear")
    decoder = load_graph(tiny.path / "decoder.onnx")
    linears = decoder.nodes("MatMulNBits")
    # Six layers: q, o, three of the MLP, two of the per-layer input; k and v of three; projection and head.
    assert len(linears) == 6 * 7 + 3 * 2 + 2
    assert all(attributes(node)["accuracy_level"] == 4 for node in linears)
    assert len(load_graph(tiny.path / "embeddings.onnx").nodes("GatherBlockQuantized")) == 2
    assert {entry.tensor for entry in tiny.bundle.manifest.quantization} == {
        *(node.input[2].removesuffix(".scales") for node in linears),
        "embed_tokens_per_layer.weight",
    }


@pytest.mark.parametrize("recipe", ["int4", "int8", "fp32"])
def test_the_tied_head_is_the_embedding_table(tiny_bundle, recipe: str):
    """Same bytes of the same file, and the text graph adds none."""
    tiny = tiny_bundle(recipe=recipe, block=32, model=QUANTIZED)
    decoder, embeddings, text = (
        load_graph(tiny.path / f"{n}.onnx") for n in ("decoder", "embeddings", "text")
    )
    suffixes = [(".blocks", ".rows"), (".scales", ".scales")] if recipe != "fp32" else [("", "")]
    for head, table in suffixes:
        region = embeddings.region("embed_tokens.weight" + table)
        assert decoder.region("embed_tokens.weight" + head) == region
        assert region[0] == "embeddings.onnx.data"
        assert text.region("embed_tokens.weight" + head) == region
    assert sorted(path.name for path in tiny.path.glob("*.data")) == [
        "decoder.onnx.data",
        "embeddings.onnx.data",
    ]
    for name in text.initializers:
        assert name in decoder.initializers or name in embeddings.initializers


@pytest.mark.parametrize(("recipe", "block"), [("int4", 32), ("int8", 32), ("int4", 16)])
def test_quantized_graphs_compute_with_the_weights_that_were_stored(
    tiny_bundle, tmp_path: Path, recipe: str, block: int
):
    """transformers with the dequantized weights gives the graph's logits, once activations stay float."""
    tiny = tiny_bundle(recipe=recipe, block=block, model=QUANTIZED)
    model = with_stored_weights(tiny)
    exact = tmp_path / "bundle"
    shutil.copytree(tiny.path, exact)
    set_accuracy(exact / "decoder.onnx", 0)
    ids = list(range(60, 100))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    graphs = GraphRunner(exact)
    assert np.abs(graphs.run(ids[:30])[-1] - expected[29]).max() < 2e-3
    for index in range(30, 40):
        assert np.abs(graphs.run([ids[index]])[-1] - expected[index]).max() < 2e-3
    # As exported, activations are int8 in blocks: close, not equal.
    fast = GraphRunner(tiny.path).run(ids)[-1]
    assert np.corrcoef(fast, expected[-1])[0, 1] > 0.98


def with_stored_weights(tiny) -> torch.nn.Module:
    """The reference model with the weights that the bundle's quantized matrices stand for."""
    checkpoint = tiny.checkpoint
    config = json.loads((checkpoint / "config.json").read_text())["text_config"]
    model = random_model(Gemma4TextConfig(**config), seed=7)
    stored = load_graph(tiny.path / "decoder.onnx").dequantized()
    stored |= load_graph(tiny.path / "embeddings.onnx").dequantized()
    with torch.no_grad():
        for name, matrix in stored.items():
            model.get_parameter(f"model.{name}").copy_(torch.from_numpy(matrix.copy()))
    assert len(stored) == len(tiny.bundle.manifest.quantization)
    return model


def set_accuracy(path: Path, level: int) -> None:
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    onnx.save(model, path)


MEASURE = """
import json, sys
import numpy as np, onnxruntime as ort

def memory_kib():
    fields = (line.split() for line in open("/proc/self/smaps_rollup"))
    return {parts[0][:-1]: int(parts[1]) for parts in fields if len(parts) == 3}

options = ort.SessionOptions()
options.intra_op_num_threads = 1
before = memory_kib()
session = ort.InferenceSession(sys.argv[1], options)
loaded = memory_kib()
ids = np.arange(0, int(sys.argv[2]), 16)[None]  # a row in every few pages
for part in np.array_split(ids, 64, axis=1):
    session.run(None, {"input_ids": part})
touched = memory_kib()
grown = lambda after, key: after[key] - before[key]
print(json.dumps({
    "anonymous_loaded": grown(loaded, "Anonymous"),
    "anonymous": grown(touched, "Anonymous"),
    "file": grown(touched, "Rss") - grown(touched, "Anonymous"),
}))
"""


def test_embedding_tables_are_mapped_not_copied(tmp_path: Path):
    """A table of over 100 MB: with rows read all over it, its pages are the file's, not the process's."""
    rows = 65536
    tiny = export_tiny(
        tmp_path,
        recipe="int8",
        model=dict(
            vocab_size=512,
            vocab_size_per_layer_input=rows,
            num_hidden_layers=1,
            layer_types=[F],
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=1664,
        ),
    )
    table_kib = rows * 1664 >> 10
    assert table_kib > 100 << 10
    # The token table has fewer rows than the other: ask the per-layer table alone.
    graph = tiny.path / "embeddings.onnx"
    model = onnx.load(graph, load_external_data=False)
    model.graph.output.remove(model.graph.output[0])
    onnx.save(model, graph)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(graph), str(rows)], capture_output=True, text=True, check=True
    )
    grown = json.loads(result.stdout.splitlines()[-1])
    assert grown["file"] > table_kib * 0.8, grown
    assert grown["anonymous_loaded"] < 20 << 10, grown
    assert grown["anonymous"] < 40 << 10, grown
