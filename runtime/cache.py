"""The key/value buffers of one sequence, allocated once; knows the manifest's cache table and IO bindings."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from .bundle import Caches


class KvCaches:
    """Two tensors a layer, bound as `past` and as `present` at once: the graph updates them in place.

    They are never cleared: the length in the attention mask says how much of them is valid. On the CPU they
    are zero pages until written, so a short conversation does not touch a long context's memory.
    """

    def __init__(self, caches: Caches, provider: str = "cpu") -> None:
        self.context = caches.context
        self.values: dict[str, ort.OrtValue] = {}
        for layer in caches.layers:
            shape = (1, layer.kv_heads, layer.capacity, layer.head_dim)
            for part in ("key", "value"):
                zeros = np.zeros(shape, np.dtype(caches.dtype))
                # On the CPU the OrtValue is the array's memory; elsewhere it is copied to the device, once.
                self.values[f"{layer.index}.{part}"] = ort.OrtValue.ortvalue_from_numpy(zeros, provider, 0)

    @property
    def input_names(self) -> set[str]:
        return {f"past_key_values.{name}" for name in self.values}

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind every buffer as the graph's past and present."""
        for name, value in self.values.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
