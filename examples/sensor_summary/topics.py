"""MQTT topic filters and the names of sensors made from topics. Knows nothing of payloads or connections."""

from __future__ import annotations

import re

MAX_NAME = 64
_PLACE = re.compile(r"\{([^{}]*)\}")
_NOT_IN_NAMES = re.compile(r"[^\w./:-]+")


def filter_problem(topic_filter: str) -> str | None:
    """What is wrong with an MQTT topic filter; None: nothing."""
    if not topic_filter:
        return "a topic filter must not be empty"
    levels = topic_filter.split("/")
    for index, level in enumerate(levels):
        if "#" in level and (level != "#" or index != len(levels) - 1):
            return f"{topic_filter!r}: '#' must be the whole last level"
        if "+" in level and level != "+":
            return f"{topic_filter!r}: '+' must be a whole level"
    return None


def has_wildcard(topic_filter: str) -> bool:
    return any(level in ("+", "#") for level in topic_filter.split("/"))


def matches(topic_filter: str, topic: str) -> bool:
    """Whether the filter selects the topic, as MQTT 5 §4.7 has it ("#" also selects its parent; not
    $-topics).
    """
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if levels[0].startswith("$") and wanted[0] in ("+", "#"):
        return False
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index >= len(levels) or level not in ("+", levels[index]):
            return False
    return len(wanted) == len(levels)


def wild_levels(topic_filter: str, topic: str) -> list[str]:
    """The levels of `topic` that the filter's wildcards stand for."""
    levels = topic.split("/")
    found: list[str] = []
    for index, level in enumerate(topic_filter.split("/")):
        if level == "#":
            return found + levels[index:]
        if level == "+":
            found.append(levels[index])
    return found


def template_problem(template: str) -> str | None:
    """What is wrong with a name template; None: nothing."""
    for place in _PLACE.findall(template):
        if place not in ("field", "device") and not re.fullmatch(r"-?\d+", place):
            return f"{{{place}}} in {template!r}: expected {{field}}, {{device}} or a level such as {{1}}"
    return None


def fill(template: str, topic: str, *, device: str, field: str) -> str:
    """A sensor's name: `{1}` is a topic level counted from 0, `{-1}` the last, `{device}`, `{field}` the
    payload's.
    """
    levels = topic.split("/")

    def put(match: re.Match[str]) -> str:
        place = match[1]
        if place == "device":
            return device
        if place == "field":
            return field
        index = int(place)
        return levels[index] if -len(levels) <= index < len(levels) else ""

    return clean_name(_PLACE.sub(put, template))


def clean_name(name: str) -> str:
    """A name that cannot be mistaken for anything else in the model's text, such as a number or the end of a
    name.

    Letters, digits and `_ . / : -` only; a name without a letter gets the word "sensor" before it.
    """
    clean = _NOT_IN_NAMES.sub("_", name).strip("_/.:-")[:MAX_NAME].rstrip("_/.:-")
    return clean if any(c.isalpha() for c in clean) else f"sensor-{clean}".rstrip("-")
