"""Every check on the GPU as a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import prepare
from .checks import Place, all_checks

CASES = Path(__file__).parents[2] / ".cuda" / "cases"


@pytest.fixture(scope="session")
def place() -> Place:
    prepare(CASES)
    return Place(CASES)


@pytest.mark.cuda
@pytest.mark.timeout(1200)  # the first makes the cases
@pytest.mark.parametrize("name", list(all_checks()))
def test_on_cuda(place: Place, name: str) -> None:
    all_checks()[name](place)
