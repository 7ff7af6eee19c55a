"""A drafter over its model's caches: guesses one token after another; knows no times and no sampling.

    token -> embeddings.onnx -> its row, the model's hidden state -> drafter.onnx (+ caches) -> token, state

All guesses of a chain are made at the place of the first token, which the model has not run: the caches end
before it. The next token and the state that the drafter gives back are what the next link begins with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .bundle import Bundle
from .denormals import denormals_as_zero
from .errors import BundleError
from .graphs import Graph, open_graph
from .session import Session
from .sessions import AnySession


@dataclass(frozen=True)
class Guess:
    token: int
    probability: float  # among the tokens that the drafter's head scored


def open_drafter(bundle: Bundle, session: AnySession) -> Drafter | None:
    """The bundle's drafter; None if it has none. Only bundles for the CPU have one."""
    if bundle.manifest.drafter is None or not isinstance(session, Session):
        return None
    return Drafter(bundle, session)


class Drafter:
    """The drafter's session, with buffers of its own beside those of the model's session."""

    def __init__(self, bundle: Bundle, session: Session) -> None:
        self._graph = open_graph(bundle.drafter, session.threads, "cpu")
        self.session = session  # of the model
        hidden = bundle.manifest.geometry.hidden_size
        context = bundle.manifest.caches.context
        self._ids = np.zeros((1, 1), np.int64)
        self._mask = np.ones((1, context), np.int64)
        self._positions = np.zeros((1, 1), np.int64)
        self._states = np.zeros((1, 1, hidden), np.float32)
        self._drafted = np.zeros((1, 1, hidden), np.float32)
        self._token = np.zeros((1, 1), np.int64)
        self._probability = np.zeros((1, 1), np.float32)
        self._rows = {
            value.name: np.zeros((1, 1, value.shape[2]), np.float32)
            for value in session.embeddings.get_outputs()
        }
        self._embed = self._bind_embeddings()
        self._binding = self._bind_graph(bundle)

    def guesses(self, token: int, length: int, states: npt.NDArray[np.float32]) -> Iterator[Guess]:
        """The tokens that may follow `token`, as long as they are asked for.

        length: tokens in the caches, which `token` comes after. states: (hidden,) the model's after them.
        """
        self._states[0, 0] = states
        self._positions[0, 0] = length
        self._binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, length), self._mask.ctypes.data)
        self._ids[0, 0] = token
        while True:
            with denormals_as_zero():
                self.session.embeddings.run_with_iobinding(self._embed)
                self._graph.run_with_iobinding(self._binding)
            guess = Guess(int(self._token[0, 0]), float(self._probability[0, 0]))
            yield guess
            self._ids[0, 0] = guess.token
            self._states[...] = self._drafted

    def _bind_embeddings(self) -> ort.IOBinding:
        binding = self.session.embeddings.io_binding()
        binding.bind_input("input_ids", "cpu", 0, np.int64, (1, 1), self._ids.ctypes.data)
        for name, row in self._rows.items():
            binding.bind_output(name, "cpu", 0, np.float32, row.shape, row.ctypes.data)
        return binding

    def _bind_graph(self, bundle: Bundle) -> ort.IOBinding:
        binding = self._graph.io_binding()
        inputs: dict[str, npt.NDArray[Any]] = {
            "inputs_embeds": self._rows["inputs_embeds"],
            "hidden_states": self._states,
            "position_ids": self._positions,
        }
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for value in self._graph.get_inputs():
            if value.name.startswith("past_key_values."):
                cache = self.session.caches.values.get(value.name.removeprefix("past_key_values."))
                if cache is None or cache.shape() != value.shape:
                    raise BundleError(
                        f"{bundle.drafter}: reads {value.name}, which the model's caches have not in shape "
                        f"{value.shape}; export the bundle again"
                    )
        outputs: dict[str, npt.NDArray[Any]] = {
            "token": self._token,
            "probability": self._probability,
            "drafted_states": self._drafted,
        }
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        graph = Graph.of(self._graph)
        self.session.caches.bind(binding, graph.inputs, graph.outputs)
        return binding
