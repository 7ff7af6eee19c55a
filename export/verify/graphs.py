"""Runs a bundle's graphs over a whole text: logits for every token, hidden states after each layer.

The decoder graph gets more outputs in memory; its weights stay in the bundle's files. It always runs on the
CPU, whatever device the bundle is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort

from ...runtime.bundle import Bundle
from ...runtime.cache import KvCaches
from ...runtime.graphs import Graph
from ...runtime.machine import usable_cpus

MAX_ROWS = 64  # whose logits are held at a time
LAYER_SCALAR = ".layer_scalar"


@dataclass(frozen=True)
class Rows:
    """Some consecutive tokens of a text."""

    start: int
    layers: list[np.ndarray]  # after each layer: (R, hidden)
    logits: np.ndarray  # (R, vocab)


class Graphs:
    """The two graphs of a bundle."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        self.manifest = bundle.manifest
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cpus()
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle.path)
        )
        decoder, self._taps = _tapped(onnx.load(bundle.decoder, load_external_data=False))
        self._decoder = ort.InferenceSession(decoder.SerializeToString(), options)
        self._names = Graph.of(self._decoder)
        self._embeddings = ort.InferenceSession(str(bundle.embeddings), options)
        self._caches = KvCaches(bundle.manifest.caches)

    def embed(self, ids: Sequence[int]) -> dict[str, np.ndarray]:
        """`inputs_embeds` (S, hidden) and, if the model has them, `per_layer_inputs` (S, layers * P)."""
        names = [value.name for value in self._embeddings.get_outputs()]
        found = self._embeddings.run(names, {"input_ids": np.array([ids], np.int64)})
        return {name: value[0] for name, value in zip(names, found, strict=True)}

    def run(self, ids: Sequence[int]) -> Iterator[Rows]:
        """The whole text from position 0, in chunks that are exact in every row."""
        start = 0
        for end in exact_ends(len(ids), self._window(), self._sliding_capacity()):
            yield self._chunk(ids[start:end], start)
            start = end

    def _chunk(self, ids: Sequence[int], start: int) -> Rows:
        end = start + len(ids)
        binding = self._decoder.io_binding()
        for name, value in self.embed(ids).items():
            binding.bind_cpu_input(name, value[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(start, end)[None])
        keep = np.array([len(ids)], np.int64)  # bound by address: an input with a default is not in the list
        binding.bind_input("logits_to_keep", "cpu", 0, keep.dtype, keep.shape, keep.ctypes.data)
        self._caches.bind(binding, self._names.inputs, self._names.outputs)
        for name in ("logits", *self._taps):
            binding.bind_output(name, "cpu")
        self._decoder.run_with_iobinding(binding)
        outputs = binding.get_outputs()[-1 - len(self._taps) :]
        logits, *layers = (output.numpy()[0] for output in outputs)
        return Rows(start, layers, logits)

    def _window(self) -> int:
        return self.manifest.geometry.sliding_window

    def _sliding_capacity(self) -> int | None:
        sliding = [c.capacity for c in self.manifest.caches.layers if c.layer_type == "sliding_attention"]
        return min(sliding) if sliding else None


def exact_ends(length: int, window: int, capacity: int | None) -> Iterator[int]:
    """Where to cut a text of `length` tokens so that the logits of every row of each piece are exact.

    After T tokens a sliding cache holds L(T) = T for T <= C, else T - G ceil((T - C) / G), G = C - W + 1. The
    first of k rows needs W - 1 tokens before it: k <= L(T) - W + 1 once tokens are evicted (docs/bundle.md).
    """
    done = 0
    while done < length:
        for rows in range(min(MAX_ROWS, length - done), 0, -1):
            total = done + rows
            if capacity is None or total <= capacity:
                break
            group = capacity - window + 1
            if rows <= total - group * -(-(total - capacity) // group) - window + 1:
                break
        done += rows
        yield done


def _tapped(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """The graph with each layer's result as one more output, and their names in order."""
    taps: dict[int, str] = {}
    for node in model.graph.node:
        for name in node.input:
            if name.endswith(LAYER_SCALAR):
                taps[int(name.split(".")[1])] = node.output[0]
    names = [taps[index] for index in sorted(taps)]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model, names
