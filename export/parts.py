"""Cuts the decoder graph at its seams into graphs that load side by side.

ONNX Runtime packs the weights of a graph on one CPU, which is most of what a start waits for. Cut at the two
places where little goes over, the decoder packs on several:

    lower  fills the caches: the layers below the last that owns one, and that layer's keys and values
    upper  the rest of that layer, the KV-shared ones, which read two of the caches, and the last norm
    head   the product with the token table

The parts are graph files of their own over the decoder's weights; run one after the other they do exactly
what the decoder does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from ..runtime.bundle import HIDDEN, LOWER_HIDDEN, LOWER_NORMED, READ, UPPER_INPUTS, Part
from .geometry import TextModel

WORTH_BYTES = 128 << 20  # of weights; fewer are packed in a blink, and parts cost a step some time
NAMES = ("decoder_lower.onnx", "decoder_upper.onnx", "decoder_head.onnx")


def write_parts(folder: Path, model: TextModel, *, worth_bytes: int = WORTH_BYTES) -> tuple[Part, ...]:
    """Write the parts of `folder`'s decoder.onnx beside it, in the order in which they run.

    Nothing is written, and nothing returned, if its weights are fewer than `worth_bytes`.
    """
    decoder = ir.load(folder / "decoder.onnx")
    if _weights_bytes(decoder.graph) < worth_bytes:
        return ()
    parts = []
    for file, graph in zip(NAMES, cut(decoder.graph, model), strict=True):
        part = ir.Model(graph, ir_version=decoder.ir_version)
        part.producer_name, part.producer_version = decoder.producer_name, decoder.producer_version
        ir.save(part, folder / file)
        parts.append(Part(file, _weights_bytes(graph)))
    return tuple(parts)


def cut(graph: ir.Graph, model: TextModel) -> list[ir.Graph]:
    """The graphs of the parts; `graph` itself keeps its nodes, some of its values get public names."""
    shape, last = model.geometry, f"layers.{model.last_cached}"
    presents = [value for value in graph.outputs if value.name and value.name.startswith("present.")]
    reads = [value for value in graph.outputs if value.name and value.name.startswith(READ)]
    # Where the last layer that owns a cache goes on with its kept rows: the stream, and it normed.
    attention = _use(graph, f"{last}.post_attention_layernorm.weight").outputs[0]
    residual = _consumer(attention)
    hidden = next(value for value in residual.inputs if value is not attention)
    queries = _use(graph, f"{last}.self_attn.q_proj.weight").inputs[0]
    handed = [
        _named(hidden, LOWER_HIDDEN, shape.hidden_size),
        _named(queries, LOWER_NORMED, shape.hidden_size),
    ]
    if width := shape.hidden_size_per_layer_input:
        flat = _use(graph, "constants.above_flat").outputs[0]
        extras = _consumer(_consumer(flat).outputs[0]).outputs[0]  # the sum with the table's rows, scaled
        handed.append(_named(extras, UPPER_INPUTS, (len(model.layers) - model.last_cached) * width))
    normed = _named(_use(graph, "norm.weight").outputs[0], HIDDEN, shape.hidden_size)
    return [
        _part(graph, [], [*presents, *handed], reads),
        _part(graph, [*handed, *presents], [normed], reads),
        _part(graph, [normed], [graph.outputs[0]], []),
    ]


def _part(
    graph: ir.Graph, entering: Sequence[ir.Value], outputs: Sequence[ir.Value], reads: Sequence[ir.Value]
) -> ir.Graph:
    """What computes `outputs` from `entering` and the graph's inputs; of those only what it needs.

    reads: outputs that some of its nodes must have as well, whichever these are.
    """
    available = [*entering, *graph.inputs]
    own = {node.name for node in ir.convenience.extract(graph, available, outputs)}
    extra = [value for value in reads if (maker := value.producer()) is not None and maker.name in own]
    part = ir.convenience.extract(graph, available, [*outputs, *extra])
    for value in [value for value in part.inputs if not value.uses()]:
        part.inputs.remove(value)
        part.initializers.pop(value.name or "", None)
    for name in graph.initializers:  # in its order: `extract` has them in any
        if name in part.initializers:
            part.initializers[name] = part.initializers.pop(name)
    return part


def _use(graph: ir.Graph, initializer: str) -> ir.Node:
    """The only operator that takes this initializer, or the packed form of this weight."""
    value = graph.initializers.get(initializer) or graph.initializers[f"{initializer}.blocks"]
    (use,) = value.uses()
    return use.node


def _consumer(value: ir.Value) -> ir.Node:
    """The only one."""
    (use,) = value.uses()
    return use.node


def _named(value: ir.Value | None, name: str, width: int) -> ir.Value:
    """Declared as an output of a part needs it: (1, kept, width)."""
    assert value is not None
    value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([1, "kept", width])
    return value


def _weights_bytes(graph: ir.Graph) -> int:
    """Of what lies in data files, rotary tables aside."""
    return sum(
        value.const_value.nbytes
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and not name.startswith("constants.")
    )
