"""Opens a graph of a bundle in ONNX Runtime; knows the session's options, not what a graph computes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .denormals import denormals_as_zero
from .errors import BundleError
from .read_ahead import read_ahead

NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


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
        with denormals_as_zero(), read_ahead(path) if ahead else contextlib.nullcontext():
            session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as cause:  # onnxruntime raises many classes, all derived from Exception alone
        raise BundleError(f"{path}: onnxruntime cannot load it ({cause}); export the bundle again") from cause
    if name not in session.get_providers():  # onnxruntime drops one whose libraries are missing
        raise BundleError(
            f"{path.parent}: made for {name}, which onnxruntime could not start (is CUDA installed?); "
            "install what it needs or export for another device"
        )
    return session


@dataclass(frozen=True)
class Graph:
    """An open graph, and the names it goes by."""

    session: ort.InferenceSession
    inputs: tuple[str, ...]  # those with a default too
    outputs: tuple[str, ...]

    @staticmethod
    def of(session: ort.InferenceSession) -> Graph:
        entering = (*session.get_inputs(), *session.get_overridable_initializers())
        return Graph(
            session,
            tuple(value.name for value in entering),
            tuple(value.name for value in session.get_outputs()),
        )


def give_back_freed() -> None:
    """Memory that loading took and freed, which glibc keeps by thread: 20 MB for E2B, in a millisecond."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def data_of(graph: Path) -> Path:
    """Where its weights are."""
    return graph.with_name(f"{graph.name}.data")


def bind_input(binding: ort.IOBinding, name: str, buffer: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Bind the first elements of `buffer` as a tensor of `shape`, uncopied: it must outlive the binding."""
    binding.bind_input(name, "cpu", 0, buffer.dtype, shape, buffer.ctypes.data)
