"""Denormal numbers count as zero on a thread while a graph runs on it, and nowhere else.

Softmax leaves probabilities under 1e-38 where attention is sure of itself, and x86 processors compute with
such numbers many times slower. ONNX Runtime's `session.set_denormal_as_zero` reaches its own threads, but
not the one that calls it, on which a share of every run is computed. (ARM processors lose no time on them.)
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# fenv_t of glibc and musl on x86-64: 28 bytes of the x87's state, then MXCSR
_Environment = ctypes.c_uint32 * 8
_MXCSR = 7
# flush results to zero, take inputs for zero (Intel SDM, volume 1, 10.2.3)
_FTZ_DAZ = 1 << 15 | 1 << 6


def _open_libc() -> ctypes.PyDLL | None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    libc = ctypes.PyDLL(None)  # PyDLL keeps the GIL: these calls take nanoseconds
    # a Python that was linked statically may not have them
    return libc if hasattr(libc, "fegetenv") and hasattr(libc, "fesetenv") else None


_libc = _open_libc()
AVAILABLE = _libc is not None


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """As a decorator or a block; what was set before is back afterwards. Not on generators."""
    if _libc is None:
        yield
        return
    before, during = _Environment(), _Environment()
    for environment in (before, during):
        _libc.fegetenv(environment)
    during[_MXCSR] |= _FTZ_DAZ
    _libc.fesetenv(during)
    try:
        yield
    finally:
        _libc.fesetenv(before)
