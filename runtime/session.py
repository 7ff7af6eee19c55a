"""The two ONNX Runtime sessions and their bindings: ids in, logits out; knows no sampling, stop ids or text.

    ids -> embeddings.onnx -> inputs_embeds, per_layer_inputs -> decoder.onnx (+ caches, in place) -> logits

Every buffer is allocated once. The embeddings session writes where the decoder session reads, and a decode
step rebinds one input only: the attention mask, a longer view of one array of ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from . import huge_pages
from .bundle import Bundle
from .cache import KvCaches
from .denormals import denormals_as_zero
from .errors import BundleError
from .machine import usable_cpus
from .mapped_pages import MappedPages, mapped_meanwhile
from .pieces import pieces
from .prompt import Heard
from .read_ahead import read_ahead
from .sampler import Picks

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_KEEP = "logits_to_keep"
_HIDDEN = "hidden_states"
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
        with mapped_meanwhile(_data(bundle.decoder)) as self._decoder_pages:
            self.decoder, self.prompts, self._prompt_pages = _open_layers(bundle, self.threads)
        # After open_graph, which says what is missing for CUDA.
        self.caches = KvCaches(manifest.caches, provider, window=geometry.sliding_window)
        # A gather of a few rows gains nothing from a second pool of threads.
        with mapped_meanwhile(_data(bundle.embeddings)) as self._tables:
            self.embeddings = open_graph(bundle.embeddings, 1, "cpu", ahead=False)
        check_caches(bundle.decoder, self.decoder, self.caches)
        if self.prompts is not None:
            check_caches(bundle.prefill, self.prompts, self.caches)
        _check_keep(bundle.decoder, self.decoder)

        context, chunk, kept = manifest.caches.context, self.chunk, 1 + longest_draft
        most = max(chunk, kept)  # rows of a run
        self._ids = np.zeros((1, most), np.int64)
        # inputs_embeds (1, most, hidden), per_layer_inputs (1, most, layers * width) if the model has them
        self._embedded = {
            value.name: np.zeros((1, most, value.shape[2]), _TYPES[value.type])
            for value in self.embeddings.get_outputs()
        }
        self._positions = np.zeros((1, most), np.int64)
        self._ones = np.ones((1, context), np.int64)  # the mask: a view of it, as long as the sequence
        self._keep = [np.full((1,), rows, np.int64) for rows in range(kept + 1)]
        self._outputs = [value.name for value in self.decoder.get_outputs()]
        logits = next(value for value in self.decoder.get_outputs() if value.name == "logits")
        self._logits = np.zeros((1, kept, geometry.vocab_size), _TYPES[logits.type])

        # (1, kept, hidden), what the logits are made of; for a drafter, else not there
        drafts = any(value.name == _HIDDEN for value in self.decoder.get_outputs())
        self._hidden = np.zeros((1, kept, geometry.hidden_size), np.float32) if drafts else None

        self._steps: dict[int, tuple[ort.IOBinding, ort.IOBinding]] = {}  # by rows, made when first needed
        self._chunk_rows = chunk
        self._embed_chunk = self._bind_embeddings(chunk)
        self._decode_chunk = {keep: self._bind_decoder(chunk, keep) for keep in (0, 1)}
        self._prompt_chunk = self._bind_prompt(chunk, 0) if self.prompts is not None else None
        self._shrink = ort.RunOptions()
        self._shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        weights_bytes = manifest.memory.weights_bytes if provider == "cpu" else 0
        self.moving = huge_pages.start(weights_bytes)  # a thread that ends by itself

    @property
    def logits(self) -> npt.NDArray[np.floating]:
        """Logits of the last position of a prefill or of a step's token, (vocab,).

        A view that the next run overwrites.
        """
        return self._logits[0, 0]

    def logits_after(self, guesses: int) -> npt.NDArray[np.floating]:
        """Logits after so many guesses of the last step, (vocab,): a view as `logits`."""
        return self._logits[0, guesses]

    def states_after(self, guesses: int) -> npt.NDArray[np.float32]:
        """The hidden states behind `logits_after(guesses)`, (hidden,): a view. For bundles with a drafter."""
        assert self._hidden is not None
        return self._hidden[0, guesses]

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
            self._bind_mask(decode, position + end)
            # The last piece gives the arena's memory for wide activations back: decoding needs little.
            self.decoder.run_with_iobinding(decode, self._shrink if ends and rows > 1 else None)

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
            self._bind_mask(binding, position + first + count)
            ends = first + count == rows < self._chunk_rows
            self.prompts.run_with_iobinding(binding, self._shrink if ends else None)
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
        self._bind_mask(decode, position + rows)
        self.embeddings.run_with_iobinding(embed)
        self._tables.looked_up(rows)
        self.decoder.run_with_iobinding(decode)

    def _pieces(self, rows: int, position: int) -> Iterable[tuple[int, int]]:
        """Rows of a chunk that the decoder takes at a time: (first, count). CUDA holds no scores."""
        if self._provider != "cpu":
            return ((0, rows),)
        return pieces(rows, position, self._heads)

    def _embeddings_for(self, rows: int) -> ort.IOBinding:
        """Only whole chunks come often: the binding of a ragged one is made anew."""
        return self._embed_chunk if rows == self._chunk_rows else self._bind_embeddings(rows)

    def _decoder_for(self, first: int, count: int, *, keep: int) -> ort.IOBinding:
        if count == self._chunk_rows:
            return self._decode_chunk[keep]
        return self._bind_decoder(count, keep, first)

    def _bind_embeddings(self, rows: int) -> ort.IOBinding:
        binding = self.embeddings.io_binding()
        _bind_input(binding, "input_ids", self._ids, (1, rows))
        for name, buffer in self._embedded.items():
            binding.bind_output(name, "cpu", 0, buffer.dtype, (1, rows, buffer.shape[2]), buffer.ctypes.data)
        return binding

    def _bind_decoder(self, rows: int, keep: int, first: int = 0) -> ort.IOBinding:
        """first: row of the buffers to begin with."""
        binding = self.decoder.io_binding()
        self._bind_rows(binding, rows, first)
        _bind_input(binding, _KEEP, self._keep[keep], (1,))
        self.caches.bind(binding, self._outputs)
        if keep:
            shape = (1, keep, self._logits.shape[2])
            binding.bind_output("logits", "cpu", 0, self._logits.dtype, shape, self._logits.ctypes.data)
        else:
            binding.bind_output("logits", "cpu")  # (1, 0, vocab): nothing to keep
        if self._hidden is not None and keep:
            shape = (1, keep, self._hidden.shape[2])
            binding.bind_output(_HIDDEN, "cpu", 0, np.float32, shape, self._hidden.ctypes.data)
        return binding

    def _bind_prompt(self, rows: int, first: int) -> ort.IOBinding:
        """first: row of the buffers to begin with."""
        assert self.prompts is not None
        binding = self.prompts.io_binding()
        self._bind_rows(binding, rows, first)
        self.caches.bind(binding)
        return binding

    def _bind_rows(self, binding: ort.IOBinding, rows: int, first: int) -> None:
        for name, buffer in self._embedded.items():
            _bind_input(binding, name, buffer[:, first:], (1, rows, buffer.shape[2]))
        _bind_input(binding, "position_ids", self._positions[:, first:], (1, rows))

    def _bind_mask(self, binding: ort.IOBinding, length: int) -> None:
        _bind_input(binding, "attention_mask", self._ones, (1, length))


def _bind_input(binding: ort.IOBinding, name: str, buffer: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Bind the first elements of `buffer` as a tensor of `shape`, uncopied: it must outlive the binding."""
    binding.bind_input(name, "cpu", 0, buffer.dtype, shape, buffer.ctypes.data)


def session_options(threads: int) -> ort.SessionOptions:
    """What every session of this project is opened with. All of it is measured: docs/decisions.md."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Patterns are kept per chunk length and only cost memory; threads that spin longer gain nothing on an
    # idle machine and starve each other on a busy one.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    # Its own threads; for the one that calls there is denormals.py.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.log_severity_level = 3
    return options


def open_graph(
    path: Path,
    threads: int,
    provider: str,
    *,
    provider_options: Mapping[str, str] | None = None,
    config: Mapping[str, str] | None = None,
    ahead: bool = True,
    initializers: Mapping[str, ort.OrtValue] | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session with this project's options. Raises BundleError.

    provider_options: of CUDA. config: entries of the session's configuration. ahead: whether its weights are
    read from the disk ahead of loading them; False for tables, of which few rows are ever read. initializers:
    those that are in memory already, where the session would put them; they must outlive it.
    """
    options = session_options(threads)
    for key, shared in (initializers or {}).items():
        options.add_initializer(key, shared)
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    name = _PROVIDERS[provider]
    if name not in ort.get_available_providers():
        raise BundleError(
            f"{path.parent}: made for {name}, this onnxruntime has only {ort.get_available_providers()}; "
            "install its onnxruntime (docs/install.md) or export for another device"
        )
    on_gpu = [(name, dict(provider_options or {})), _PROVIDERS["cpu"]]
    providers = [name] if provider == "cpu" else on_gpu
    try:
        # The first session of a process would leave this thread with denormals as zero.
        with denormals_as_zero(), read_ahead(path) if ahead else nullcontext():
            session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as cause:  # onnxruntime raises many classes, all derived from Exception alone
        raise BundleError(f"{path}: onnxruntime cannot load it ({cause}); export the bundle again") from cause
    if name not in session.get_providers():  # onnxruntime drops one whose libraries are missing
        raise BundleError(
            f"{path.parent}: made for {name}, which onnxruntime could not start (is CUDA installed?); "
            "install what it needs or export for another device"
        )
    return session


def _open_layers(
    bundle: Bundle, threads: int
) -> tuple[ort.InferenceSession, ort.InferenceSession | None, MappedPages]:
    """The decoder; what fills the caches from a prompt, if that is not the decoder, and its pages."""
    provider = bundle.manifest.runtime.execution_provider
    if bundle.manifest.prefill is None:
        return open_graph(bundle.decoder, threads, provider), None, MappedPages()
    with ThreadPoolExecutor(1) as pool:  # ONNX Runtime packs a graph's weights on one CPU
        prompts = pool.submit(_open_prompts, bundle, threads)
        return open_graph(bundle.decoder, threads, provider), *prompts.result()


def _open_prompts(bundle: Bundle, threads: int) -> tuple[ort.InferenceSession, MappedPages]:
    """Its pages are given back until the first prompt, while the decoder is being loaded."""
    with mapped_meanwhile(_data(bundle.prefill)) as pages:
        session = open_graph(bundle.prefill, threads, "cpu")
    pages.give_back()
    return session, pages


def _data(graph: Path) -> Path:
    """Where its weights are."""
    return graph.with_name(f"{graph.name}.data")


def check_caches(path: Path, decoder: ort.InferenceSession, caches: KvCaches) -> None:
    """The graph and the manifest must speak of the same caches."""
    past = {value.name for value in decoder.get_inputs() if value.name.startswith("past_key_values.")}
    if past != caches.input_names:
        differing = ", ".join(sorted(past ^ caches.input_names)[:4])
        raise BundleError(f"{path}: its caches are not the manifest's ({differing}); export it again")


def _check_keep(path: Path, decoder: ort.InferenceSession) -> None:
    names = [value.name for value in (*decoder.get_inputs(), *decoder.get_overridable_initializers())]
    if _KEEP not in names:
        raise BundleError(f"{path}: has no input {_KEEP}; export it again with this version")
