"""What several test files share: tiny bundles, exported once per session, and traces, made once per shape."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """tiny_bundle(recipe="int4", kv="float16", model=dict(seed=1)); see `support.tiny_bundles`."""
    from .support.tiny_bundles import export_tiny

    made: dict[str, Any] = {}

    def get(**options: Any) -> Any:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = export_tiny(tmp_path_factory.mktemp("tiny"), **options)
        return made[key]

    return get


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tracing is most of a tiny export: each shape is traced once, and every export gets a copy."""
    module = sys.modules.get("gemma_edge.export.bundle")
    if module is not None:
        module.trace_decoder = _once_per_shape(module.trace_decoder)
        module.trace_embeddings = _once_per_shape(module.trace_embeddings)
        module.trace_prefill = _once_per_shape(module.trace_prefill)
        module.trace_audio = _once_per_shape(module.trace_audio)


def _once_per_shape(trace: Callable[..., Any]) -> Callable[..., Any]:
    traces: dict[str, Any] = {}

    @functools.wraps(trace)
    def traced(*shape: Any) -> Any:
        key = repr(shape)
        if key not in traces:
            traces[key] = trace(*shape)
        first = traces[key]
        return type(first)(first.graph.clone(), first.makers)

    return traced


@pytest.fixture(scope="session")
def nano_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled nano model, exported as a user would: int4, x86-64-generic."""
    from gemma_edge.cli import main

    folder = tmp_path_factory.mktemp("bundles") / "nano-x86-64-generic-int4"
    model = Path(__file__).parent.parent / "models" / "nano"
    assert main(["export", "--model", str(model), "--device", "x86-64-generic", "--out", str(folder)]) == 0
    return folder
