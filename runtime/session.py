"""The model's sessions and their bindings: ids in, logits out; knows no sampling, stop ids or text.

    ids -> embeddings.onnx -> inputs_embeds, per_layer_inputs -> decoder (+ caches, in place) -> logits

Every buffer is allocated once. The embeddings session writes where the decoder reads, and a decode step
rebinds one input only: the attention mask, a longer view of one array of ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from . import huge_pages
from .bundle import Bundle
from .cache import KvCaches, check_caches
from .decoder import Run, Shaped, bind_mask, open_decoder, open_layers
from .denormals import denormals_as_zero
from .graphs import NUMPY_TYPES, Graph, bind_input, data_of, open_graph
from .machine import usable_cpus
from .mapped_pages import mapped_meanwhile
from .pieces import pieces
from .prompt import Heard
from .sampler import Picks

# Fewer rows of a prompt are run on the decoder graph, whose weights have fewer bytes.
LEAST_PROMPT_ROWS = 8


class Session:
    """One sequence's model state: positions are the caller's, caches and buffers are here."""

    picks: Picks | None = None  # the logits are at hand: the sampler looks for itself

    def __init__(self, bundle: Bundle, *, threads: int | None = None, longest_draft: int = 0) -> None:
        """longest_draft: guesses that one `step` may run after its token."""
        manifest = bundle.manifest
        geometry = manifest.geometry
        provider = manifest.runtime.execution_provider
        self.chunk = min(manifest.runtime.prefill_chunk, manifest.caches.context)
        self._provider, self._heads = provider, geometry.num_attention_heads
        # More threads than CPUs wait for each other in turns: a decode step takes ten times as long.
        self.threads = threads or min(manifest.runtime.threads, usable_cpus())
        layers = open_layers(bundle, self.threads)
        self._decoder_pages, self._prompt_pages = layers.decoder_pages, layers.prompt_pages
        # After open_layers, which says what is missing for CUDA.
        self.caches = KvCaches(manifest.caches, provider, window=geometry.sliding_window)
        # A gather of a few rows gains nothing from a second pool of threads.
        with mapped_meanwhile(data_of(bundle.embeddings)) as self._tables:
            self.embeddings = open_graph(bundle.embeddings, 1, "cpu", ahead=False)
        self.decoder = open_decoder(bundle, layers, self.caches, 1 + longest_draft)
        self.prompts = None if layers.prompts is None else Graph.of(layers.prompts)
        if layers.prompts is not None:
            check_caches(bundle.prefill, layers.prompts, self.caches)

        context, chunk = manifest.caches.context, self.chunk
        most = max(chunk, 1 + longest_draft)  # rows of a run
        self._ids = np.zeros((1, most), np.int64)
        # inputs_embeds (1, most, hidden), per_layer_inputs (1, most, layers * width) if the model has them
        self._embedded = {
            value.name: np.zeros((1, most, value.shape[2]), NUMPY_TYPES[value.type])
            for value in self.embeddings.get_outputs()
        }
        self._positions = np.zeros((1, most), np.int64)
        self._ones = np.ones((1, context), np.int64)  # the mask: a view of it, as long as the sequence

        self._steps: dict[int, tuple[ort.IOBinding, Run]] = {}  # by rows, made when first needed
        self._chunk_rows = chunk
        self._embed_chunk = self._bind_embeddings(chunk)
        self._decode_chunk = {keep: self._bind_decoder(chunk, keep) for keep in (0, 1)}
        self._prompt_chunk = self._bind_prompt(chunk, 0) if self.prompts is not None else None
        self._shrink = ort.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        # What is packed into memory is moved; of packed weights that are mapped there is nothing to move.
        in_memory = provider == "cpu" and bundle.prepared is None
        self.moving = huge_pages.start(manifest.memory.weights_bytes if in_memory else 0)  # ends by itself

    @property
    def logits(self) -> npt.NDArray[np.floating]:
        """Logits of the last position of a prefill or of a step's token, (vocab,).

        A view that the next run overwrites.
        """
        return self.decoder.logits[0, 0]

    def logits_after(self, guesses: int) -> npt.NDArray[np.floating]:
        """Logits after so many guesses of the last step, (vocab,): a view as `logits`."""
        return self.decoder.logits[0, guesses]

    def states_after(self, guesses: int) -> npt.NDArray[np.float32]:
        """The hidden states behind `logits_after(guesses)`, (hidden,): a view. For bundles with a drafter."""
        assert self.decoder.hidden is not None
        return self.decoder.hidden[0, guesses]

    @denormals_as_zero()
    def prefill(
        self, ids: npt.NDArray[np.int64], position: int, *, last: bool, heard: Heard | None = None
    ) -> None:
        """Run up to `chunk` ids at `position`, `position + 1`, …; `logits` is set only if `last`.

        heard: the rows that go in place of some ids' embeddings; those ids are the pad token.
        """
        rows = len(ids)
        self._ids[0, :rows] = ids
        self._positions[0, :rows] = np.arange(position, position + rows)
        self.embeddings.run_with_iobinding(self._embeddings_for(rows))
        self._tables.looked_up(rows)
        if heard is not None:
            self._embedded["inputs_embeds"][0, heard.at] = heard.rows
        done = self._fill_caches(rows - 1 if last else rows, position, last=last)
        for start, count in self._pieces(rows - done, position + done):
            first, end = done + start, done + start + count
            ends = last and end == rows
            decode = self._decoder_for(first, count, keep=1 if ends else 0)
            bind_mask(decode, self._ones, position + end)
            # The last piece gives the arena's memory for wide activations back: decoding needs little.
            self.decoder.run(decode, self._shrink if ends and rows > 1 else None)

    def _fill_caches(self, rows: int, position: int, *, last: bool) -> int:
        """Run `rows` rows on the prefill graph, if there is one and it is worth it; how many were run."""
        if self.prompts is None or rows < LEAST_PROMPT_ROWS:
            return 0
        # Its weights take the place of the decoder's. Mapping those again takes 50 ms, so a short prompt
        # gives back as large a share as it is of a chunk.
        self._decoder_pages.give_back(self._prompt_pages.size_bytes * rows // self._chunk_rows)
        for first, count in pieces(rows, position, self._heads):
            whole = first == 0 and count == self._chunk_rows
            binding = self._prompt_chunk if whole else self._bind_prompt(count, first)
            bind_input(binding, "attention_mask", self._ones, (1, position + first + count))
            ends = first + count == rows < self._chunk_rows
            self.prompts.session.run_with_iobinding(binding, self._shrink if ends else None)
        if last:
            self._prompt_pages.give_back()
        return rows

    @denormals_as_zero()
    def step(self, token: int, position: int, draft: Sequence[int] = ()) -> None:
        """Run one id at `position`, and guesses at the ids after it; sets the logits after each.

        Guesses are taken back by going on at an earlier position: `caches.ahead` says how many may be.
        """
        rows = 1 + len(draft)
        self._ids[0, 0] = token
        self._positions[0, 0] = position
        if draft:
            self._ids[0, 1:rows] = draft
            self._positions[0, 1:rows] = np.arange(position + 1, position + rows)
        if rows not in self._steps:
            self._steps[rows] = self._bind_embeddings(rows), self._bind_decoder(rows, keep=rows)
        embed, decode = self._steps[rows]
        bind_mask(decode, self._ones, position + rows)
        self.embeddings.run_with_iobinding(embed)
        self._tables.looked_up(rows)
        self.decoder.run(decode)

    def _pieces(self, rows: int, position: int) -> Iterable[tuple[int, int]]:
        """Rows of a chunk that the decoder takes at a time: (first, count). CUDA holds no scores."""
        if self._provider != "cpu":
            return ((0, rows),)
        return pieces(rows, position, self._heads)

    def _embeddings_for(self, rows: int) -> ort.IOBinding:
        """Only whole chunks come often: the binding of a ragged one is made anew."""
        return self._embed_chunk if rows == self._chunk_rows else self._bind_embeddings(rows)

    def _decoder_for(self, first: int, count: int, *, keep: int) -> Run:
        if count == self._chunk_rows:
            return self._decode_chunk[keep]
        return self._bind_decoder(count, keep, first)

    def _bind_embeddings(self, rows: int) -> ort.IOBinding:
        binding = self.embeddings.io_binding()
        bind_input(binding, "input_ids", self._ids, (1, rows))
        for name, buffer in self._embedded.items():
            binding.bind_output(name, "cpu", 0, buffer.dtype, (1, rows, buffer.shape[2]), buffer.ctypes.data)
        return binding

    def _bind_decoder(self, rows: int, keep: int, first: int = 0) -> Run:
        return self.decoder.bind(self._entering(rows, first), keep)

    def _bind_prompt(self, rows: int, first: int) -> ort.IOBinding:
        assert self.prompts is not None
        binding = self.prompts.session.io_binding()
        for name, (buffer, shape) in self._entering(rows, first).items():
            bind_input(binding, name, buffer, shape)
        self.caches.bind(binding, self.prompts.inputs, self.prompts.outputs)
        return binding

    def _entering(self, rows: int, first: int) -> dict[str, Shaped]:
        """What enters the first layer. first: row of the buffers to begin with."""
        entering: dict[str, Shaped] = {
            name: (buffer[:, first:], (1, rows, buffer.shape[2])) for name, buffer in self._embedded.items()
        }
        return entering | {"position_ids": (self._positions[:, first:], (1, rows))}
