"""Gives a traced graph its weights: placeholders become operators, initializers point into data files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .checkpoint import Checkpoint
from .modules.ops import LINEAR, PLACEHOLDER_DOMAIN, TABLE
from .plan import HEAD
from .store import DataFile, StoredWeight
from .trace import Traced

MICROSOFT = "com.microsoft"
INLINE_MAX_BYTES = 16 << 10  # smaller initializers live in the graph file itself
ACCURACY_INT8 = 4  # MatMulNBits: activations as int8, which is several times faster than the float path


def attach(
    traced: Traced,
    stored: Mapping[str, StoredWeight],
    checkpoint: Checkpoint,
    constants: DataFile,
    *,
    head: str,
) -> ir.Model:
    """Complete `traced` in place and return it.

    head: canonical name of the weight the head multiplies with; with a tied head both graphs share its bytes.
    constants: where initializers go that are neither weights nor small.
    """
    graph = traced.graph.graph
    for node in list(graph):
        if node.domain == PLACEHOLDER_DOMAIN:
            _replace(graph, node, stored, head)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input():
            del graph.initializers[name]
        elif name in traced.makers:
            _fill(value, traced.makers[name](checkpoint.read), constants)
        elif value.const_value is None:
            _fill(value, checkpoint.read(name), constants)
    traced.graph.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    return traced.graph


def _replace(graph: ir.Graph, node: ir.Node, stored: Mapping[str, StoredWeight], head: str) -> None:
    weight_index = 1 if node.op_type == LINEAR else 0
    weight, other = node.inputs[weight_index], node.inputs[1 - weight_index]
    assert weight is not None and weight.name is not None and other is not None
    entry = stored[head if weight.name == HEAD else weight.name]
    make = {LINEAR: _linear, TABLE: _table}[node.op_type]
    replacement = make(graph, other, entry)
    replacement.name = node.name
    graph.insert_before(node, replacement)
    old, new = node.outputs[0], replacement.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _linear(graph: ir.Graph, x: ir.Value, entry: StoredWeight) -> ir.Node:
    planned = entry.planned
    rows, width = planned.shape
    if planned.storage.bits == 32:
        weight = _initializer(graph, entry, "", ir.DataType.FLOAT, planned.shape)
        return _node("FusedMatMul", [x, weight], dict(transB=1))
    bits, block = planned.storage.bits, planned.storage.block
    packed_shape = (rows, planned.blocks, block * bits // 8)
    inputs = [x, *_quantized(graph, entry, packed_shape, suffix=".blocks")]
    return _node(
        "MatMulNBits",
        inputs,
        dict(K=width, N=rows, bits=bits, block_size=block, accuracy_level=ACCURACY_INT8),
    )


def _table(graph: ir.Graph, ids: ir.Value, entry: StoredWeight) -> ir.Node:
    planned = entry.planned
    if planned.storage.bits == 32:
        weight = _initializer(graph, entry, "", ir.DataType.FLOAT, planned.shape)
        return ir.node("Gather", [weight, ids], dict(axis=0))
    bits, block = planned.storage.bits, planned.storage.block
    packed, scales = _quantized(graph, entry, (planned.shape[0], planned.row_bytes), suffix=".rows")
    return _node(
        "GatherBlockQuantized",
        [packed, ids, scales],
        dict(bits=bits, block_size=block, gather_axis=0, quantize_axis=1),
    )


def _quantized(
    graph: ir.Graph, entry: StoredWeight, packed_shape: tuple[int, ...], suffix: str
) -> tuple[ir.Value, ir.Value]:
    """The packed matrix, in the shape its operator wants, and the scales (rows, blocks)."""
    scale_shape = (entry.planned.shape[0], entry.planned.blocks)
    return (
        _initializer(graph, entry, suffix, ir.DataType.UINT8, packed_shape),
        _initializer(graph, entry, ".scales", ir.DataType.FLOAT, scale_shape),
    )


def _initializer(
    graph: ir.Graph, entry: StoredWeight, suffix: str, dtype: ir.DataType, shape: tuple[int, ...]
) -> ir.Value:
    name = entry.planned.name + suffix
    offset = entry.scale_offset if suffix == ".scales" else entry.data_offset
    assert offset is not None
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = entry.file.tensor(name, offset, dtype, shape)
    graph.initializers[name] = value
    return value


def _node(op_type: str, inputs: list[ir.Value], attributes: dict[str, int]) -> ir.Node:
    return ir.node(op_type, inputs, attributes, domain=MICROSOFT)


def _fill(value: ir.Value, array: np.ndarray, constants: DataFile) -> None:
    assert value.name is not None
    if array.nbytes > INLINE_MAX_BYTES:
        value.const_value = constants.add(value.name, array)
    else:
        value.const_value = ir.tensor(array, name=value.name)
