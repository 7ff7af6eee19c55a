"""Gives a traced graph its weights: placeholders become operators, initializers point into data files."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from .checkpoint import Checkpoint
from .fused import fused
from .modules.ops import LINEAR, PLACEHOLDER_DOMAIN, TABLE
from .plan import HEAD
from .qat import INPUT_SCALE, OUTPUT_SCALE
from .recipes import Activations, Recipe
from .store import DataFile, StoredWeight
from .trace import Traced

MICROSOFT = "com.microsoft"
INLINE_MAX_BYTES = 16 << 10  # smaller initializers live in the graph file itself
# MatMulNBits: activations as int8, which is several times faster than the float path, or as float32.
ACCURACY_LEVELS: dict[Activations, int] = {"int8": 4, "float32": 0}
SCALE_TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
FLOAT_TYPES = {16: ir.DataType.FLOAT16, 32: ir.DataType.FLOAT}


def attach(
    traced: Traced,
    stored: Mapping[str, StoredWeight],
    checkpoint: Checkpoint,
    constants: DataFile,
    *,
    head: str,
    recipe: Recipe,
) -> ir.Model:
    """Complete `traced` in place and return it.

    head: canonical name of the weight the head multiplies with; with a tied head both graphs share its bytes.
    recipe: its settings, how products compute; what each weight is stored as is in `stored`.
    constants: where initializers go that are neither weights nor small.
    """
    graph = traced.graph.graph
    for node in list(graph):
        if node.domain == PLACEHOLDER_DOMAIN:
            _replace(graph, node, stored, checkpoint, head, recipe)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_input():
            del graph.initializers[name]
        elif name in traced.makers:
            _fill(value, traced.makers[name](checkpoint.read), constants)
        elif value.const_value is None:
            _fill(value, checkpoint.read(name), constants)
    traced.graph.opset_imports.pop(PLACEHOLDER_DOMAIN, None)
    return traced.graph


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    stored: Mapping[str, StoredWeight],
    checkpoint: Checkpoint,
    head: str,
    recipe: Recipe,
) -> None:
    weight_index = 1 if node.op_type == LINEAR else 0
    weight, other = node.inputs[weight_index], node.inputs[1 - weight_index]
    assert weight is not None and weight.name is not None and other is not None
    in_half = weight.dtype == ir.DataType.FLOAT16
    names = [value.name for value in node.inputs[1:]] if node.op_type == LINEAR else [weight.name]
    entry = _entry([stored[head if name == HEAD else name] for name in names if name is not None])
    if node.op_type == TABLE:
        nodes = _table(graph, other, entry)
    elif recipe.activation_scales:
        module = weight.name.removesuffix(".weight")
        before = _rounded(graph, other, checkpoint, module + INPUT_SCALE)
        product = _linear(graph, before[-1].outputs[0] if before else other, entry, recipe, in_half)
        after = _rounded(graph, product[-1].outputs[0], checkpoint, module + OUTPUT_SCALE)
        nodes = [*before, *product, *after]
    else:
        nodes = _linear(graph, other, entry, recipe, in_half)
    for number, replacement in enumerate(nodes):
        replacement.name = f"{node.name}_{number}" if number + 1 < len(nodes) else node.name
        replacement.outputs[0].name = f"{replacement.name}_out"
        graph.insert_before(node, replacement)
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _entry(parts: list[StoredWeight]) -> StoredWeight:
    """One weight, or the matrix that several make together: their bytes follow each other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for part, following in pairwise(parts):
        assert following.data_offset == part.data_offset + part.planned.data_bytes
        if part.scale_offset is not None:
            assert following.scale_offset == part.scale_offset + part.planned.scale_bytes
    planned = fused([part.planned for part in parts])
    return StoredWeight(planned, first.file, first.data_offset, first.scale_offset, None)


def _linear(
    graph: ir.Graph, x: ir.Value, entry: StoredWeight, recipe: Recipe, in_half: bool
) -> list[ir.Node]:
    """in_half: x is float16, and so is the product."""
    planned = entry.planned
    rows, width = planned.shape
    if planned.storage.is_float:
        weight, widen = _float(graph, entry, in_half)
        return [*widen, _node("FusedMatMul", [x, weight], dict(transB=1))]
    bits, block = planned.storage.bits, planned.storage.block
    packed_shape = (rows, planned.blocks, block * bits // 8)
    inputs = [x, *_quantized(graph, entry, packed_shape, suffix=".blocks")]
    level = ACCURACY_LEVELS[recipe.activations]
    attributes = dict(K=width, N=rows, bits=bits, block_size=block, accuracy_level=level)
    return [_node("MatMulNBits", inputs, attributes)]


def _rounded(graph: ir.Graph, x: ir.Value, checkpoint: Checkpoint, scale_name: str) -> list[ir.Node]:
    """x rounded to 256 steps of a static scale and back, as in training; nothing without such a scale."""
    scale = checkpoint.read(scale_name) if scale_name in checkpoint.tensors else np.zeros(1)
    if not scale.any():  # 0 in transformers too: not calibrated
        return []
    step = _constant(graph, scale_name, scale.reshape(()).astype(np.float32))
    zero = _constant(graph, "zero_point_128", np.full((), 128, np.uint8))
    quantized = ir.node("QuantizeLinear", [x, step, zero])
    return [quantized, ir.node("DequantizeLinear", [quantized.outputs[0], step, zero])]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.initializers[name] = value
    return graph.initializers[name]


def _table(graph: ir.Graph, ids: ir.Value, entry: StoredWeight) -> list[ir.Node]:
    planned = entry.planned
    if planned.storage.is_float:
        weight = _initializer(graph, entry, "", FLOAT_TYPES[planned.storage.bits], planned.shape)
        gather = ir.node("Gather", [weight, ids], dict(axis=0))
        return [gather, *([_widened(gather.outputs[0])] if planned.storage.bits == 16 else [])]
    bits, block = planned.storage.bits, planned.storage.block
    packed, scales = _quantized(graph, entry, (planned.shape[0], planned.row_bytes), suffix=".rows")
    attributes = dict(bits=bits, block_size=block, gather_axis=0, quantize_axis=1)
    return [_node("GatherBlockQuantized", [packed, ids, scales], attributes)]


def _float(graph: ir.Graph, entry: StoredWeight, in_half: bool) -> tuple[ir.Value, list[ir.Node]]:
    """A float matrix: stored in the type that is wanted, or cast once when the graph is loaded."""
    planned = entry.planned
    weight = _initializer(graph, entry, "", FLOAT_TYPES[planned.storage.bits], planned.shape)
    wanted = 16 if in_half else 32
    if planned.storage.bits == wanted:
        return weight, []
    cast = _cast(weight, FLOAT_TYPES[wanted])
    return cast.outputs[0], [cast]


def _widened(x: ir.Value) -> ir.Node:
    return _cast(x, ir.DataType.FLOAT)


def _cast(x: ir.Value, dtype: ir.DataType) -> ir.Node:
    return ir.node("Cast", [x], dict(to=dtype.value))


def _quantized(
    graph: ir.Graph, entry: StoredWeight, packed_shape: tuple[int, ...], suffix: str
) -> tuple[ir.Value, ir.Value]:
    """The packed matrix, in the shape its operator wants, and the scales (rows, blocks)."""
    scale_shape = (entry.planned.shape[0], entry.planned.blocks)
    return (
        _initializer(graph, entry, suffix, ir.DataType.UINT8, packed_shape),
        _initializer(graph, entry, ".scales", SCALE_TYPES[entry.planned.inner], scale_shape),
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
    assert value.name is not None and value.dtype is not None
    array = array.astype(value.dtype.numpy(), copy=False)
    if array.nbytes > INLINE_MAX_BYTES:
        value.const_value = constants.add(value.name, array)
    else:
        value.const_value = ir.tensor(array, name=value.name)
