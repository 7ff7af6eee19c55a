"""Gives the traced prefill graph its products: activations rounded to 8 bits row by row, times int8 weights.

    x --> largest magnitude of each row --> q = round(x * 127 / largest) + 128, uint8
    q, W^T --> MatMulIntegerToFloat --> times largest / 127

uint8 with zero point 128 against int8 is the pair that ONNX Runtime's integer units are fast with; signed
activations are not. A row that several products read is rounded once. The MLP's up projection is the widest
and is not multiplied with its rows' scales: the rows' levels after it are the same without, and what the down
projection gives is multiplied with them instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .attach import MICROSOFT, attach
from .checkpoint import Checkpoint
from .modules.ops import PLACEHOLDER_DOMAIN
from .plan import HEAD, UP
from .recipes import Recipe
from .store import DataFile, StoredChannels
from .trace import Traced

DOWN = ".mlp.down_proj.weight"
ACTIVATION_LEVELS = 127
TINY = 1e-30  # of a row of zeros: anything that does not overflow as 127 / TINY

Rounded = tuple[ir.Value, ir.Value]  # q (1, S, width) uint8, and its rows' scales (1, S, 1)


def attach_prefill(
    traced: Traced,
    stored: Mapping[str, StoredChannels],
    checkpoint: Checkpoint,
    constants: DataFile,
    recipe: Recipe,
) -> ir.Model:
    """Complete `traced` in place and return it. constants: where rotary tables go."""
    graph = traced.graph.graph
    shared = _declare(graph)
    rounded: dict[ir.Value, Rounded] = {}
    left_out: dict[str, ir.Value] = {}  # by the name of the weight whose product makes up for it
    for node in list(graph):
        if node.domain == PLACEHOLDER_DOMAIN:
            x, weight = node.inputs
            assert x is not None and weight is not None and weight.name is not None
            if x not in rounded:
                rounded[x] = _round(graph, node, x, shared)
            levels, scale = rounded[x]
            product = _multiply(graph, node, levels, stored[weight.name], shared)
            if weight.name.endswith(UP):
                left_out[weight.name.removesuffix(UP) + DOWN] = scale
            else:
                if weight.name in left_out:
                    scale = _times(graph, node, scale, left_out[weight.name], "scale")
                product = _times(graph, node, product, scale, "scaled")
            node.outputs[0].replace_all_uses_with(product, replace_graph_outputs=True)
            graph.remove(node, safe=True)
    return attach(traced, {}, checkpoint, constants, head=HEAD, recipe=recipe)


def _declare(graph: ir.Graph) -> dict[str, ir.Value]:
    """Constants of all products."""
    values = {
        "last_axis": np.array([-1], np.int64),
        "levels": np.array(ACTIVATION_LEVELS, np.float32),
        "step": np.array(1 / ACTIVATION_LEVELS, np.float32),
        "tiny": np.array(TINY, np.float32),
        "one": np.array(1, np.float32),
        "zero_point": np.array(128, np.uint8),
        "weight_zero_point": np.array(0, np.int8),
    }
    return {
        name: _initializer(graph, ir.tensor(array, name=f"rounding/{name}")) for name, array in values.items()
    }


def _round(graph: ir.Graph, before: ir.Node, x: ir.Value, shared: Mapping[str, ir.Value]) -> Rounded:
    highest = ir.node("ReduceMax", [x, shared["last_axis"]], dict(keepdims=1))
    lowest = ir.node("ReduceMin", [x, shared["last_axis"]], dict(keepdims=1))
    flipped = ir.node("Neg", [lowest.outputs[0]])
    largest = ir.node("Max", [highest.outputs[0], flipped.outputs[0], shared["tiny"]])
    inverse = ir.node("Div", [shared["levels"], largest.outputs[0]])
    scaled = ir.node("Mul", [x, inverse.outputs[0]])
    levels = ir.node("QuantizeLinear", [scaled.outputs[0], shared["one"], shared["zero_point"]])
    scale = ir.node("Mul", [largest.outputs[0], shared["step"]])
    _insert(graph, before, [highest, lowest, flipped, largest, inverse, scaled, levels, scale], "rounded")
    return levels.outputs[0], scale.outputs[0]


def _multiply(
    graph: ir.Graph,
    before: ir.Node,
    levels: ir.Value,
    entry: StoredChannels,
    shared: Mapping[str, ir.Value],
) -> ir.Value:
    """levels (1, S, width), already without their zero point in the result (1, S, outputs) float32."""
    outputs, width = entry.planned.shape
    name, file = entry.planned.name, entry.file
    weight = file.tensor(f"{name}.levels", entry.data_offset, ir.DataType.INT8, (width, outputs))
    scales = file.tensor(f"{name}.channel_scales", entry.scale_offset, ir.DataType.FLOAT, (outputs,))
    inputs = [
        levels,
        _initializer(graph, weight),
        shared["one"],
        _initializer(graph, scales),
        shared["zero_point"],
        shared["weight_zero_point"],
    ]
    product = ir.node("MatMulIntegerToFloat", inputs, domain=MICROSOFT)
    _insert(graph, before, [product], "product")
    return product.outputs[0]


def _times(graph: ir.Graph, before: ir.Node, x: ir.Value, y: ir.Value, what: str) -> ir.Value:
    node = ir.node("Mul", [x, y])
    _insert(graph, before, [node], what)
    return node.outputs[0]


def _insert(graph: ir.Graph, before: ir.Node, nodes: list[ir.Node], what: str) -> None:
    for number, node in enumerate(nodes):
        node.name = f"{before.name}/{what}_{number}"
        node.outputs[0].name = f"{node.name}_out"
        graph.insert_before(before, node)


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    assert tensor.name is not None
    value = ir.Value(
        name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.initializers[tensor.name] = value
    return value
