"""A device for `runtime.gpu.step` that runs the kernels on the CPU: the same source, through g++."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_edge.runtime.gpu.device import SOURCE
from gemma_edge.runtime.gpu.step import Launch, Memory, Pinned

HEADER = Path(__file__).with_name("cuda_emulator.h")
COMPILER = shutil.which("g++")


class Held:
    def __init__(self, values: np.ndarray) -> None:
        self.bytes = np.zeros(values.nbytes + 64, np.uint8)
        start = -self.bytes.ctypes.data % 64
        self.bytes = self.bytes[start : start + values.nbytes]
        self.bytes[:] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self.pointer = self.bytes.ctypes.data

    def exported(self, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> np.ndarray:
        return self.bytes.view(dtype).reshape(shape)


class Emulator:
    """multiprocessors: of the GPU that it pretends to be."""

    def __init__(self, folder: Path, multiprocessors: int = 3) -> None:
        """folder: for the compiled library."""
        self.multiprocessors = multiprocessors
        self._folder = folder

    def array(self, values: np.ndarray) -> Memory:
        return Held(values)

    def zeros(self, count_bytes: int) -> Memory:
        return Held(np.zeros(max(count_bytes, 1), np.uint8))

    def pinned(self, count_bytes: int) -> Pinned:
        return Held(np.zeros(count_bytes, np.uint8))

    def record(
        self, copy: tuple[Memory, Pinned], launches: Sequence[Launch], *, capture: bool = True
    ) -> Callable[[], None]:
        names = sorted({item.kernel for item in launches})
        library = ctypes.CDLL(str(compiled(names, self._folder)))
        target, source = copy
        assert isinstance(target, Held)
        prepared = [(names.index(item.kernel), item, _arguments(item)) for item in launches]

        def run() -> None:
            target.bytes[:] = source.bytes
            for number, item, (_, pointers) in prepared:
                library.run(number, (ctypes.c_uint * 3)(*item.grid), item.threads, pointers)

        return run


def compiled(names: Sequence[str], folder: Path) -> Path:
    """A library with the named kernels; made once."""
    cases = "\n".join(
        f"        case {i}: launch({name}, grid, threads, arguments); return;" for i, name in enumerate(names)
    )
    text = SOURCE.read_text(encoding="utf-8")
    text = re.sub(r"^ *#pragma unroll.*\n", "", text, flags=re.MULTILINE)
    text = f"""#include "{HEADER}"
{text}
extern "C" void run(int kernel, const unsigned* grid, unsigned threads, void** arguments) {{
    switch (kernel) {{
{cases}
    }}
}}
"""
    key = hashlib.sha256((text + HEADER.read_text()).encode()).hexdigest()[:16]
    library = folder / f"decode_step_{key}.so"
    if not library.exists():
        source = folder / f"decode_step_{key}.cpp"
        source.write_text(text)
        assert COMPILER is not None
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC"]
        subprocess.run([*command, "-o", str(library), str(source)], check=True)
    return library


def _arguments(item: Launch) -> tuple[list[Any], Any]:
    """Values, and an array of pointers to them."""
    values: list[Any] = []
    for argument in item.arguments:
        if isinstance(argument, int):
            values.append(ctypes.c_void_p(argument))
        else:
            values.append(np.ctypeslib.as_ctypes_type(argument.dtype)(argument))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return values, pointers
