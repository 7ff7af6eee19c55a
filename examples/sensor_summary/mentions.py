"""Which sensors a sentence is about: finds their names, whole or as people shorten them, and masks them."""

from __future__ import annotations

import re

from .numerals import MASK, plain_form
from .window import Window

_QUOTED = re.compile(r"(?<!\w)(['\"`])([^\W\d_][^\s'\"`]{1,63})\1(?!\w)")
# What may be quoted without being a name.
_NO_NAMES = frozenset(
    "above below silent normal attention urgent steady rising falling since limit limits worst min max mean "
    "last on off open closed high low".split()
)


class Mentions:
    """Finds the sensors that a sentence is about."""

    def __init__(self, window: Window) -> None:
        names = [sensor.name for sensor in window.sensors]
        self._full = [(name, _whole(plain_form(name))) for name in sorted(names, key=len, reverse=True)]
        places: dict[str, list[str]] = {}
        for name in names:
            levels = name.split("/")
            for first in range(len(levels)):
                for end in range(first + 1, len(levels) + 1):
                    if (first, end) != (0, len(levels)):
                        places.setdefault("/".join(levels[first:end]), []).append(name)
        self._places = [
            (re.compile(pattern, re.IGNORECASE), mentioned)
            for place, mentioned in sorted(places.items(), key=lambda item: -len(item[0]))
            if (pattern := _loosely(place))
        ]
        # The quantity at the end of a name says too little about which sensor is meant.
        self._last = {name.rsplit("/", 1)[-1] for name in names if "/" in name}
        self._places = [
            (pattern, [] if any(pattern.fullmatch(last) for last in self._last) else mentioned)
            for pattern, mentioned in self._places
        ]
        # "pump state" speaks of the sensors that measure it, not of another one at a place called "pump".
        self._measured = {
            plain_form(quantity).casefold(): {s.name for s in window.sensors if s.quantity == quantity}
            for quantity in {sensor.quantity for sensor in window.sensors}
        }
        # A site "Jun 21" is a date in plain form, but not before a colon, which would make it a time.
        site = {plain_form(window.site), plain_form(f"{window.site}:")[:-1]}
        others = {*site, *(plain_form(s.quantity) for s in window.sensors)}
        self._others = [
            re.compile(rf"(?<![\w/-]){re.escape(other)}(?![\w/-])", re.IGNORECASE)
            for other in sorted(others, key=len, reverse=True)
            if re.search(r"[^\W\d]|\x02", other)
        ]

    def unknown(self, text: str) -> list[str]:
        """Single words in quotes that are no name, place, quantity or site: names, then, of nothing here."""
        known = (
            [pattern for _, pattern in self._full] + [pattern for pattern, _ in self._places] + self._others
        )
        return [
            word
            for _, word in _QUOTED.findall(text)
            if word.casefold() not in _NO_NAMES and not any(pattern.fullmatch(word) for pattern in known)
        ]

    def take(self, text: str) -> tuple[str, list[str], list[str]]:
        """(the text with a mask for each name, sensors named in full, sensors at places that are named)."""
        named: list[str] = []
        loose: list[str] = []
        for name, pattern in self._full:
            text, count = pattern.subn(MASK, text)
            if count:
                named.append(name)
        for pattern in self._others:
            text = pattern.sub(lambda match: _without_digits(match[0]), text)
        for pattern, mentioned in self._places:
            if any(self._means(match, mentioned, text) for match in pattern.finditer(text)):
                loose += mentioned
            text = pattern.sub(lambda match: _without_digits(match[0]), text)
        return text, named, loose

    def _means(self, place: re.Match[str], mentioned: list[str], text: str) -> bool:
        """Whether a place is named, and not only a word of what other sensors measure."""
        around = [
            self._measured[match[0].casefold()]
            for pattern in self._others
            for match in pattern.finditer(text)
            if match.start() <= place.start() and place.end() <= match.end()
            if match[0].casefold() in self._measured
        ]
        return all(sensors & set(mentioned) for sensors in around)


def _whole(name: str) -> re.Pattern[str]:
    """A pattern for a whole name: "a/t1" is not named by "a/t10"; a full stop or colon may follow.

    A name without letters ("35") is one in quotes or before a part ("[35] …", "[35 to tank/level] …") only:
    elsewhere it is a number, or half of 21:35.
    """
    if not re.search(r"[^\W\d]", name):
        said = re.escape(name)
        return re.compile(rf"(?<=['\"`]){said}(?=['\"`])|(?<=\[){said}(?= to |\])|(?<= to ){said}(?=\])")
    return re.compile(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-]|[.:]\w)")


def _loosely(place: str) -> str | None:
    """A pattern for part of a name as people write it: "bench-3" also as "Bench 3"; None: too short."""
    pieces = re.findall(r"[^\W\d_]+|\d+|[/:.]", place)
    if not any(len(piece) > 1 and piece.isalpha() for piece in pieces) and not re.search(
        r"[^\W\d_]\W?\d", place
    ):
        return None
    body = ""
    for index, piece in enumerate(pieces):
        joined = index and piece not in "/:." and pieces[index - 1] not in "/:."
        body += (r"[-_ ]?" if joined else "") + re.escape(piece)
    return rf"(?<![\w/.-]){body}(?![\w/-]|[.:]\w)"


def _without_digits(text: str) -> str:
    """Words that stay readable for the phrases, with nothing left that could be a number or a name."""
    return MASK if re.search(r"[\d/_]", text) else text
