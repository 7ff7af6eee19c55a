"""A prompt as the engine takes it: token ids, soft tokens that were heard, and what is still to come.

A prompt may be an iterator: its parts are run as they arrive, so that a sentence that is still being spoken
is prefilled while it is spoken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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


@dataclass(frozen=True)
class Start:
    """How a prompt is begun."""

    position: int = 0  # rows that are in the caches already
    cut: int | None = None  # a chunk ends here


class Resume(Protocol):
    """Who knows what is in the caches already; asked with the keys of a prompt's first rows."""

    def expects(self, keys: Sequence[int]) -> bool:
        """Whether all of `keys` may be there, and more: then nothing needs to be run yet."""

    def start(self, keys: Sequence[int]) -> Start:
        """Make ready and say where to begin: after at most len(keys) rows."""


class Chunks:
    """Cuts parts into chunks of at most `size` rows, holding one row back until the prompt's end is known.

    `length` is the number of rows so far, `ids` what a repetition penalty sees of them, `keys` what tells
    them apart: a token's id, or a negative number made of a soft token's content.

    With `resume` rows that are in the caches already are left out. What arrives is held while it is what was
    run before; the first row that differs, the end, or NOW decides.
    """

    def __init__(
        self,
        parts: Iterable[Part],
        *,
        size: int,
        pad: int,
        placeholder: int,
        hidden: int,
        resume: Resume | None = None,
    ) -> None:
        self._parts, self._resume = parts, resume
        self._size, self._pad, self._placeholder, self._hidden = size, pad, placeholder, hidden
        self._ids: list[int] = []  # waiting: at most one part and a chunk, or what a cache holds
        self._soft: list[tuple[int, npt.NDArray[np.float32]]] = []  # (index in _ids, row)
        self._start: Start | None = None if resume else Start()
        self._done = 0
        self.ids: list[int] = []
        self.keys: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def reused(self) -> int:
        """Rows that did not have to be run."""
        return self._start.position if self._start else 0

    def __iter__(self) -> Iterator[Chunk]:
        for part in self._parts:
            if isinstance(part, Now):
                yield from self._take_until(1)
                continue
            self._add(part)
            if self._start is None and self._resume is not None and self._resume.expects(self.keys):
                continue
            yield from self._take_until(self._size)
        if not self._ids:
            raise RequestError("invalid_request", "the prompt is empty; give at least one token")
        self._begin()
        while self._next_size() < len(self._ids):
            yield self._take(self._next_size())
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
            if self._resume is not None:
                self.keys += [_soft_key(row) for row in part.rows]
        else:
            self._ids += part
            self.ids += part
            if self._resume is not None:
                self.keys += part

    def _take_until(self, left: int) -> Iterator[Chunk]:
        """Chunks of what waits, until at most `left` rows do."""
        if len(self._ids) > left:
            self._begin()
        while len(self._ids) > left:
            yield self._take(min(self._next_size(), len(self._ids) - 1))

    def _begin(self) -> None:
        if self._start is None and self._resume is not None:
            self._start = self._resume.start(self.keys[:-1])
            self._leave_out(self._start.position)

    def _next_size(self) -> int:
        cut = self._start.cut if self._start else None
        return self._size if cut is None or cut <= self._done else min(self._size, cut - self._done)

    def _take(self, count: int, *, last: bool = False) -> Chunk:
        heard = None
        if taken := [(index, row) for index, row in self._soft if index < count]:
            heard = Heard(
                np.asarray([index for index, _ in taken], np.int64), np.stack([row for _, row in taken])
            )
        chunk = Chunk(np.asarray(self._ids[:count], np.int64), heard, self._done, last)
        self._leave_out(count)
        return chunk

    def _leave_out(self, count: int) -> None:
        self._soft = [(index - count, row) for index, row in self._soft if index >= count]
        self._ids = self._ids[count:]
        self._done += count


def check_ids(ids: Sequence[int], vocab_size: int) -> npt.NDArray[np.int64]:
    """A whole prompt's ids as an array. Raises RequestError."""
    found = np.asarray(ids, dtype=np.int64)
    if found.ndim != 1 or found.size == 0:
        raise RequestError("invalid_request", "the prompt is empty; give at least one token")
    if found.min() < 0 or found.max() >= vocab_size:
        raise RequestError("invalid_request", f"prompt ids must be in 0…{vocab_size - 1}")
    return found


def check_wanted(max_new_tokens: int | None) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise RequestError("invalid_request", f"max_new_tokens: expected at least 1, got {max_new_tokens}")


def room_after(length: int, max_new_tokens: int | None, context: int) -> int:
    """How many new tokens there may be after a prompt of `length`. Raises RequestError."""
    room = context - length
    wanted = room if max_new_tokens is None else max_new_tokens
    if wanted > room or room < 1:
        raise RequestError(
            "context_length_exceeded",
            f"the prompt has {length} tokens, {max(wanted, 1)} new ones asked for, the context holds "
            f"{context}; shorten the prompt, ask for fewer, or export with a larger --context",
        )
    return wanted


def _soft_key(row: npt.NDArray[np.float32]) -> int:
    """Below zero, where no token id is: 63 bits of the row's hash."""
    digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
    return -1 - (int.from_bytes(digest, "little") >> 1)
