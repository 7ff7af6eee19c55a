"""Is a summary true? Holds each number, sensor name and anomaly of a summary against the window it is about.

The rule: no number or sensor name is published that is not in the data. A number in a sentence that names
sensors must belong to one of those sensors (or to the window); elsewhere it must stand somewhere in the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .prompt import Summary
from .window import Window, clock, render_sensor

# A clock time or date is one token; so is a signed decimal. A minus between digits is a range, not a sign.
_NUMBER = re.compile(r"\d\d-\d\d \d\d:\d\d|\d{1,2}:\d\d|(?<![\w.])-?\d+(?:[.,]\d+)?")
# What looks like a sensor's name: words joined by / or _, or with digits inside.
_NAME = re.compile(r"[A-Za-z0-9][\w.:-]*(?:[/_][\w.:-]*\w)+")
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=\S)")


def untrue(window: Window, summary: Summary) -> list[str]:
    """What in `summary` the window does not bear out, in words for a log; empty: all of it is true."""
    facts = _Facts(window)
    found: list[str] = []
    found += facts.check_anomalies(summary)
    for text in (summary.title, *sentences(summary.summary), *summary.actions):
        found += facts.check_text(text, named=[])
    for anomaly in summary.anomalies:
        for text in sentences(anomaly.detail):
            found += facts.check_text(text, named=[anomaly.sensor])
    if summary.severity != expected_severity(window):
        found.append(f"severity {summary.severity}, expected {expected_severity(window)}")
    return found


def expected_anomalies(window: Window) -> set[tuple[str, str]]:
    """(sensor name, kind) of everything that was wrong in the window."""
    wrong: set[tuple[str, str]] = set()
    for sensor in window.sensors:
        wrong |= {(sensor.name, excursion.kind) for excursion in sensor.excursions}
        if sensor.silent_since_s is not None or not sensor.count:
            wrong.add((sensor.name, "silent"))
    return wrong


def expected_severity(window: Window) -> int:
    """2: a limit is still broken at the end; 1: anything else was wrong; 0: all is normal."""
    if any(e.last_s is None for sensor in window.sensors for e in sensor.excursions):
        return 2
    return 1 if expected_anomalies(window) else 0


def sentences(text: str) -> list[str]:
    """`text` cut after each full stop, question mark or semicolon that white space follows."""
    return [part for part in _SENTENCE.split(text) if part.strip()]


def numbers(text: str) -> set[str]:
    """The numbers and times in `text`, as written but with a decimal point."""
    return {match.replace(",", ".") for match in _NUMBER.findall(text)}


class _Facts:
    """The window's names and numbers, by sensor."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.by_sensor: dict[str, set[str]] = {}
        for sensor in window.sensors:
            # The name's own digits are not facts about values.
            line = render_sensor(window, sensor).replace(f"- {sensor.name} ", "", 1)
            self.by_sensor[sensor.name] = numbers(line)
        self.common = {
            str(len(window.sensors)),
            str(len(expected_anomalies(window))),
            *numbers(f"{clock(window, window.start_s)} {clock(window, window.end_s)}"),
        }

    def check_anomalies(self, summary: Summary) -> Iterable[str]:
        expected = expected_anomalies(self.window)
        named = {(anomaly.sensor, anomaly.kind) for anomaly in summary.anomalies}
        for sensor, kind in sorted(named - expected):
            yield f"anomaly {sensor} {kind} is not in the data"
        for sensor, kind in sorted(expected - named):
            yield f"anomaly {sensor} {kind} is missing"

    def check_text(self, text: str, named: list[str]) -> Iterable[str]:
        rest = text.replace(self.window.site, " ")
        for name in sorted(self.by_sensor, key=len, reverse=True):
            # Whole names only: "a/t1" is not named by "a/t10".
            pattern = re.compile(rf"(?<![\w/.:-]){re.escape(name)}(?![\w/:-])")
            rest, count = pattern.subn(" ", rest)
            if count:
                named = [*named, name]
        for quantity in {sensor.quantity for sensor in self.window.sensors}:
            rest = rest.replace(quantity, " ")
        for unit in {sensor.unit for sensor in self.window.sensors if "/" in sensor.unit}:
            rest = rest.replace(unit, " ")
        for name in _NAME.findall(rest):
            if not _NUMBER.fullmatch(name):
                yield f"{name!r} is no sensor in the data"
                rest = rest.replace(name, " ")
        known = [self.by_sensor[name] for name in named if name in self.by_sensor]
        allowed = self.common.union(*(known or self.by_sensor.values()))
        for value in sorted(numbers(rest) - allowed):
            yield f"{value} is not in the data" + (f" of {', '.join(named)}" if named else "")
