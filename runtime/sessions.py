"""Opens the session that suits a bundle: on the CPU, or on the GPU if it was made for CUDA."""

from __future__ import annotations

from .bundle import Bundle
from .cuda_session import CudaSession
from .session import Session

AnySession = Session | CudaSession


def open_session(bundle: Bundle, *, threads: int | None = None, longest_draft: int = 0) -> AnySession:
    """As their constructors say."""
    if bundle.manifest.runtime.execution_provider == "cuda":
        return CudaSession(bundle, threads=threads, longest_draft=longest_draft)
    return Session(bundle, threads=threads, longest_draft=longest_draft)
