"""What several test files share: tiny bundles, exported once per session."""

from __future__ import annotations

import json
from collections.abc import Callable
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
