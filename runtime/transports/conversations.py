"""The last turns of some conversations, by the ids that clients give them. Bounded, in memory only."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

MAX_CONVERSATIONS = 32
MAX_TURNS = 8  # of one: a question and its answer each
MAX_TURN_CHARS = 8_000
MAX_ID_CHARS = 128
FORGET_S = 600.0  # after the last turn


@dataclass
class _Conversation:
    turns: deque[tuple[str, str]] = field(default_factory=lambda: deque(maxlen=MAX_TURNS))
    used_at: float = 0.0


class Conversations:
    """Used by one thread."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Conversation] = OrderedDict()  # the one used last at the end

    def messages(self, key: str | None) -> list[dict[str, str]]:
        """What was said so far."""
        self._forget_old()
        known = self._known.get(key) if key is not None else None
        if known is None:
            return []
        return [
            {"role": role, "content": text}
            for turn in known.turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]

    def add(self, key: str | None, question: str, answer: str) -> None:
        """Remember a turn, unless it is too long or has no usable key."""
        too_long = len(question) + len(answer) > MAX_TURN_CHARS
        if key is None or not 0 < len(key) <= MAX_ID_CHARS or too_long:
            return
        known = self._known.setdefault(key, _Conversation())
        known.turns.append((question, answer))
        known.used_at = time.monotonic()
        self._known.move_to_end(key)
        while len(self._known) > MAX_CONVERSATIONS:
            self._known.popitem(last=False)

    def forget(self, key: str | None) -> None:
        if key is not None:
            self._known.pop(key, None)

    def _forget_old(self) -> None:
        old = time.monotonic() - FORGET_S
        for key in [key for key, known in self._known.items() if known.used_at < old]:
            del self._known[key]
