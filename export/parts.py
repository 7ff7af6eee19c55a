"""Cuts the decoder graph at its seams into graphs that load side by side.

ONNX Runtime packs the weights of a graph on one CPU, which is most of what a start waits for. Cut at the two
places where little goes over, the decoder packs on several:

    lower  the layers up to the last that owns a cache
    upper  the KV-shared layers, which read two of its caches, and the last norm
    head   the product with the token table

The parts are graph files of their own over the decoder's weights; run one after the other they do exactly
what the decoder does. Where no layer is shared there are two.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from ..runtime.bundle import HIDDEN, LOWER_HIDDEN, READ, UPPER_INPUTS, Part
from .geometry import TextModel

WORTH_BYTES = 128 << 20  # of weights; fewer are packed in a blink, and parts cost a step some time
CAPTIONS = ("lower", "upper", "head")


def write_parts(folder: Path, model: TextModel, *, worth_bytes: int = WORTH_BYTES) -> tuple[Part, ...]:
    """Write the parts of `folder`'s decoder.onnx beside it, in the order in which they run.

    Nothing is written, and nothing returned, if its weights are fewer than `worth_bytes`.
    """
    decoder = ir.load(folder / "decoder.onnx")
    if _weights_bytes(decoder.graph) < worth_bytes:
        return ()
    graphs = cut(decoder.graph, model)
    names = CAPTIONS if len(graphs) == len(CAPTIONS) else (CAPTIONS[0], CAPTIONS[-1])
    parts = []
    for name, graph in zip(names, graphs, strict=True):
        file = f"decoder_{name}.onnx"
        part = ir.Model(graph, ir_version=decoder.ir_version)
        part.producer_name, part.producer_version = decoder.producer_name, decoder.producer_version
        ir.save(part, folder / file)
        parts.append(Part(file, _weights_bytes(graph)))
    return tuple(parts)


def cut(graph: ir.Graph, model: TextModel) -> list[ir.Graph]:
    """The graphs of the parts; `graph` itself keeps its nodes, some of its values get public names."""
    hidden_size = model.geometry.hidden_size
    presents = [value for value in graph.outputs if value.name and value.name.startswith("present.")]
    reads = [value for value in graph.outputs if value.name and value.name.startswith(READ)]
    logits = graph.outputs[0]
    normed = _named(_uses(graph, "norm.weight").outputs[0], HIDDEN, hidden_size)
    first_upper = model.last_cached + 1
    if first_upper == len(model.layers):
        return [_part(graph, [], [*presents, normed], reads), _part(graph, [normed], [logits], [])]
    entering = _uses(graph, f"layers.{first_upper}.input_layernorm.weight").inputs[0]
    assert entering is not None
    handed = [_named(entering, LOWER_HIDDEN, hidden_size)]
    if width := model.geometry.hidden_size_per_layer_input:
        extras = _uses(graph, "constants.split_above").inputs[0]
        assert extras is not None
        handed.append(_named(extras, UPPER_INPUTS, (len(model.layers) - model.last_cached) * width))
    return [
        _part(graph, [], [*presents, *handed], reads),
        _part(graph, [*handed, *presents], [normed], reads),
        _part(graph, [normed], [logits], []),
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


def _uses(graph: ir.Graph, initializer: str) -> ir.Node:
    """The only operator that takes this initializer."""
    (use,) = graph.initializers[initializer].uses()
    return use.node


def _named(value: ir.Value, name: str, width: int) -> ir.Value:
    """Declared as an output of a part needs it: (1, kept, width)."""
    value.name, value.dtype, value.shape = name, ir.DataType.FLOAT, ir.Shape([1, "kept", width])
    return value


def _weights_bytes(graph: ir.Graph) -> int:
    """Of what lies in data files, rotary tables aside."""
    return sum(
        value.const_value.nbytes
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and not name.startswith("constants.")
    )
