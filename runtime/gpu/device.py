"""The GPU as `step` wants it, by NVIDIA's cuda.core: kernels are compiled for it once, and kept."""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..aside import write_file_aside
from .step import Launch, Memory, Pinned

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("decode_step.cu")
LEAST_COMPUTE_CAPABILITY = (7, 5)
EARLY_START_FROM = (9, 0)  # compute capability of programmatic dependent launch
SHARED_BYTES = 48 << 10  # that a kernel may have without asking for more


class Unavailable(Exception):
    """No cuda.core, or a GPU that the kernels were not written for."""


class _Held:
    """Device memory."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self.pointer = int(buffer.handle)

    def exported(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Any:
        from cuda.core.utils import StridedMemoryView

        return StridedMemoryView.from_buffer(self.buffer, shape, dtype=np.dtype(dtype))


class _PinnedHeld(_Held):
    def __init__(self, buffer: Any) -> None:
        super().__init__(buffer)
        memory = (ctypes.c_uint8 * buffer.size).from_address(self.pointer)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(memory, np.uint8)


class Gpu:
    """The first GPU, in the context that ONNX Runtime uses."""

    def __init__(self, kept: Path | None = None) -> None:
        """kept: a folder for compiled kernels; by default the user's cache folder."""
        try:
            from cuda.core import Device
        except ImportError as cause:
            raise Unavailable(f"cuda.core is not installed ({cause})") from cause
        self._kept = kept or kept_folder()
        try:
            self._device = Device(0)
            self._device.set_current()
        except Exception as cause:  # cuda.core has no common base for "no driver"
            raise Unavailable(f"no GPU that cuda.core can use ({cause})") from cause
        capability = self._device.compute_capability
        if tuple(capability) < LEAST_COMPUTE_CAPABILITY:
            raise Unavailable(f"compute capability {capability[0]}.{capability[1]}")
        self._arch = f"sm_{capability[0]}{capability[1]}"
        self._early = tuple(capability) >= EARLY_START_FROM
        self._stream = self._device.create_stream()
        self._current = threading.local()
        self.multiprocessors: int = self._device.properties.multiprocessor_count

    def array(self, values: npt.NDArray[Any]) -> Memory:
        values = np.ascontiguousarray(values)
        held = self.zeros(values.nbytes)
        source = self.pinned(values.nbytes)
        source.bytes[:] = values.view(np.uint8).reshape(-1)
        held.buffer.copy_from(source.buffer, stream=self._stream)  # type: ignore[attr-defined]
        self._stream.sync()
        return held

    def zeros(self, count_bytes: int) -> Memory:
        held = _Held(self._device.allocate(max(count_bytes, 1), stream=self._stream))
        held.buffer.fill(0, stream=self._stream)
        self._stream.sync()
        return held

    def pinned(self, count_bytes: int) -> Pinned:
        from cuda.core import LegacyPinnedMemoryResource

        held = _PinnedHeld(LegacyPinnedMemoryResource().allocate(max(count_bytes, 1)))
        held.bytes[:] = 0
        return held

    def record(
        self, copy: tuple[Memory, Pinned], launches: Sequence[Launch], *, capture: bool = True
    ) -> Callable[[], None]:
        from cuda.core import LaunchConfig, launch

        kernels = self._compile(sorted({item.kernel for item in launches}))
        for name, kernel in kernels.items():
            most = max(item.shared_bytes for item in launches if item.kernel == name)
            if most > SHARED_BYTES:
                _allow_shared(kernel, most, self._device)
        configs = [
            LaunchConfig(
                grid=item.grid,
                block=item.threads,
                shmem_size=item.shared_bytes,
                # The first follows a copy, which has no early end.
                programmatic_stream_serialization=self._early and number > 0,
            )
            for number, item in enumerate(launches)
        ]

        def start(stream: Any) -> None:
            copy[0].buffer.copy_from(copy[1].buffer, stream=stream)  # type: ignore[attr-defined]
            for config, item in zip(configs, launches, strict=True):
                launch(stream, config, kernels[item.kernel], *item.arguments)

        graph = None
        if capture:
            builder = self._device.create_graph_builder()
            builder.begin_building()
            start(builder)
            graph = builder.end_building().complete()
            graph.upload(self._stream)
            self._stream.sync()

        def run() -> None:
            if not hasattr(self._current, "here"):  # each thread has a context of its own
                self._device.set_current()
                self._current.here = True
            if graph is None:
                start(self._stream)
            else:
                graph.launch(self._stream)
            self._stream.sync()

        return run

    def _compile(self, names: Sequence[str]) -> dict[str, Any]:
        """Kernels by name; from the folder of compiled ones if they are there."""
        from cuda.core import ObjectCode

        source = SOURCE.read_text(encoding="utf-8")
        about = [source, self._arch, *names, metadata.version("cuda-core")]
        key = hashlib.sha256("\0".join(about).encode()).hexdigest()[:32]
        path = self._kept / f"decode_step-{self._arch}-{key}.cubin"
        symbols_path = path.with_suffix(".json")
        try:
            code, symbols = path.read_bytes(), json.loads(symbols_path.read_text())
            symbols = {name: lowered.encode() for name, lowered in symbols.items()}
            found = ObjectCode.from_cubin(code, symbol_mapping=symbols)
            return {name: found.get_kernel(name) for name in names}
        except FileNotFoundError:
            pass
        except Exception as error:  # damaged, or of another driver: made anew
            log.warning("%s: cannot be used (%s); compiling the kernels again", path, error)
        log.info("compiling the kernels of a decode step for %s: some seconds, once", self._arch)
        compiled = compile_kernels(source, self._arch, names)
        try:
            self._kept.mkdir(parents=True, exist_ok=True)
            symbols = {name: _text(lowered) for name, lowered in compiled.symbol_mapping.items()}
            write_file_aside(path, compiled.code)
            write_file_aside(symbols_path, json.dumps(symbols).encode())
        except OSError as error:
            log.warning("%s: not kept (%s); the kernels are compiled at every start", path, error)
        return {name: compiled.get_kernel(name) for name in names}


def compile_kernels(source: str, arch: str, names: Sequence[str]) -> Any:
    """Machine code of the named kernels; needs no GPU. arch: sm_87, sm_90, …"""
    from cuda.core import Program, ProgramOptions

    return Program(source, "c++", ProgramOptions(arch=arch, std="c++17")).compile(
        "cubin", name_expressions=tuple(names)
    )


def kept_folder() -> Path:
    """Where compiled kernels are kept between starts."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gemma-edge"


def _allow_shared(kernel: Any, count_bytes: int, device: Any) -> None:
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, count_bytes, kernel.handle, device.device_id)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise Unavailable(f"{count_bytes} bytes of shared memory: {status}")


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
