"""Collected only when asked for, `pytest -m cuda`; without a GPU that ends at once, and passes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from .report import NO_GPU, what_is_missing


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked = "cuda" in (config.option.markexpr or "").replace("not cuda", "")
    return None if asked else True


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = [item for item in session.items if item.get_closest_marker("cuda")]
    if wanted and (missing := what_is_missing()):
        pytest.exit(f"no CUDA checks were run and none passed: {missing}", returncode=NO_GPU)
