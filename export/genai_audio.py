"""What onnxruntime-genai needs to hear with this bundle: four small graphs, an overlay of its configuration.

Its type `gemma4` has sessions of its own for images, sounds and embeddings. The graphs refer to the same
data files as the bundle's own; none has weights.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..runtime.bundle import AudioTokens, Tokens
from ..runtime.genai_files import AUDIO_OVERLAY, DECODER, EMBEDDINGS, NO_IMAGES, SOFT_TOKENS
from .genai import free_for_genai
from .trace import IR_VERSION, OPSET

ENCODER = "audio_encoder.onnx"
IMAGES, SOUNDS = "image_features", "audio_features"


def write_audio_variant(folder: Path, audio: AudioTokens, tokens: Tokens) -> None:
    """Write graphs and overlay into a folder that holds the bundle's own graphs."""
    decoder = ir.load(folder / "decoder.onnx")
    free_for_genai(decoder.graph)
    ir.save(decoder, folder / DECODER)
    embeddings = ir.load(folder / "embeddings.onnx")
    hidden_size = _merge_soft_tokens(embeddings.graph, audio.placeholder, tokens.pad)
    ir.save(embeddings, folder / EMBEDDINGS)
    ir.save(_passing("pixel_values", IMAGES, 1, hidden_size), folder / NO_IMAGES)
    ir.save(_passing("input_features", "soft_tokens", 1, hidden_size), folder / SOFT_TOKENS)
    text = json.dumps(_overlay(audio, [value.name for value in embeddings.graph.outputs]), indent=2)
    (folder / AUDIO_OVERLAY).write_text(text + "\n", encoding="utf-8")


def _overlay(audio: AudioTokens, embedded: list[str | None]) -> dict[str, Any]:
    """What differs from genai_config.json: as `og.Config(folder).overlay(text)` takes it.

    No processor is named: callers make log-mel frames and ids themselves, the bundle's way.
    """
    decoder_inputs = {"inputs_embeds": "inputs_embeds"}
    embedding_outputs = {"inputs_embeds": "inputs_embeds"}
    if "per_layer_inputs" in embedded:
        decoder_inputs["per_layer_inputs"] = embedding_outputs["per_layer_inputs"] = "per_layer_inputs"
    return {
        "model": {
            "type": "gemma4",
            "decoder": {"filename": DECODER, "inputs": decoder_inputs},
            "embedding": {
                "filename": EMBEDDINGS,
                "inputs": {"input_ids": "input_ids", "image_features": IMAGES, "audio_features": SOUNDS},
                "outputs": embedding_outputs,
            },
            "vision": {
                "filename": NO_IMAGES,
                "inputs": {"pixel_values": "pixel_values"},
                "outputs": {"image_features": IMAGES},
            },
            "speech": {
                "filename": ENCODER,
                "inputs": {"audio_embeds": "input_features"},
                "outputs": {"audio_features": "soft_tokens"},
            },
        }
    }


def _merge_soft_tokens(graph: ir.Graph, placeholder: int, pad: int) -> int:
    """The rows of a new input go in place of the placeholders' embeddings; returns their width.

    Placeholders look up the pad token's rows, as in the runtime. After the prompt there are no soft tokens: a
    row of zeros stands before the first, and a placeholder that the model says is a token like others.
    """
    ids, embedded, users = graph.inputs[0], graph.outputs[0], list(graph.inputs[0].uses())
    assert ids.shape is not None and embedded.shape is not None and embedded.dtype is not None
    dtype, hidden_size = embedded.dtype, embedded.shape[2]
    assert isinstance(hidden_size, int)
    rows_shape = ir.Shape(["rows", hidden_size])
    soft = ir.Value(name=SOUNDS, shape=rows_shape, type=ir.TensorType(dtype))
    images = ir.Value(name=IMAGES, shape=rows_shape, type=ir.TensorType(dtype))

    numbers = itertools.count()

    def constant(name: str, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array, name=f"genai.{name}")
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.initializers[value.name or ""] = value
        return value

    def node(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        made = ir.node(op, list(inputs), attributes, num_outputs=1)
        made.name = made.outputs[0].name = f"genai/{op}_{next(numbers)}"
        nodes.append(made)
        return made.outputs[0]

    nodes: list[ir.Node] = []
    zero = constant("zero", np.array(0, np.int64))
    is_placeholder = node("Equal", ids, constant("placeholder", np.array(placeholder, np.int64)))
    number = node("CumSum", node("Cast", is_placeholder, to=7), constant("axis", np.array(1, np.int64)))
    is_there = node("LessOrEqual", number, node("Shape", soft, start=0, end=1))
    is_soft = node("And", is_placeholder, is_there)
    place = node("Where", is_soft, number, zero)
    looked_up = node("Where", is_soft, constant("pad", np.array(pad, np.int64)), ids)
    for user, index in users:
        user.replace_input_with(index, looked_up)
    graph.insert_before(graph[0], nodes)
    nodes = []
    zeros = constant("zeros", np.zeros((1, hidden_size), dtype.numpy()))
    rows = node("Gather", node("Concat", zeros, soft, axis=0), place, axis=0)  # (1, S, hidden)
    last = node("Unsqueeze", is_soft, constant("last_axis", np.array([-1], np.int64)))
    merged = node("Where", last, rows, embedded)
    graph.extend(nodes)
    merged.name, merged.shape, merged.type = embedded.name, embedded.shape, embedded.type
    embedded.name = "genai/embedded"
    graph.outputs[0] = merged
    graph.inputs.extend([images, soft])
    return hidden_size


def _passing(source: str, target: str, batch: int, hidden_size: int) -> ir.Model:
    """A graph that gives back what it gets, (batch, rows, hidden)."""
    shape = ir.Shape([batch, "rows", hidden_size])
    given = ir.Value(name=source, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    passed = ir.node("Identity", [given])
    passed.outputs[0].name, passed.outputs[0].shape, passed.outputs[0].type = target, shape, given.type
    graph = ir.Graph([given], passed.outputs, nodes=[passed], opset_imports={"": OPSET}, name=target)
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="gemma-edge")
