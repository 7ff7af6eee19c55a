"""The same model for onnxruntime-genai: its configuration and one graph from ids to logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..runtime.bundle import HIDDEN, READ, Caches, Tokens
from ..runtime.genai_files import TEXT
from .geometry import SLIDING, TextModel
from .trace import KEEP


def write_text_graph(embeddings: Path, decoder: Path, out: Path) -> None:
    """Join the two graphs into one that takes ids. It refers to their data files.

    onnxruntime-genai's `gemma4_text` knows one graph only. It allocates the caches itself, so their capacity
    is free here; and it asks for the last row's logits, so `logits_to_keep` is a constant.
    """
    model, front = ir.load(decoder), ir.load(embeddings)
    graph = model.graph
    joined = {value.name: value for value in front.graph.outputs}
    first = graph[0]
    nodes = list(front.graph)
    front.graph.remove(nodes)
    graph.insert_before(first, nodes)
    for name, value in list(front.graph.initializers.items()):
        del front.graph.initializers[name]
        if name in graph.initializers:  # the scales of a tied head
            value.replace_all_uses_with(graph.initializers[name])
        else:
            graph.initializers[name] = value
    ids = front.graph.inputs[0]
    front.graph.inputs.clear()
    front.graph.outputs.clear()
    for value in list(graph.inputs):
        if value.name in joined:
            value.replace_all_uses_with(joined[value.name])
            graph.inputs.remove(value)
    graph.inputs.insert(0, ids)
    free_for_genai(graph)
    ir.save(model, out)


def genai_config(model: TextModel, caches: Caches, tokens: Tokens) -> dict[str, Any]:
    """genai_config.json for onnxruntime-genai 0.18."""
    shape = model.geometry
    sliding = [cache for cache in caches.layers if cache.layer_type == SLIDING]
    # A generation is as long as the largest cache at least: a sliding one must hold its window.
    longest = max(caches.context, *(cache.capacity for cache in caches.layers))
    decoder: dict[str, Any] = {
        "session_options": {"provider_options": []},
        "filename": TEXT,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "num_hidden_layers": len(caches.layers),  # the layers that own a cache
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    if sliding:
        decoder["sliding_window"] = {
            "window_size": shape.sliding_window,
            "cache_slack": sliding[0].capacity - shape.sliding_window,  # CUDA's operator takes none
            "layers": [cache.index for cache in sliding],
            "slide_inputs": False,
            "slide_key_value_cache": False,
        }
    return {
        "model": {
            "type": "gemma4_text",
            "vocab_size": shape.vocab_size,
            "context_length": longest,
            "bos_token_id": tokens.bos,
            "eos_token_id": list(tokens.eos),
            "pad_token_id": tokens.pad,
            "decoder": decoder,
        },
        "search": {
            "max_length": longest,
            "past_present_share_buffer": True,
            "do_sample": False,
            "num_beams": 1,
        },
    }


def write_genai_config(path: Path, model: TextModel, caches: Caches, tokens: Tokens) -> None:
    path.write_text(json.dumps(genai_config(model, caches, tokens), indent=2) + "\n", encoding="utf-8")


def free_for_genai(graph: ir.Graph) -> None:
    """Let onnxruntime-genai allocate logits and caches; `logits_to_keep` becomes a constant."""
    for values, names in ((graph.inputs, (KEEP,)), (graph.outputs, (HIDDEN, READ))):
        for value in [value for value in values if value.name and value.name.startswith(names)]:
            values.remove(value)
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([1, 1, logits.shape[2]])
    _free_capacities(graph)


def _free_capacities(graph: ir.Graph) -> None:
    """Make dimension 2 of every cache symbolic: one name for the sliding layers', one for the others'."""
    names: dict[int, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        if value.name and value.name.startswith(("past_key_values.", "present.")) and value.shape is not None:
            capacity = value.shape[2]
            assert isinstance(capacity, int)
            name = names.setdefault(capacity, f"capacity_{len(names)}")
            value.shape = ir.Shape([*value.shape[:2], name, value.shape[3]])
