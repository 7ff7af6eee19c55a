"""Finds stop strings in streaming text without ever letting part of one out; knows strings only."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import RequestError

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256


def check_stops(stops: Sequence[str]) -> None:
    """Raises RequestError("invalid_request")."""
    if len(stops) > MAX_STOPS:
        raise RequestError("invalid_request", f"stop: {len(stops)} strings, at most {MAX_STOPS} are taken")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            expected = f"1 to {MAX_STOP_CHARACTERS} characters"
            raise RequestError("invalid_request", f"stop: expected {expected}, got {stop!r:.80}")


class StopFinder:
    """Text in, text out, cut before the first stop string. Holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is safe to show now. Nothing once a stop string is `found`."""
        if not self._stops:
            return text
        if self.found:
            return ""
        text = self._held + text
        places = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = next(
            (
                length
                for length in range(min(self._longest - 1, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stops)
            ),
            0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held
