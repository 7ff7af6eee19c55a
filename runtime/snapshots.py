"""Kept states of the caches within a byte budget: the least recently used make room, pinned ones stay.

A conversation makes room for another conversation only: one long talk does not cost the system turns that
every request begins with. What is on disk is read when it is used.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .cache import KvCaches, Rows
from .errors import RequestError
from .snapshot_files import SnapshotFolder

log = logging.getLogger(__name__)

Keys = npt.NDArray[np.int64]
Kind = Literal["shared", "conversation"]

MIB = 2**20
MOST_SNAPSHOTS = 256  # those that are on disk only with them


@dataclass
class Snapshot:
    """The state after `keys`."""

    keys: Keys
    kind: Kind
    size_bytes: int
    rows: Rows | None  # None: on disk only
    name: str | None = None  # given to a pinned one

    @property
    def digest(self) -> str:
        return digest_of(self.keys)


def digest_of(keys: Keys) -> str:
    return hashlib.blake2b(keys.tobytes(), digest_size=16).hexdigest()


class Snapshots:
    """Of one engine."""

    def __init__(self, caches: KvCaches, budget_bytes: int, folder: SnapshotFolder | None = None) -> None:
        self._caches, self._folder = caches, folder
        self._budget_bytes = budget_bytes
        self._all: OrderedDict[str, Snapshot] = OrderedDict()  # the least recently used first
        for digest, keys in folder.load(caches) if folder is not None else ():
            self._all[digest] = Snapshot(
                np.asarray(keys, np.int64), "shared", caches.size_bytes(len(keys)), None
            )

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(list(self._all.values()))

    @property
    def size_bytes(self) -> int:
        """Of those in memory."""
        return sum(one.size_bytes for one in self._all.values() if one.rows is not None)

    def rows(self, snapshot: Snapshot) -> Rows | None:
        """Its state, now the most recently used one; None if its file is damaged: then it is gone."""
        digest = snapshot.digest
        if snapshot.rows is None and self._folder is not None:
            rows = self._folder.read(digest)
            if rows is None:
                self._all.pop(digest, None)
                return None
            if self._make_room(snapshot):
                snapshot.rows = rows
            self._all[digest] = snapshot
            self._all.move_to_end(digest)
            return rows
        self._all.move_to_end(digest)
        return snapshot.rows

    def add(self, keys: Keys, kind: Kind) -> None:
        """Keep what the caches hold now, the state after `keys`; one too large for the budget is not kept."""
        snapshot = Snapshot(keys, kind, self._caches.size_bytes(len(keys)), None)
        if snapshot.digest in self._all:
            self._all.move_to_end(snapshot.digest)
            return
        if kind == "conversation":
            self._drop_earlier(keys)
        if not self._make_room(snapshot):
            log.info(
                "the caches of %d tokens are not kept: they take %.1f of %.1f MiB",
                len(keys),
                snapshot.size_bytes / MIB,
                self._budget_bytes / MIB,
            )
            return
        snapshot.rows = self._caches.copy(len(keys))
        self._all[snapshot.digest] = snapshot
        if kind == "shared" and self._folder is not None:
            self._folder.save(snapshot.digest, tuple(keys.tolist()), snapshot.rows)

    def pin(self, keys: Keys, name: str) -> bool:
        """Give the snapshot of `keys` a name, with which it stays in memory. False: there is none.

        Raises RequestError when the pinned ones do not fit into the budget.
        """
        snapshot = self._all.get(digest_of(keys))
        size = self._caches.size_bytes(len(keys))
        others = sum(one.size_bytes for one in self if one.name and one is not snapshot)
        if others + size > self._budget_bytes:
            raise RequestError(
                "invalid_request",
                f"{name}: its {len(keys)} tokens take {size / MIB:.1f} MiB, {others / MIB:.1f} are pinned, "
                f"the prefix cache holds {self._budget_bytes / MIB:.1f}; make it larger, or pin less",
            )
        if snapshot is None or self.rows(snapshot) is None:
            return False
        snapshot.name, snapshot.kind = name, "shared"
        return True

    def close(self) -> None:
        """Wait until everything is on disk."""
        if self._folder is not None:
            self._folder.close()

    def _make_room(self, new: Snapshot) -> bool:
        """False: it does not fit, and nothing was dropped for it."""
        spare = [one for one in self if one is not new and one.name is None]
        spare.sort(key=lambda one: one.kind == "shared")  # stable: conversations first, by use
        if new.kind == "conversation":
            spare = [one for one in spare if one.kind == "conversation"]
        others = len(self._all) - (new.digest in self._all)
        loaded = sum(one.size_bytes for one in spare if one.rows is not None)
        if self.size_bytes - loaded + new.size_bytes > self._budget_bytes:
            return False
        if others - len(spare) >= MOST_SNAPSHOTS:
            return False
        for one in spare[: max(others + 1 - MOST_SNAPSHOTS, 0)]:
            del self._all[one.digest]
        for one in spare:
            if self.size_bytes + new.size_bytes <= self._budget_bytes:
                break
            one.rows = None
            if self._folder is None or not self._folder.holds(one.digest):
                self._all.pop(one.digest, None)
        return True

    def _drop_earlier(self, keys: Keys) -> None:
        """A conversation takes the place of its own beginning."""
        for one in self:
            begins = len(one.keys) <= len(keys) and np.array_equal(one.keys, keys[: len(one.keys)])
            if one.kind == "conversation" and one.name is None and begins:
                del self._all[one.digest]
