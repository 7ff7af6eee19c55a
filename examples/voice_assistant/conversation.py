"""What has been said: kept as messages, the oldest forgotten when the context is full. Runs no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...runtime.sounds import MAX_SOUNDS
from .brain import Count, Message


@dataclass
class Exchange:
    """One turn: what the user said, and all that the model and its tools said to it."""

    parts: list[dict[str, Any]]  # the user's content: sounds or text
    replies: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        is_text = all(part["type"] == "text" for part in self.parts)
        content = "\n".join(part["text"] for part in self.parts) if is_text else self.parts
        return [{"role": "user", "content": content}, *self.replies]

    @property
    def sounds(self) -> int:
        return sum(part["type"] == "audio" for part in self.parts)


def system_message(text: str) -> list[Message]:
    """What a conversation begins with."""
    return [{"role": "system", "content": text}] if text.strip() else []


class Conversation:
    """The system message and the last turns."""

    def __init__(
        self, system: str, tools: Sequence[dict[str, Any]], count: Count, remember_turns: int
    ) -> None:
        self.head = system_message(system)
        self.tools = tools
        self._count = count
        self._turns: deque[Exchange] = deque(maxlen=remember_turns)

    def __len__(self) -> int:
        return len(self._turns)

    def remember(self, exchange: Exchange) -> None:
        self._turns.append(exchange)

    def fit(self, current: Exchange, limit: int) -> list[Message] | None:
        """The messages up to `current` in at most `limit` tokens; None if it alone is too much."""
        kept = list(self._turns)
        while True:
            messages = [*self.head]
            for exchange in (*kept, current):
                messages += exchange.messages()
            sounds = sum(exchange.sounds for exchange in (*kept, current))
            if sounds <= MAX_SOUNDS and self._count(messages, self.tools) <= limit:
                while len(self._turns) > len(kept):
                    self._turns.popleft()
                return messages
            if not kept:
                return None
            kept.pop(0)
