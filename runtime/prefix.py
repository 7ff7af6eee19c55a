"""A prompt starts where it differs from what was run before: in the caches, or in a state that was kept.

    keys of a prompt --> the caches as they are | the best snapshot, put back --> position to start from

A key stands for a row of the prompt: a token id, or a hash of a soft token. A state serves at every length
that `KvCaches.back` calls exact. Snapshots are taken where the system turn ends, and of a conversation that
another prompt is about to overwrite. Knows no text: where a system turn ends, `boundary` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .bundle import MANIFEST, Bundle, Manifest, sha256_file
from .cache import KvCaches
from .prompt import Start
from .snapshot_files import SnapshotFolder
from .snapshots import MIB, Keys, Snapshots

log = logging.getLogger(__name__)

DEFAULT_MOST_MIB = 128


def no_boundary(keys: Sequence[int]) -> int | None:
    return None


@dataclass(frozen=True)
class ReuseSettings:
    """What is kept of earlier prompts."""

    budget_bytes: int  # of snapshots in memory, and as much on disk; 0: only what the caches hold is reused
    folder: Path | None = None  # where snapshots of system turns outlive the process
    boundary: Callable[[Sequence[int]], int | None] = no_boundary  # a prompt's keys -> end of its system turn
    least_tokens: int = 64  # fewer are not worth a snapshot


def default_budget_bytes(manifest: Manifest) -> int:
    """A quarter of what the device's memory budget leaves, at most 128 MiB."""
    memory = manifest.memory
    planned = memory.weights_bytes + memory.kv_bytes + memory.overhead_bytes + memory.audio_bytes
    left = manifest.runtime.memory_budget_mib * MIB - planned
    return min(max(left // 4, 0), DEFAULT_MOST_MIB * MIB)


def open_reuse(bundle: Bundle, caches: KvCaches, settings: ReuseSettings) -> Reuse:
    """Raises ConfigError if the folder cannot be used."""
    if not settings.budget_bytes:
        return Reuse(caches, settings, None)
    if not caches.can_copy:
        log.warning("snapshots of prompts are kept on the CPU only; here the last prompt alone is reused")
        return Reuse(caches, settings, None)
    folder = None
    if settings.folder is not None:
        manifest = sha256_file(bundle.path / MANIFEST)
        folder = SnapshotFolder(settings.folder, manifest, settings.budget_bytes)
    return Reuse(caches, settings, Snapshots(caches, settings.budget_bytes, folder))


class Reuse:
    """Of one engine: what is in its caches, and its snapshots if it keeps any."""

    def __init__(self, caches: KvCaches, settings: ReuseSettings, snapshots: Snapshots | None) -> None:
        self.snapshots = snapshots
        self._caches, self._settings = caches, settings
        self._keys = np.empty(caches.context, np.int64)  # of the rows in the caches …
        self._length = 0  # … so many of which are known to be right
        self._finished = False  # whether an answer has ended there
        self._cut: int | None = None

    def expects(self, keys: Sequence[int]) -> bool:
        """Whether some state begins with `keys` and goes on."""
        asked = np.asarray(keys, np.int64)
        states = [self._held, *(one.keys for one in self.snapshots or ())]
        return any(len(state) > len(asked) and np.array_equal(state[: len(asked)], asked) for state in states)

    def start(self, keys: Sequence[int]) -> Start:
        """Bring the caches to the longest state that a prompt of `keys` begins with."""
        wanted = np.asarray(keys, np.int64)
        position = self._usable(self._held, wanted)
        if position < self._length and self._finished:
            self._keep_conversation()
        self._length, self._finished = position, False
        while self.snapshots is not None:
            best = max(self.snapshots, key=lambda one: self._usable(one.keys, wanted), default=None)
            if best is None or (length := self._usable(best.keys, wanted)) <= position:
                break
            self._length = 0
            if (rows := self.snapshots.rows(best)) is not None:
                self._caches.restore(rows, length)
                self.ran(keys[:length], 0)
                position = length
        self._length = position
        self._cut = self._boundary(keys, position)
        return Start(position, self._cut)

    def running(self) -> None:
        """Rows are about to be run: until `ran`, nobody knows what is in the caches."""
        self._length, self._finished = 0, False

    def ran(self, keys: Sequence[int], position: int) -> None:
        """The rows `keys` are in the caches, after `position` others; those that follow are not valid."""
        self._length = position + len(keys)
        self._keys[position : self._length] = keys
        if self._length == self._cut and self.snapshots is not None:
            self._cut = None
            self.snapshots.add(self._held.copy(), "shared")

    def finished(self) -> None:
        """An answer has ended by itself: the conversation may go on from here."""
        self._finished = True

    @property
    def _held(self) -> Keys:
        return self._keys[: self._length]

    def _usable(self, state: Keys, wanted: Keys) -> int:
        """How many of `wanted` are exactly in a state after `state`."""
        common = min(len(state), len(wanted))
        differ = np.flatnonzero(state[:common] != wanted[:common])
        return self._caches.back(len(state), int(differ[0]) if len(differ) else common)

    def _boundary(self, keys: Sequence[int], position: int) -> int | None:
        if self.snapshots is None:
            return None
        boundary = self._settings.boundary(keys)
        if boundary is None or boundary < self._settings.least_tokens:
            return None
        return boundary if position < boundary <= len(keys) else None

    def _keep_conversation(self) -> None:
        if self.snapshots is not None and self._length >= self._settings.least_tokens:
            self.snapshots.add(self._held.copy(), "conversation")
