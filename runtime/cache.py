"""The key/value buffers of one sequence, allocated once; knows the manifest's cache table and IO bindings.

It also knows what a buffer holds after so many tokens, and so which earlier states are still in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .bundle import READ, Caches
from .errors import BundleError

_PAST, _PRESENT = "past_key_values.", "present."

Rows = dict[str, npt.NDArray[Any]]  # by buffer name: (kv_heads, rows, head_dim), the rows in use


class KvCaches:
    """Two tensors a layer, bound as `past` and as `present` at once: the graph updates them in place.

    They are never cleared: the length in the attention mask says how much of them is valid. On the CPU they
    are zero pages until written, so a short conversation does not touch a long context's memory.
    """

    def __init__(self, caches: Caches, provider: str = "cpu", *, window: int | None = None) -> None:
        """window: of the sliding layers; without it only `bind` works."""
        self.context = caches.context
        self.can_copy = provider == "cpu"
        self.values: dict[str, ort.OrtValue] = {}
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        self._sliding: set[str] = set()
        self._window, self._capacity = window or caches.context, caches.context
        for layer in caches.layers:
            shape = (1, layer.kv_heads, layer.capacity, layer.head_dim)
            for part in ("key", "value"):
                name = f"{layer.index}.{part}"
                zeros = np.zeros(shape, np.dtype(caches.dtype))
                # On the CPU the OrtValue is the array's memory; elsewhere it is copied to the device, once.
                self.values[name] = ort.OrtValue.ortvalue_from_numpy(zeros, provider, 0)
                if self.can_copy:
                    self._arrays[name] = zeros[0]
                if layer.layer_type == "sliding_attention":
                    self._sliding.add(name)
                    self._capacity = layer.capacity

    @property
    def input_names(self) -> set[str]:
        return {f"{_PAST}{name}" for name in self.values}

    @property
    def slack(self) -> int:
        """Tokens that the sliding caches hold above their window; the context if no layer slides."""
        return self._capacity - self._window if self._sliding else self.context

    def bind(self, binding: ort.IOBinding, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Bind the buffers that a graph of these inputs and outputs names, past and present in one place.

        An output `read.…` goes where it was read; unbound, it would be a copy of the whole buffer.
        """
        for name in inputs:
            if name.startswith((_PAST, _PRESENT)):
                buffer = name.removeprefix(_PAST).removeprefix(_PRESENT)
                binding.bind_ortvalue_input(name, self.values[buffer])
        for name in outputs:
            if name.startswith(_PRESENT):
                binding.bind_ortvalue_output(name, self.values[name.removeprefix(_PRESENT)])
            elif name.startswith(READ):
                binding.bind_ortvalue_output(name, self.values[name.removeprefix(READ).rpartition(".")[0]])

    def begin(self, length: int) -> int:
        """The first token that is in the sliding caches when `length` tokens have been run.

        It is in row 0, the others follow; their operator evicts slack + 1 tokens at a time (docs/bundle.md).
        """
        if not self._sliding or length <= self._capacity:
            return 0
        group = self._capacity - self._window + 1
        return group * -((self._capacity - length) // group)

    def back(self, length: int, wanted: int) -> int:
        """The longest state that is still there after `length` tokens, of at most `wanted` tokens; 0: none.

        Exact: every buffer holds, row by row, what it held then.
        """
        if length <= wanted:
            return length
        return wanted if self.begin(wanted) == self.begin(length) else 0

    def ahead(self, length: int) -> int:
        """How many tokens may be run after `length` and be taken back again, all or some."""
        if not self._sliding:
            return self.context - length
        group = self._capacity - self._window + 1
        last = self._capacity + group * -(-max(length - self._capacity, 0) // group)
        return min(last, self.context) - length

    def copy(self, length: int) -> Rows:
        """The state after `length` tokens, which the buffers hold."""
        return {name: array[:, : self._rows(name, length)].copy() for name, array in self._arrays.items()}

    def restore(self, rows: Rows, length: int) -> None:
        """Put back what `copy` gave: all of it, or its first `length` tokens if `back` finds them there."""
        for name, array in self._arrays.items():
            count = self._rows(name, length)
            array[:, :count] = rows[name][:, :count]

    def shapes(self, length: int) -> dict[str, tuple[tuple[int, int, int], str]]:
        """Shape and number type of everything in `copy(length)`."""
        return {
            name: ((array.shape[0], self._rows(name, length), array.shape[2]), str(array.dtype))
            for name, array in self._arrays.items()
        }

    def size_bytes(self, length: int) -> int:
        """Of `copy(length)`."""
        return sum(
            math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.shapes(length).values()
        )

    def _rows(self, name: str, length: int) -> int:
        return length - self.begin(length) if name in self._sliding else length


def check_caches(path: Path, graph: ort.InferenceSession, caches: KvCaches) -> None:
    """The graph that writes them and the manifest must speak of the same caches. Raises BundleError."""
    past = {value.name for value in graph.get_inputs() if value.name.startswith(_PAST)}
    if past != caches.input_names:
        differing = ", ".join(sorted(past ^ caches.input_names)[:4])
        raise BundleError(f"{path}: its caches are not the manifest's ({differing}); export it again")
