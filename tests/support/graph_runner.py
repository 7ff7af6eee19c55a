"""Runs a bundle's graphs with plain onnxruntime calls: token ids in, logits out; without the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from gemma_edge.runtime.bundle import open_bundle

KV_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


class GraphRunner:
    """One sequence over a bundle's embeddings.onnx and decoder.onnx."""

    def __init__(self, folder: Path) -> None:
        self.bundle = open_bundle(folder)
        self.embeddings = self.open("embeddings.onnx")
        self.decoder = self.open("decoder.onnx")
        self.reset()

    def open(self, graph: str) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        return ort.InferenceSession(str(self.bundle.path / graph), options)

    def reset(self) -> None:
        caches = self.bundle.manifest.caches
        self.tokens = 0
        self.caches = {
            f"past_key_values.{layer.index}.{part}": np.zeros(
                (1, layer.kv_heads, layer.capacity, layer.head_dim), KV_DTYPES[caches.dtype]
            )
            for layer in caches.layers
            for part in ("key", "value")
        }

    def run(self, ids: Sequence[int], *, keep: int | None = None) -> np.ndarray:
        """Feed `ids`; logits (kept rows, vocab). keep: None leaves the graph's default."""
        count = len(ids)
        names = [value.name for value in self.embeddings.get_outputs()]
        embedded = self.embeddings.run(names, {"input_ids": np.array([ids], np.int64)})
        feeds = dict(zip(names, embedded, strict=True)) | self.caches
        feeds["attention_mask"] = np.ones((1, self.tokens + count), np.int64)
        feeds["position_ids"] = np.arange(self.tokens, self.tokens + count)[None]
        if keep is not None:
            feeds["logits_to_keep"] = np.array([keep], np.int64)
        outputs = [value.name for value in self.decoder.get_outputs()]
        results = dict(zip(outputs, self.decoder.run(outputs, feeds), strict=True))
        self.tokens += count
        self.caches = {name: results[name.replace("past_key_values", "present")] for name in self.caches}
        return results["logits"][0]
