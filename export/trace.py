"""Traces the modules under fake tensors into ONNX graphs: no weight exists yet, whatever the model's size.

A traced graph has placeholder operators where weights go (`modules/ops.py`) and initializers without values;
`attach` replaces the first and gives the second their bytes.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import onnx_ir as ir
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import __version__
from ..runtime.bundle import HIDDEN, READ, Caches
from .audio_geometry import AudioModel
from .drafter_geometry import DrafterModel
from .geometry import TextModel
from .modules.audio import AudioEncoder
from .modules.constants import Constants, Make
from .modules.cuda_decoder import CudaDecoder
from .modules.decoder import Decoder
from .modules.drafter import Drafter
from .modules.embeddings import Embeddings
from .modules.prefill import Prefill

OPSET = 23
TENSOR_SCATTER_OPSET = 24  # the first with TensorScatter; torch writes 23 at most, nothing else used changed
IR_VERSION = 11
KEEP = "logits_to_keep"
CUDA_LENGTHS = ("last_position", "total_length", "window_length")  # inputs of the decoder for CUDA

CACHE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Traced:
    """A graph without weights."""

    graph: ir.Model
    makers: dict[str, Make]  # initializer name -> its value, for those that are not in the checkpoint


def trace_decoder(
    model: TextModel, caches: Caches, inner: torch.dtype = torch.float32, drafts: bool = False
) -> Traced:
    """The decoder with the names that runtime and onnxruntime-genai expect; cache sizes are fixed.

    inner: the number type of attention and MLP. drafts: with an output for a drafter.
    """
    with _fake_tensors():
        module = Decoder(model, context=caches.context, kv_dtype=caches.dtype, inner=inner, drafts=drafts)
        module.eval().requires_grad_(False)
        names, entering = _entering(model)
        past = _past(caches)
        example = (
            *entering,
            torch.zeros(1, 7, dtype=torch.int64),
            torch.zeros(1, 5, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            past,
        )
        tokens, total, rows = (torch.export.Dim(name, min=2, max=2**20) for name in ("new", "total", "kept"))
        dynamic: tuple = (
            {1: tokens},
            {1: tokens} if len(names) > 1 else None,
            {1: total},
            {1: tokens},
            {},
            {0: rows},
            [{} for _ in past],
        )
        graph = _export(module, example, dynamic)
    names += ["attention_mask", "position_ids"]
    keep, rows = graph.graph.inputs[len(names) : len(names) + 2]
    _remove_inputs(graph.graph, [rows])
    keep.name = KEEP
    keep.const_value = ir.tensor([1], dtype=ir.DataType.INT64, name=keep.name)
    graph.graph.initializers[keep.name] = keep  # an input with a default: callers may leave it out
    _name_decoder(graph, [*names, KEEP], caches, last=[HIDDEN] if drafts else [])
    return Traced(graph, _makers(module.constants))


def trace_cuda_decoder(
    model: TextModel, caches: Caches, inner: torch.dtype, fused: frozenset[int] = frozenset()
) -> Traced:
    """The decoder as our own engine runs it on CUDA: `CudaDecoder`. fused: as there."""
    with _fake_tensors():
        module = CudaDecoder(model, context=caches.context, kv_dtype=caches.dtype, inner=inner, fused=fused)
        module.eval().requires_grad_(False)
        names, entering = _entering(model)
        past = _past(caches)
        example = (
            *entering,
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros((), dtype=torch.int32),
            torch.zeros((), dtype=torch.int32),
            past,
        )
        tokens = torch.export.Dim("new", min=2, max=2**20)
        rows = {1: tokens}
        graph = _export(
            module, example, (rows, rows if len(names) > 1 else None, {}, {}, {}, [{} for _ in past])
        )
    _name_decoder(graph, [*names, *CUDA_LENGTHS], caches)
    return Traced(graph, _makers(module.constants))


def trace_prefill(model: TextModel, caches: Caches) -> Traced:
    """The graph that fills the caches from a prompt: `Prefill`."""
    with _fake_tensors():
        module = Prefill(model, context=caches.context, kv_dtype=caches.dtype).eval().requires_grad_(False)
        names, entering = _entering(model)
        past = _past(caches)
        example = (
            *entering,
            torch.zeros(1, 7, dtype=torch.int64),
            torch.zeros(1, 5, dtype=torch.int64),
            past,
        )
        tokens, total = (torch.export.Dim(name, min=2, max=2**20) for name in ("new", "total"))
        rows = {1: tokens}
        dynamic: tuple = (rows, rows if len(names) > 1 else None, {1: total}, rows, [{} for _ in past])
        graph = _export(module, example, dynamic)
    names += ["attention_mask", "position_ids"]
    _name_decoder(graph, names, caches, logits=False)
    return Traced(graph, _makers(module.constants))


def trace_drafter(model: DrafterModel, caches: Caches) -> Traced:
    """The drafter over the caches of its target that it reads, under their names in the decoder."""
    backbone = model.target.geometry.hidden_size
    read = [caches.layers[model.cache_index(layer_type)] for layer_type in model.sources]
    with _fake_tensors():
        module = Drafter(model, context=caches.context, kv_dtype=caches.dtype)
        module.eval().requires_grad_(False)
        past = _past(msgspec.structs.replace(caches, layers=tuple(read)))
        example = (
            torch.zeros(1, 1, backbone),
            torch.zeros(1, 1, backbone),
            torch.zeros(1, 7, dtype=torch.int64),
            torch.zeros(1, 1, dtype=torch.int64),
            past,
        )
        total = torch.export.Dim("total", min=2, max=2**20)
        graph = _export(module, example, ({}, {}, {1: total}, {}, [{} for _ in past]))
    names = ["inputs_embeds", HIDDEN, "attention_mask", "position_ids"]
    names += [f"past_key_values.{cache.index}.{part}" for cache in read for part in ("key", "value")]
    for value, name in zip(graph.graph.inputs, names, strict=True):
        value.name = name
    outputs = ("token", "probability", "drafted_states", "scores", "ids")
    for value, name in zip(graph.graph.outputs, outputs, strict=False):
        value.name = name
    _show_read_caches(graph.graph)
    _finish(graph, "drafter")
    return Traced(graph, _makers(module.constants))


def trace_embeddings(model: TextModel) -> Traced:
    """Token ids to the decoder's float inputs."""
    with _fake_tensors():
        module = Embeddings(model).eval().requires_grad_(False)
        tokens = torch.export.Dim("new", min=2, max=2**20)
        graph = _export(module, (torch.zeros(1, 5, dtype=torch.int64),), ({1: tokens},))
    graph.graph.inputs[0].name = "input_ids"
    for value, name in zip(graph.graph.outputs, ("inputs_embeds", "per_layer_inputs"), strict=False):
        value.name = name
    _finish(graph, "embeddings")
    return Traced(graph, {})


def trace_audio(model: AudioModel, streaming: bool) -> Traced:
    """Log-mel frames to soft tokens: a whole clip, or one chunk after the state of those before it."""
    with _fake_tensors():
        module = AudioEncoder(model).eval().requires_grad_(False)
        dtypes = {"float32": torch.float32, "int64": torch.int64}
        past = [torch.zeros(tensor.shape, dtype=dtypes[tensor.dtype]) for tensor in model.state]
        # No formula ties the number of soft tokens to that of frames: tracing would make guards of it.
        frames = torch.export.Dim("frames", min=5, max=2**20)  # under 5 a dimension is 1: graphs take it too
        tokens, blocks = (torch.export.Dim(name, min=2, max=2**20) for name in ("tokens", "blocks"))
        stand_ins = (torch.zeros(29), torch.zeros(3))
        example = (torch.zeros(1, 113, model.mel_bins), past if streaming else None, stand_ins)
        state_dims: list[dict] | None = [{} for _ in past] if streaming else None
        graph = _export(module, example, ({1: frames}, state_dims, ({0: tokens}, {0: blocks})))
    _remove_inputs(graph.graph, graph.graph.inputs[-2:])
    graph.graph.inputs[0].name = "input_features"
    graph.graph.outputs[0].name = "soft_tokens"
    for values, prefix in ((graph.graph.inputs, "past"), (graph.graph.outputs, "present")):
        for value, tensor in zip(values[1:], model.state, strict=streaming):
            value.name = f"{prefix}.{tensor.name}"
    _finish(graph, "audio")
    return Traced(graph, _makers(module.constants))


def _entering(model: TextModel) -> tuple[list[str], tuple[torch.Tensor, torch.Tensor | None]]:
    """What enters the first layer: names, and rows of it; None without per-layer inputs."""
    shape = model.geometry
    width = shape.num_hidden_layers * shape.hidden_size_per_layer_input
    names = ["inputs_embeds", "per_layer_inputs"] if width else ["inputs_embeds"]
    return names, (torch.zeros(1, 5, shape.hidden_size), torch.zeros(1, 5, width) if width else None)


def _past(caches: Caches) -> list[torch.Tensor]:
    """Every input needs a tensor of its own: two uses of one would collapse into one graph input."""
    return [
        torch.zeros(1, cache.kv_heads, cache.capacity, cache.head_dim, dtype=CACHE_DTYPES[caches.dtype])
        for cache in caches.layers
        for _ in ("key", "value")
    ]


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Fake tensors without gradients, and without the tracing libraries' talk."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.__trace", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export(module: nn.Module, example: tuple, dynamic: tuple) -> ir.Model:
    program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
    exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert exported is not None
    return exported.model


def _makers(constants: Constants) -> dict[str, Make]:
    return {f"constants.{name}": make for name, make in constants.makers.items()}


def _name_decoder(
    model: ir.Model, names: list[str], caches: Caches, *, logits: bool = True, last: Sequence[str] = ()
) -> None:
    """Give inputs and outputs their public names: `names`, the caches'; `logits`, the caches', `last`."""
    graph = model.graph
    cache_names = [f"{cache.index}.{part}" for cache in caches.layers for part in ("key", "value")]
    for value, name in zip(
        graph.inputs, [*names, *(f"past_key_values.{n}" for n in cache_names)], strict=True
    ):
        value.name = name
    first = ["logits"] if logits else []
    for value, name in zip(
        graph.outputs, [*first, *(f"present.{n}" for n in cache_names), *last], strict=True
    ):
        value.name = name
    _show_read_caches(graph)
    _finish(model, "decoder" if logits else "prefill")


def _show_read_caches(graph: ir.Graph) -> None:
    """Make outputs of the caches that the operator wants to write though it only reads them (int8).

    Bound to the buffer that is read, they cost nothing; otherwise all of that cache is copied in every run.
    """
    shown = set(graph.outputs)
    numbers = itertools.count()
    for node in graph:
        if node.op_type != "GroupQueryAttention" or len(node.outputs) < 3 or node.outputs[1] in shown:
            continue
        number = next(numbers)
        for cache, value in zip(node.inputs[3:5], node.outputs[1:3], strict=True):
            assert cache is not None and cache.name is not None
            _, index, part = cache.name.split(".")  # present.3.key, or past_key_values.3.key
            value.name, value.shape, value.type = f"{READ}{index}.{part}.{number}", cache.shape, cache.type
            graph.outputs.append(value)


def _remove_inputs(graph: ir.Graph, stand_ins: Sequence[ir.Value]) -> None:
    """Drop the inputs that stood for a dimension while tracing."""
    for value in stand_ins:
        if value.uses():
            raise AssertionError(f"{value.name}, which stands for a dimension, became data of the graph")
        graph.inputs.remove(value)


def _finish(model: ir.Model, prefix: str) -> None:
    """Drop what tracing leaves behind, also shapes inside the graph: those of padded rows are wrong.

    Values and nodes are numbered after `prefix`, so that two graphs can be joined.
    """
    graph = model.graph
    outputs = set(graph.outputs)
    numbers = itertools.count()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        node.name = f"{prefix}/{node.op_type}_{next(numbers)}"
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.shape = None
                value.type = None
                value.name = f"{prefix}/{next(numbers)}"
    for value in graph.initializers.values():
        if value.name != KEEP:
            value.const_value = None  # a fake tensor
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    model.opset_imports[""] = TENSOR_SCATTER_OPSET
    model.opset_imports["com.microsoft"] = 1
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "gemma-edge", __version__
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.doc_string = None
