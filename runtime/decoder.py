"""The decoder, whole or in parts that load side by side: its sessions and what one run of them is bound to.

    inputs_embeds, per_layer_inputs -> lower -> upper -> head -> logits      (+ caches, in place)

Without parts one graph does it all. Knows buffers and names; which rows are run is the session's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .bundle import HIDDEN, READ, Bundle
from .cache import KvCaches, check_caches
from .errors import BundleError
from .graphs import NUMPY_TYPES, Graph, bind_input, data_of, give_back_freed, open_graph
from .machine import usable_cpus
from .mapped_pages import MappedPages, mapped_meanwhile
from .read_ahead import read_ahead

KEEP = "logits_to_keep"
_MASK = "attention_mask"
_STATE = ("past_key_values.", "present.", READ)  # of caches

Shaped = tuple[npt.NDArray[Any], tuple[int, ...]]  # a buffer, and the shape of the tensor that it begins with
Run = list[tuple[Graph, ort.IOBinding]]  # the parts that have something to do, in order


class Decoder:
    """Rows in, caches and the kept rows' logits out."""

    def __init__(self, sessions: Sequence[ort.InferenceSession], caches: KvCaches, kept: int) -> None:
        """kept: rows whose logits are wanted of one run, at most."""
        self.parts = [Graph.of(session) for session in sessions]
        self._caches = caches
        self._keep = [np.full((1,), rows, np.int64) for rows in range(kept + 1)]
        # What a part hands on, and logits: (1, kept, width) each.
        self.rows = {
            value.name: np.zeros((1, kept, value.shape[2]), NUMPY_TYPES[value.type])
            for session in sessions
            for value in session.get_outputs()
            if not value.name.startswith(_STATE)
        }

    @property
    def logits(self) -> npt.NDArray[np.floating]:
        """(1, kept, vocab), of the last run that kept rows."""
        return self.rows["logits"]

    @property
    def hidden(self) -> npt.NDArray[np.float32] | None:
        """(1, kept, hidden), what the logits are made of; a whole decoder shows it for a drafter only."""
        return self.rows.get(HIDDEN)

    def bind(self, entering: Mapping[str, Shaped], keep: int) -> Run:
        """One run of the rows in `entering`; the mask is bound for each run anew.

        keep: rows, the last ones, whose logits are wanted. Without any, parts above the caches do nothing.
        """
        return [(part, self._bind(part, entering, keep)) for part in self.parts[: None if keep else 1]]

    def run(self, bound: Run, options: ort.RunOptions | None = None) -> None:
        for part, binding in bound:
            part.session.run_with_iobinding(binding, options)

    def _bind(self, part: Graph, entering: Mapping[str, Shaped], keep: int) -> ort.IOBinding:
        binding = part.session.io_binding()
        for name in part.inputs:
            if name in entering:
                bind_input(binding, name, *entering[name])
            elif name in self.rows:
                bind_input(binding, name, self.rows[name], (1, keep, self.rows[name].shape[2]))
            elif name == KEEP:
                bind_input(binding, name, self._keep[keep], (1,))
        self._caches.bind(binding, part.inputs, part.outputs)
        for name in part.outputs:
            if name not in self.rows:
                continue
            if keep:
                buffer = self.rows[name]
                shape = (1, keep, buffer.shape[2])
                binding.bind_output(name, "cpu", 0, buffer.dtype, shape, buffer.ctypes.data)
            else:
                binding.bind_output(name, "cpu")  # (1, 0, width): nothing to keep
        return binding


def bind_mask(bound: Run, ones: npt.NDArray[np.int64], length: int) -> None:
    """ones: (1, context), of which the mask of `length` tokens is a view."""
    for part, binding in bound:
        if _MASK in part.inputs:
            bind_input(binding, _MASK, ones, (1, length))


@dataclass(frozen=True)
class Layers:
    """The sessions above the embedding tables, and the pages that are mapped of their weights."""

    decoder: tuple[ort.InferenceSession, ...]
    decoder_pages: MappedPages
    prompts: ort.InferenceSession | None  # fills the caches from a prompt; None: the decoder does
    prompt_pages: MappedPages


def open_layers(bundle: Bundle, threads: int) -> Layers:
    """All of them at once, each on a CPU: packing a graph's weights takes one. Raises BundleError."""
    manifest, graphs = bundle.manifest, bundle.decoder_graphs
    provider, parts = manifest.runtime.execution_provider, manifest.decoder_parts
    sizes = [part.weights_bytes for part in parts] or [manifest.memory.weights_bytes]
    jobs: list[Callable[[], Any]] = [partial(open_graph, path, threads, provider) for path in graphs]
    if manifest.prefill is not None:
        sizes.append(manifest.prefill.weights_bytes)
        jobs.append(partial(_open_prompts, bundle, threads))
    with ExitStack() as stack:
        pages = stack.enter_context(mapped_meanwhile(*_data_files(bundle)))
        if parts and bundle.prepared is None:  # one file, that no part is named after
            stack.enter_context(read_ahead(bundle.decoder))
        pool = stack.enter_context(ThreadPoolExecutor(min(len(jobs), usable_cpus())))
        # The largest first: what begins last should be short.
        order = sorted(range(len(jobs)), key=lambda number: -sizes[number])
        started = {number: pool.submit(jobs[number]) for number in order}
        opened = [started[number].result() for number in range(len(jobs))]
    give_back_freed()
    prompts, prompt_pages = opened.pop() if manifest.prefill is not None else (None, MappedPages())
    return Layers(tuple(opened), pages, prompts, prompt_pages)


def _data_files(bundle: Bundle) -> list[Path]:
    """Of the decoder: packed parts have one each, a bundle's own share the whole decoder's."""
    own = data_of(bundle.path / "decoder.onnx")
    return [data if (data := data_of(graph)).exists() else own for graph in bundle.decoder_graphs]


def _open_prompts(bundle: Bundle, threads: int) -> tuple[ort.InferenceSession, MappedPages]:
    """Its pages are given back until the first prompt, while the decoder is being loaded."""
    with mapped_meanwhile(data_of(bundle.prefill)) as pages:
        session = open_graph(bundle.prefill, threads, "cpu")
    pages.give_back()
    return session, pages


def open_decoder(bundle: Bundle, layers: Layers, caches: KvCaches, kept: int) -> Decoder:
    """Raises BundleError if the graphs are not what the manifest says."""
    decoder = Decoder(layers.decoder, caches, kept)
    first = bundle.decoder_graphs[0]
    check_caches(first, layers.decoder[0], caches)
    if KEEP not in decoder.parts[0].inputs:
        raise BundleError(f"{first}: has no input {KEEP}; export it again with this version")
    return decoder
