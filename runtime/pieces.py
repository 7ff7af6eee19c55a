"""Cuts a prompt chunk where the context is long: attention scores stay bounded, however long the prompt is.

On the CPU a full-attention layer holds the scores of all its heads and rows against all tokens at once:
8 heads, 256 rows and 131,072 tokens are 1 GiB. Fewer rows at a time cost little there, since reading the keys
takes most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator

SCORES_MAX_BYTES = 128 << 20
LEAST_ROWS = 16  # products of fewer rows waste the reading of the weights
FLOAT_BYTES = 4


def pieces(rows: int, position: int, heads: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the parts of `rows` rows at `position` that are run at a time, in order."""
    first = 0
    while first < rows:
        count = min(rows - first, rows_at_once(position + rows, heads))
        yield first, count
        first += count


def rows_at_once(tokens: int, heads: int) -> int:
    """How many rows may be scored against `tokens` tokens at once: a power of two."""
    most = max(LEAST_ROWS, SCORES_MAX_BYTES // (FLOAT_BYTES * heads * tokens))
    return 1 << (most.bit_length() - 1)


def scores_bytes(chunk: int, context: int, heads: int) -> int:
    """The most that scores take while a prompt fills `context` in chunks of `chunk`."""
    bound = max(SCORES_MAX_BYTES, FLOAT_BYTES * heads * LEAST_ROWS * context)
    return min(FLOAT_BYTES * heads * chunk * context, bound)
