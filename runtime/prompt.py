"""A prompt as the engine takes it: token ids, soft tokens that were heard, and what is still to come.

A prompt may be an iterator: its parts are run as they arrive, so that a sentence that is still being spoken
is prefilled while it is spoken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import RequestError


@dataclass(frozen=True)
class Soft:
    """Soft tokens: each row goes in place of one placeholder token's embedding."""

    rows: npt.NDArray[np.float32]  # (tokens, hidden)


@dataclass(frozen=True)
class Now:
    """Nothing more is there at the moment: run what has arrived, then wait for the next part."""


Part = Sequence[int] | Soft | Now
NOW = Now()


@dataclass(frozen=True)
class Heard:
    """The soft tokens of a chunk."""

    at: npt.NDArray[np.int64]  # (n,) indexes into the chunk
    rows: npt.NDArray[np.float32]  # (n, hidden)


@dataclass(frozen=True)
class Chunk:
    """Some of the prompt, ready to run."""

    ids: npt.NDArray[np.int64]  # (rows,); the pad token where a soft token stands
    heard: Heard | None
    position: int  # of the first
    last: bool  # whether the prompt ends with it


class Chunks:
    """Cuts parts into chunks of at most `size` rows, holding one row back until the prompt's end is known.

    `length` is the number of rows so far, `ids` what a repetition penalty sees of them.
    """

    def __init__(self, parts: Iterable[Part], *, size: int, pad: int, placeholder: int, hidden: int) -> None:
        self._parts = parts
        self._size, self._pad, self._placeholder, self._hidden = size, pad, placeholder, hidden
        self._ids: list[int] = []  # waiting: at most one part and a chunk
        self._soft: list[tuple[int, npt.NDArray[np.float32]]] = []  # (index in _ids, row)
        self._done = 0
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Chunk]:
        for part in self._parts:
            if isinstance(part, Now):
                while len(self._ids) > 1:
                    yield self._take(min(self._size, len(self._ids) - 1))
                continue
            self._add(part)
            while len(self._ids) > self._size:
                yield self._take(self._size)
        if not self._ids:
            raise RequestError("invalid_request", "the prompt is empty; give at least one token")
        yield self._take(len(self._ids), last=True)

    def _add(self, part: Sequence[int] | Soft) -> None:
        if isinstance(part, Soft):
            if part.rows.ndim != 2 or part.rows.shape[1] != self._hidden:
                raise ValueError(
                    f"soft tokens have shape {part.rows.shape}, expected (tokens, {self._hidden})"
                )
            self._soft += [(len(self._ids) + index, row) for index, row in enumerate(part.rows)]
            self._ids += [self._pad] * len(part.rows)
            self.ids += [self._placeholder] * len(part.rows)
        else:
            self._ids += part
            self.ids += part

    def _take(self, count: int, *, last: bool = False) -> Chunk:
        taken = [(index, row) for index, row in self._soft if index < count]
        self._soft = [(index - count, row) for index, row in self._soft if index >= count]
        ids, self._ids = self._ids[:count], self._ids[count:]
        position, self._done = self._done, self._done + count
        heard = None
        if taken:
            heard = Heard(
                np.asarray([index for index, _ in taken], np.int64), np.stack([row for _, row in taken])
            )
        return Chunk(np.asarray(ids, np.int64), heard, position, last)
