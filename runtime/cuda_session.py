"""A session on the GPU: caches, activations and logits stay there; ids go in, the picked id comes out.

    ids -> embeddings.onnx (CPU, mapped) -> rows -> decoder_cuda.onnx -> logits -> greedy.onnx -> id

A decode step always uses the same buffers, so that CUDA can capture it once and replay it: hundreds of
kernels start without the host's doing. The operators read their true lengths from the GPU's memory; what they
read on the host, when a step is captured, is a bound. Attention's work grows with it, so there are several
captures, each bound twice the one before.

Captures are made when the session is opened: the run that is captured is computed twice, which would shift
sliding caches twice if they held anything.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .bundle import CUDA_DECODER, GREEDY, TOP, Bundle
from .cache import KvCaches, check_caches
from .errors import BundleError
from .gpu.device import Gpu, Unavailable
from .gpu.plan import StepFiles, read_step
from .gpu.step import DecodeStep, Device, Memory
from .graphs import Graph, open_graph
from .machine import usable_cpus
from .pieces import pieces
from .prompt import Heard
from .sampler import Picks

log = logging.getLogger(__name__)

FIRST_BOUND, BOUND_STEP = 1024, 2  # tokens; each bound is so many times the one before
INPUT_ALIGNMENT_BYTES = 256
NOT_CAPTURED = "-1"  # gpu_graph_id of a run that is neither captured nor replayed

DEVICE = "cuda"
PROVIDER_OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",  # on a Jetson what the arena keeps is everybody's memory
    # Flash, cuDNN and the plain kernel. Not the memory-efficient one, which copies keys for each query head
    # of a group: heads of 512, which flash does not take, take a tenth of the time on the plain one,
    # which holds all scores of a layer at once: prompts are run in pieces.
    "sdpa_kernel": "25",
}


@dataclass(frozen=True)
class CudaSettings:
    """How to run; benchmarks and tests try others than the defaults."""

    own_kernels: bool = True  # a decode step by `gpu`, if the bundle describes it; else by ONNX Runtime
    capture: bool = True
    capture_pick: bool = True  # the search for the best id is captured too
    provider_options: Mapping[str, str] = field(default_factory=dict)  # of the decoder's CUDA provider
    config: Mapping[str, str] = field(default_factory=dict)  # of the decoder's session
    device: str = DEVICE  # "cpu": the same graph and bindings without a GPU, for tests
    kernels_on: Device | None = None  # where our own kernels run; None: on the GPU, if `device` is one


class CudaSession:
    """One sequence's model state: positions are the caller's, caches and buffers are here."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        longest_draft: int = 0,
        settings: CudaSettings | None = None,
    ) -> None:
        """longest_draft: must be 0; sliding caches on CUDA have no slack to take guesses back from."""
        if longest_draft:
            raise ValueError(f"longest_draft: expected 0 on CUDA, got {longest_draft}")
        manifest, settings = bundle.manifest, settings or CudaSettings()
        self.threads = threads or min(manifest.runtime.threads, usable_cpus())
        self.chunk = min(manifest.runtime.prefill_chunk, manifest.caches.context)
        self._device, self._window = settings.device, manifest.geometry.sliding_window
        if settings.device == DEVICE:
            load_libraries()
        kernels = _kernels(bundle, settings)
        self._captures = settings.capture and settings.device == DEVICE
        # Weights that both kinds of kernels read are in the GPU's memory once.
        self._held = {} if kernels is None else _load_weights(*kernels)
        self._weights = {name: view for name, (_, view) in self._held.items()}
        steps_captured = self._captures and kernels is None
        self.decoder = self._open(bundle.cuda_decoder, settings, captures=steps_captured)
        self._state = Graph.of(self.decoder)
        self.caches = KvCaches(manifest.caches, settings.device, window=self._window)
        check_caches(bundle.cuda_decoder, self.decoder, self.caches)
        self.embeddings = open_graph(bundle.embeddings, 1, "cpu", ahead=False)
        picks = self._captures and settings.capture_pick
        self._pickers = {
            name: self._open(bundle.path / name, settings, captures=picks and name == GREEDY)
            for name in (GREEDY, TOP)
        }
        self._heads = manifest.geometry.num_attention_heads
        self._vocab_size = manifest.geometry.vocab_size

        # Of the embeddings graph: inputs_embeds (1, S, hidden), per_layer_inputs (1, S, layers * width).
        self._names = [value.name for value in self.embeddings.get_outputs()]
        self._inputs = _StepInputs(self.embeddings, self._device)
        self._last_position = self._zeros((1, 1), np.int64)
        self._logits = self._zeros((1, 1, self._vocab_size), np.float32)
        self._fetched: npt.NDArray[np.floating] | None = None  # logits on the host, once asked for
        self._bounds = bounds_up_to(manifest.caches.context) if steps_captured else ()
        self._steps = {bound: _Step(self, bound, number) for number, bound in enumerate(self._bounds, 1)}
        self._exact = _Step(self, 1, None)
        self._best, self._top = self._bind_pickers()
        self._own = None if kernels is None else self._own_step(*kernels)
        self._own_token: int | None = None  # what our own kernels picked in the last run
        for step in self._steps.values():
            step.run()
        if picks:
            self.best()

    @property
    def own_kernels(self) -> bool:
        """Whether a decode step is run by our own kernels."""
        return self._own is not None

    @property
    def picks(self) -> Picks:
        """The largest logits are found here."""
        return self

    @property
    def logits(self) -> npt.NDArray[np.floating]:
        """Logits of the last position of a prefill or of a step's token, (vocab,): copied from the GPU.

        Good until the next run.
        """
        if self._fetched is None:
            self._fetched = self._logits.numpy()[0, 0]
        return self._fetched

    def logits_after(self, guesses: int) -> npt.NDArray[np.floating]:
        raise ValueError(f"guesses: expected none on CUDA, got {guesses}")

    def best(self) -> int:
        """The id with the largest of the last logits, found on the GPU."""
        if self._own_token is not None:
            return self._own_token
        self._pickers[GREEDY].run_with_iobinding(self._best)
        return int(self._best.get_outputs()[0].numpy()[0])

    def top(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The ids of the largest logits, in ascending order, and their logits; found on the GPU."""
        self._pickers[TOP].run_with_iobinding(self._top)
        ids, scores = (value.numpy() for value in self._top.get_outputs())
        order = np.argsort(ids)
        return ids[order], scores[order]

    def prefill(
        self, ids: npt.NDArray[np.int64], position: int, *, last: bool, heard: Heard | None = None
    ) -> None:
        """Run up to `chunk` ids at `position`, `position + 1`, …; `logits` is set whether `last` or not.

        heard: the rows that go in place of some ids' embeddings; those ids are the pad token.
        """
        rows = dict(zip(self._names, self.embeddings.run(self._names, {"input_ids": ids[None]}), strict=True))
        if heard is not None:
            rows["inputs_embeds"][0, heard.at] = heard.rows
        for first, count in pieces(len(ids), position, self._heads):
            part = {name: array[:, first : first + count] for name, array in rows.items()}
            self._fill(part, position + first + count)
        if last and np.isnan(self.logits[0]):
            raise FloatingPointError("the logits are not numbers; the bundle or its precision is broken")

    def _fill(self, rows: Mapping[str, npt.NDArray[np.floating]], total: int) -> None:
        """Run embedded rows, the last of which is token `total - 1`."""
        binding = self.decoder.io_binding()
        held = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
            for name, array in rows.items()
        }
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        self._last_position.update_inplace(np.full((1, 1), total - 1, np.int64))
        lengths = self._lengths(total)
        binding.bind_ortvalue_input("last_position", self._last_position)
        self._bind_state(binding, lengths)
        self._run(binding, None)

    def step(self, token: int, position: int, draft: Sequence[int] = ()) -> None:
        """Run one id at `position`; sets the logits after it."""
        if draft:
            raise ValueError(f"draft: expected no guesses on CUDA, got {len(draft)}")
        if self._own is not None:
            self._run_own(self._own, token, position)
            return
        self._inputs.set(token, position)
        for bound in self._bounds:
            if position < bound:
                self._steps[bound].run()
                return
        self._exact.run(position + 1)

    def _run_own(self, own: DecodeStep, token: int, position: int) -> None:
        self._fetched = None
        self._own_ids[0, 0], own.position[0] = token, position
        self.embeddings.run_with_iobinding(self._own_lookup)
        own.run()
        self._own_token = own.token

    def _own_step(self, files: StepFiles, device: Device) -> DecodeStep:
        rows = {value.name: value.shape[2] for value in self.embeddings.get_outputs()}
        own = DecodeStep(
            files,
            device,
            initializers={name: memory.pointer for name, (memory, _) in self._held.items()},
            caches={name: value.data_ptr() for name, value in self.caches.values.items()},
            logits=self._logits.data_ptr(),
            window=self._window,
            context=self.caches.context,
            rows=rows,
            capture=self._captures,
        )
        self._own_ids = np.zeros((1, 1), np.int64)
        self._own_lookup = self.embeddings.io_binding()
        self._own_lookup.bind_input("input_ids", "cpu", 0, np.int64, (1, 1), self._own_ids.ctypes.data)
        for name, array in own.rows.items():
            self._own_lookup.bind_output(name, "cpu", 0, np.float32, (1, 1, rows[name]), array.ctypes.data)
        return own

    def _run(self, binding: ort.IOBinding, options: ort.RunOptions | None) -> None:
        self._fetched, self._own_token = None, None
        self.decoder.run_with_iobinding(binding, options or _uncaptured())

    def _lengths(self, total: int) -> dict[str, npt.NDArray[np.int32]]:
        """What the operators read on the host: T and min(T, window), or bounds of them; () int32 each."""
        return {
            "total_length": np.array(total, np.int32),
            "window_length": np.array(min(total, self._window), np.int32),
        }

    def _bind_state(self, binding: ort.IOBinding, lengths: Mapping[str, npt.NDArray[np.int32]]) -> None:
        for name, value in lengths.items():  # uncopied: they must outlive the run
            binding.bind_input(name, "cpu", 0, value.dtype, (), value.ctypes.data)
        self.caches.bind(binding, self._state.inputs, self._state.outputs)
        binding.bind_ortvalue_output("logits", self._logits)

    def _bind_pickers(self) -> tuple[ort.IOBinding, ort.IOBinding]:
        bindings = []
        for name in (GREEDY, TOP):
            session = self._pickers[name]
            binding = session.io_binding()
            binding.bind_ortvalue_input("logits", self._logits)
            for output in session.get_outputs():
                dtype = np.int64 if output.type == "tensor(int64)" else np.float32
                binding.bind_ortvalue_output(output.name, self._zeros(tuple(output.shape), dtype))
            bindings.append(binding)
        return bindings[0], bindings[1]

    def _zeros(self, shape: tuple[int, ...], dtype: type[np.generic]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), self._device, 0)

    def _open(self, path: Path, settings: CudaSettings, *, captures: bool) -> ort.InferenceSession:
        if not path.is_file():
            raise BundleError(f"{path}: not there; export the bundle again with this version")
        shared = self._weights if path.name == CUDA_DECODER else {}
        if settings.device != DEVICE:
            return open_graph(path, self.threads, "cpu", config=settings.config, initializers=shared)
        options = PROVIDER_OPTIONS | dict(settings.provider_options)
        return open_graph(
            path,
            self.threads,
            "cuda",
            provider_options=options | {"enable_cuda_graph": "1" if captures else "0"},
            config=settings.config,
            initializers=shared,
        )


class _StepInputs:
    """What changes from step to step: rows of the embedding tables and the position, copied in one piece."""

    def __init__(self, embeddings: ort.InferenceSession, device: str) -> None:
        self._embeddings, self._device = embeddings, device
        self._ids = np.zeros((1, 1), np.int64)
        self._lookup = embeddings.io_binding()
        self._lookup.bind_input("input_ids", "cpu", 0, np.int64, (1, 1), self._ids.ctypes.data)
        # name -> type, shape, offset in bytes
        self._places: dict[str, tuple[type[np.generic], tuple[int, ...], int]] = {
            "last_position": (np.int64, (1, 1), 0)
        }
        end = INPUT_ALIGNMENT_BYTES
        for value in embeddings.get_outputs():
            shape: tuple[int, ...] = (1, 1, value.shape[2])
            self._places[value.name] = (np.float32, shape, end)
            end += -(-4 * value.shape[2] // INPUT_ALIGNMENT_BYTES) * INPUT_ALIGNMENT_BYTES
        self._host = np.zeros(end // 4, np.float32)
        self._there = ort.OrtValue.ortvalue_from_numpy(self._host, device, 0)
        self._position = self._host[:2].view(np.int64)
        for name, (dtype, shape, offset) in self._places.items():
            if name != "last_position":
                self._lookup.bind_output(name, "cpu", 0, dtype, shape, self._host.ctypes.data + offset)

    def set(self, token: int, position: int) -> None:
        self._ids[0, 0], self._position[0] = token, position
        self._embeddings.run_with_iobinding(self._lookup)
        self._there.update_inplace(self._host)

    def bind(self, binding: ort.IOBinding) -> None:
        """The decoder's inputs."""
        for name, (dtype, shape, offset) in self._places.items():
            binding.bind_input(name, self._device, 0, dtype, shape, self._there.data_ptr() + offset)


class _Step:
    """The binding of a decode step, and how it is run: captured for totals up to a bound, or as it is."""

    def __init__(self, session: CudaSession, bound: int, number: int | None) -> None:
        """number: of the capture; None: none."""
        self._session, self._number = session, number
        self._lengths = session._lengths(bound)
        self._binding = session.decoder.io_binding()
        session._inputs.bind(self._binding)
        session._bind_state(self._binding, self._lengths)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", NOT_CAPTURED if number is None else str(number))

    def run(self, total: int | None = None) -> None:
        """total: tokens in all after this step, where nothing is captured."""
        if total is not None:
            for name, value in self._session._lengths(total).items():
                self._lengths[name][...] = value
        self._session._run(self._binding, self._options)


def _kernels(bundle: Bundle, settings: CudaSettings) -> tuple[StepFiles, Device] | None:
    """What a decode step by our own kernels needs; None where it is ONNX Runtime's."""
    if not settings.own_kernels:
        return None
    files = read_step(bundle)
    if files is None:
        log.warning("%s: decode steps run on ONNX Runtime's kernels: it does not describe them", bundle.path)
        return None
    if settings.kernels_on is not None:
        return files, settings.kernels_on
    if settings.device != DEVICE:
        return None
    try:
        if not hasattr(ort.OrtValue, "from_dlpack"):
            raise Unavailable(f"onnxruntime {ort.__version__} cannot share weights; 1.31 can")
        return files, Gpu()
    except Unavailable as reason:
        log.warning("decode steps run on ONNX Runtime's kernels, which are slower: %s", reason)
        return None


def _load_weights(files: StepFiles, device: Device) -> dict[str, tuple[Memory, ort.OrtValue]]:
    """All regions of a plan, on the device, by the names of the graph's initializers, and views of them.

    ONNX Runtime shares what it does not own; what it allocates itself, it allocates in powers of two.
    """
    held: dict[str, tuple[Memory, ort.OrtValue]] = {}
    for region in files.plan.regions():
        memory = device.array(files.read(region))
        view = ort.OrtValue.from_dlpack(memory.exported(region.dtype, region.shape))
        held[region.name] = memory, view
    return held


def bounds_up_to(context: int) -> tuple[int, ...]:
    """Totals for which a step is captured: 1,024, 2,048, … and the context."""
    bounds = [FIRST_BOUND]
    while bounds[-1] < context:
        bounds.append(bounds[-1] * BOUND_STEP)
    return (*bounds[:-1], context)


def load_libraries() -> None:
    """Load CUDA and cuDNN from their Python packages, if they are installed; else the system's are taken."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        ort.preload_dlls()


def _uncaptured() -> ort.RunOptions:
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", NOT_CAPTURED)
    return options
