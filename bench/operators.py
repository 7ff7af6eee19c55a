"""One decode step by operator: how often it runs, how long, what it reads. Used by bench/decode.py.

Times are ONNX Runtime's own profile, which adds a microsecond or two to every node: for the whole step use
the time of a step without it. Bytes are weights with their scales and, for attention, the caches' rows in
use.
"""

from __future__ import annotations

import bisect
import json
import statistics
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from gemma_edge.runtime import huge_pages
from gemma_edge.runtime.bundle import Bundle, Caches
from gemma_edge.runtime.decoder import Decoder
from gemma_edge.runtime.graphs import session_options
from gemma_edge.runtime.session import Session

KERNEL = "_kernel_time"
ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}
WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    operator: str
    calls: int  # a step
    ms: float  # a step, median
    read_bytes: int

    @property
    def gb_s(self) -> float:
        return self.read_bytes / self.ms / 1e6 if self.ms else 0.0


@dataclass(frozen=True)
class Node:
    """What the graph file says of a node."""

    operator: str
    read_bytes: int


def profiled_decoder(session: Session, bundle: Bundle, folder: str) -> Decoder:
    """The decoder, as the runtime opens it, each part writing a profile into `folder`."""
    opened = []
    for graph in bundle.decoder_graphs:
        options = session_options(session.threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / graph.stem)
        opened.append(ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"]))
    return Decoder(opened, session.caches, kept=1)


def profile_steps(session: Session, bundle: Bundle, depth: int, steps: int) -> list[Row]:
    """Steps from `depth` on, over what the session's caches hold; the slowest operator first."""
    with tempfile.TemporaryDirectory() as folder:
        plain, bindings = session.decoder, session._steps
        session.decoder, session._steps = profiled_decoder(session, bundle, folder), {}
        move(bundle)  # as for the plain session
        try:
            for step in range(WARM_UP + steps):
                session.step(7 + step, depth + step)
            files = [part.session.end_profiling() for part in session.decoder.parts]
            profiles = [json.loads(Path(file).read_text()) for file in files]
        finally:
            session.decoder, session._steps = plain, bindings
    nodes = read_nodes(bundle, depth + WARM_UP + steps // 2)
    return summarize(profiles, nodes)


def move(bundle: Bundle) -> None:
    """Weights onto huge pages, now: the runtime's own thread takes its time."""
    size_bytes = huge_pages.huge_page_bytes()
    if (
        bundle.prepared is None
        and size_bytes
        and bundle.manifest.memory.weights_bytes >= huge_pages.WORTH_BYTES
    ):
        huge_pages.collapse(size_bytes)


def summarize(profiles: list[list[dict[str, Any]]], nodes: dict[str, Node]) -> list[Row]:
    """The events of all parts as rows: the median over runs of each operator's time in a run."""
    spent: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # by run
    calls: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for part, events in enumerate(profiles):
        starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
        for event in events:
            if event["cat"] != "Node" or not event["name"].endswith(KERNEL):
                continue
            name = event["name"].removesuffix(KERNEL)
            node = nodes.get(name)
            operator = event["args"]["op_name"] if node is None else node.operator
            spent[bisect.bisect(starts, event["ts"]) - 1][operator] += event["dur"] / 1e3
            calls[operator].add((part, name))
    rows = [
        Row(
            operator,
            len(names),
            statistics.median(spent[run].get(operator, 0.0) for run in sorted(spent)[WARM_UP:]),
            sum(nodes[name].read_bytes for _, name in names if name in nodes),
        )
        for operator, names in calls.items()
    ]
    return sorted(rows, key=lambda row: -row.ms)


def read_nodes(bundle: Bundle, depth: int) -> dict[str, Node]:
    """By name: products by their weight, attention by its kind of cache, the rest by type."""
    graph = onnx.load(str(bundle.decoder), load_external_data=False).graph
    sizes = {tensor.name: _size_bytes(tensor) for tensor in graph.initializer}
    cache_bytes = rows_in_use(bundle.manifest.caches, depth)
    makers = {output: node for node in graph.node for output in node.output}
    found = {}
    for node in graph.node:
        weights = [name for name in node.input if sizes.get(name, 0) > 1 << 12]
        if node.op_type == "MatMulNBits":
            found[node.name] = Node(_product(weights[0]), sum(sizes[name] for name in weights))
        elif read := _cache_read(node, makers):
            layer, share = read
            where = "windowed" if layer in _sliding(bundle.manifest.caches) else "full"
            found[node.name] = Node(f"attention, {where}: {node.op_type}", int(share * cache_bytes[layer]))
        else:
            found[node.name] = Node(node.op_type, 0)
    return found


def rows_in_use(caches: Caches, depth: int) -> dict[str, int]:
    """Bytes of keys and values that a step at `depth` attends to, by layer."""
    size = ITEM_BYTES[caches.dtype]
    return {
        str(layer.index): 2 * layer.kv_heads * layer.head_dim * size * min(depth + 1, layer.capacity)
        for layer in caches.layers
    }


def _sliding(caches: Caches) -> set[str]:
    return {str(layer.index) for layer in caches.layers if layer.layer_type == "sliding_attention"}


def _cache_read(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> tuple[str, float] | None:
    """The layer whose cache an operator reads, and how much of keys and values; None for other operators."""
    if node.op_type == "GroupQueryAttention":
        return node.input[3].split(".")[1], 1.0  # past_key_values.N.key or present.N.key
    if node.op_type not in ("MatMul", "FusedMatMul"):
        return None
    value = node.input[1]
    while (maker := makers.get(value)) and maker.op_type in ("Unsqueeze", "Slice"):
        value = maker.input[0]
    return (value.split(".")[1], 0.5) if value.startswith("present.") else None


def _product(weight: str) -> str:
    """ "layers.3.mlp.gate_proj.weight.blocks" -> "mlp.gate_proj"."""
    parts = [part for part in weight.split(".") if part not in ("weight", "blocks", "scales", "layers")]
    name = ".".join(part for part in parts if not part.isdigit())
    return "head" if name in ("embed_tokens", "lm_head") else name


def _size_bytes(tensor: onnx.TensorProto) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
