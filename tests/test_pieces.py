"""Long prompts: chunks are cut so that attention scores stay bounded, and the cut changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime import pieces
from gemma_edge.runtime.pieces import LEAST_ROWS, SCORES_MAX_BYTES, rows_at_once, scores_bytes
from gemma_edge.runtime.session import Session

from .support.tiny_bundles import TinyBundle


@given(st.integers(1, 512), st.integers(0, 200_000), st.integers(1, 32))
def test_pieces_cover_the_chunk_within_the_bound(rows: int, position: int, heads: int):
    parts = list(pieces.pieces(rows, position, heads))
    assert [first for first, _ in parts] == [sum(count for _, count in parts[:n]) for n in range(len(parts))]
    assert sum(count for _, count in parts) == rows
    for first, count in parts:
        scores = 4 * heads * count * (position + first + count)
        assert count <= LEAST_ROWS or scores <= SCORES_MAX_BYTES
        assert scores <= scores_bytes(max(rows, LEAST_ROWS), position + rows, heads)


def test_e2b_near_the_end_of_its_context():
    """8 heads: chunks of 256 as they are up to 16k tokens, 32 rows at a time at 131k."""
    assert list(pieces.pieces(256, 16_384 - 256, 8)) == [(0, 256)]
    assert rows_at_once(131_072, 8) == 32
    assert scores_bytes(256, 131_072, 8) == SCORES_MAX_BYTES < 4 * 8 * 256 * 131_072


@pytest.mark.parametrize("last", [True, False])
def test_the_cut_changes_nothing(tiny_bundle, monkeypatch: pytest.MonkeyPatch, last: bool):
    """The same prompt whole and cut: the same logits at its end, or after one more token."""
    tiny: TinyBundle = tiny_bundle(model=dict(seed=7), slack=4, chunk=48)
    ids = np.random.default_rng(0).integers(300, 500, 90)

    def logits() -> np.ndarray:
        session = Session(tiny.bundle)
        counts: list[int] = []
        run = session.decoder.run
        monkeypatch.setattr(
            session.decoder, "run", lambda bound, options=None: (counts.append(1), run(bound, options))
        )
        session.prefill(ids[:48], 0, last=False)
        session.prefill(ids[48:], 48, last=last)
        runs.append(len(counts))
        if not last:
            session.step(int(ids[0]), 90)
        return session.logits.copy()

    runs: list[int] = []
    whole = logits()
    monkeypatch.setattr(pieces, "SCORES_MAX_BYTES", 0)
    cut = logits()
    assert runs == [2, 6]
    assert np.abs(whole - cut).max() < 1e-4
