"""A turn of the dialogue: what was said, what came of it, and when. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ...runtime.sounds import Feed
from .home import Outcome
from .listener import RATE, Samples


@dataclass(frozen=True)
class Call:
    """A tool call and what came of it."""

    name: str
    arguments: dict[str, Any]
    outcome: Outcome


@dataclass
class Utterance:
    """What somebody said at one time."""

    feed: Feed
    samples: list[Samples] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(map(len, self.samples)) / RATE

    def put(self, samples: Samples) -> None:
        self.samples.append(samples)
        self.feed.put(samples)

    def again(self) -> Utterance:
        """For a later request: a feed that was not heard whole cannot be read twice."""
        if self.feed.soft is not None:
            return self
        feed = Feed(RATE, max_s=self.feed.max_s)
        feed.put(np.concatenate(self.samples))
        feed.end()
        return Utterance(feed, self.samples)


@dataclass
class Turn:
    """What was said and what came of it, with its times (time.perf_counter())."""

    number: int
    text: str | None = None  # as typed, or a transcript
    spoken: Utterance | None = None
    before: list[Utterance] = field(default_factory=list)  # earlier ones that got no answer
    speech_s: float = 0.0
    ended_at: float = 0.0  # the turn was complete
    first_token_at: float | None = None
    first_sound_at: float | None = None
    done_at: float = 0.0
    calls: list[Call] = field(default_factory=list)
    answer: str = ""  # all that was written
    said: str = ""  # what of it was heard, or shown
    interrupted: bool = False
    is_cut: bool = False  # the answer reached its longest
    error: str | None = None
    prompt_tokens: int = 0  # of the first request
    reused_tokens: int = 0

    def parts(self) -> list[dict[str, Any]]:
        """The user's content."""
        said = [*self.before, self.spoken] if self.spoken is not None else self.before
        parts: list[dict[str, Any]] = [{"type": "audio", "feed": one.feed} for one in said]
        return parts if self.spoken is not None else [*parts, {"type": "text", "text": self.text or ""}]

    @property
    def token_s(self) -> float | None:
        """From the end of the turn to the first token."""
        return None if self.first_token_at is None else self.first_token_at - self.ended_at

    @property
    def sound_s(self) -> float | None:
        """From the end of the turn to the first sound."""
        return None if self.first_sound_at is None else self.first_sound_at - self.ended_at


class Report(Protocol):
    """Who is told what happens, as it happens."""

    def heard(self, turn: Turn) -> None: ...
    def called(self, turn: Turn, call: Call) -> None: ...
    def sentence(self, turn: Turn, text: str) -> None: ...
    def finished(self, turn: Turn) -> None: ...
