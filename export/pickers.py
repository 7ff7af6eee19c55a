"""Two small graphs that pick tokens from logits on the GPU: the best one, and the best few with their logits.

A row of 262,144 logits is cut into pieces that are searched side by side, then the pieces' winners are: one
search of the whole row would keep one of a GPU's processors busy and leave the others idle.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.bundle import GREEDY, TOP
from .trace import IR_VERSION, OPSET

TOP_COUNT = (
    128  # logits that `top.onnx` gives: more than the 64 that Gemma samples from, for the sake of ties
)


def write_pickers(folder: Path, vocab_size: int) -> None:
    for name, model in ((GREEDY, greedy(vocab_size)), (TOP, top(vocab_size, min(TOP_COUNT, vocab_size)))):
        ir.save(model, folder / name)


def greedy(vocab_size: int) -> ir.Model:
    """logits (1, 1, vocab) float32 -> token (1,) int64: the first of the largest."""
    logits, graph = _begin("greedy", vocab_size)
    pieces = pieces_of(vocab_size)
    size = graph.constant("size", [vocab_size // pieces])
    rows = graph.node("Reshape", [logits, graph.constant("rows", [pieces, vocab_size // pieces])])
    best = graph.node("ReduceMax", [rows, graph.constant("last_axis", [1])], keepdims=0)  # (pieces,)
    piece = graph.node("ArgMax", [best], axis=0, keepdims=1)  # (1,)
    place = graph.node("ArgMax", [graph.node("Gather", [rows, piece], axis=0)], axis=1, keepdims=0)  # (1,)
    token = graph.node("Add", [graph.node("Mul", [piece, size]), place])
    return graph.finish({"token": (token, ir.DataType.INT64, [1])})


def top(vocab_size: int, count: int) -> ir.Model:
    """logits (1, 1, vocab) float32 -> ids (count,) int64 and their logits (count,), the largest first."""
    logits, graph = _begin("top", vocab_size)
    pieces = pieces_of(vocab_size)
    length = vocab_size // pieces
    of_each = min(count, length)
    rows = graph.node("Reshape", [logits, graph.constant("rows", [pieces, length])])
    values, places = graph.nodes("TopK", [rows, graph.constant("of_each", [of_each])], 2, axis=1)
    starts = graph.constant("starts", np.arange(pieces, dtype=np.int64)[:, None] * length)
    flat = graph.constant("flat", [pieces * of_each])
    ids = graph.node("Reshape", [graph.node("Add", [places, starts]), flat])
    finalists = graph.node("Reshape", [values, flat])
    best, chosen = graph.nodes("TopK", [finalists, graph.constant("count", [count])], 2, axis=0)
    return graph.finish(
        {
            "ids": (graph.node("Gather", [ids, chosen], axis=0), ir.DataType.INT64, [count]),
            "scores": (best, ir.DataType.FLOAT, [count]),
        }
    )


def pieces_of(vocab_size: int) -> int:
    """The largest divisor that is not above the root."""
    return next(count for count in range(math.isqrt(vocab_size), 0, -1) if vocab_size % count == 0)


class _Graph:
    """A graph being put together."""

    def __init__(self, name: str, inputs: list[ir.Value]) -> None:
        self.graph = ir.Graph(inputs, [], nodes=[], name=name, opset_imports={"": OPSET})

    def constant(self, name: str, values: list[int] | np.ndarray) -> ir.Value:
        tensor = ir.tensor(np.asarray(values, np.int64), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.initializers[name] = value
        return value

    def nodes(self, op: str, inputs: list[ir.Value], count: int, **attributes: int) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes, num_outputs=count)
        number = len(self.graph)
        for index, value in enumerate(node.outputs):
            value.name = f"{op}_{number}_{index}"
        node.name = f"{op}_{number}"
        self.graph.append(node)
        return list(node.outputs)

    def node(self, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        return self.nodes(op, inputs, 1, **attributes)[0]

    def finish(self, outputs: dict[str, tuple[ir.Value, ir.DataType, list[int]]]) -> ir.Model:
        for name, (value, dtype, shape) in outputs.items():
            value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
            self.graph.outputs.append(value)
        return ir.Model(self.graph, ir_version=IR_VERSION)


def _begin(name: str, vocab_size: int) -> tuple[ir.Value, _Graph]:
    logits = ir.Value(
        name="logits", shape=ir.Shape([1, 1, vocab_size]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    return logits, _Graph(name, [logits])
