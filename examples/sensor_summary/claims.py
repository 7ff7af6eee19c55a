"""Phrases that say something about a sensor without a number: silent, rising, above its limit, all normal.

Each phrase must be borne out by at least one of the sensors that its sentence is about. Phrases after a
negation are passed over: the check never refuses what it does not understand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from .window import SensorStats, render_trend

Holds = Callable[[SensorStats], bool]

_NEGATION = re.compile(r"\b(?:no|not|none|never|neither|nor|without|nothing|cannot)\b|n't\b", re.IGNORECASE)
_OTHERS = (
    r"other|others|rest|remaining|except\w*|apart|aside|besides|but|however|although|though|while|return\w*|back|"
    r"again|recover\w*"
)
_OTHERS_ONLY = re.compile(rf"\b(?:{_OTHERS})\b", re.IGNORECASE)
_CONTRAST = re.compile(
    rf"\b(?:{_OTHERS}|until|till|before|after|then|later|outside|once|otherwise|also|above|below|silent|exceed\w*)\b",
    re.IGNORECASE,
)
_KEPT = re.compile(r"\b(?:stay\w*|remain\w*|kept|keep\w*|well|always|within)\b", re.IGNORECASE)
_OWN = (
    r"(?:its|the|their|this|that|an?|own|allowed|permitted|set|configured|safe|defined|operating|specified)"
)


def is_silent(sensor: SensorStats) -> bool:
    return sensor.silent_since_s is not None or not sensor.count


def is_out(sensor: SensorStats, kind: str, *, still: bool = False) -> bool:
    return any(e.kind == kind and (e.last_s is None or not still) for e in sensor.excursions)


def has_returned(sensor: SensorStats) -> bool:
    return any(e.last_s is not None for e in sensor.excursions)


def has_trend(sensor: SensorStats, word: str) -> bool:
    return bool(sensor.count) and sensor.trend_per_hour is not None and render_trend(sensor).startswith(word)


# (what is claimed, phrase, does the sensor bear it out)
_PHRASES: tuple[tuple[str, re.Pattern[str], Holds], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE), holds)
    for name, pattern, holds in (
        (
            "silent",
            r"\bsilent\b|\bsilence\b|\boffline\b|\bstopped (?:reporting|sending|responding|transmitting)\b"
            r"|\b(?:sent|sends|sending|provided|delivered|reported) no\b"
            r"|\bnot (?:reporting|responding|reported)\b|\bno (?:data|signal|reports?)\b"
            r"|\bno readings?(?! (?:were|was|are|is|above|below|beyond|out|exceed\w*))\b",
            is_silent,
        ),
        (
            "rising",
            r"\b(?:rising|increasing|climbing)\b(?! (?:above|beyond|over|to|past))",
            lambda s: has_trend(s, "rising"),
        ),
        (
            "falling",
            r"\b(?:falling|decreasing|declining|dropping)\b"
            r"(?! (?:silent|below|beneath|under|to|out|short|within|back))",
            lambda s: has_trend(s, "falling"),
        ),
        ("steady", r"\bsteady\b", lambda s: has_trend(s, "steady")),
        (
            "still above",
            r"\bstill (?:\w+ )?(?:above|over|beyond|exceed\w*|too high)\b",
            lambda s: is_out(s, "above", still=True),
        ),
        (
            "still below",
            r"\bstill (?:\w+ )?(?:below|under|beneath|too low)\b",
            lambda s: is_out(s, "below", still=True),
        ),
        (
            "back within its limits",
            r"\b(?:recovered|(?:returned|back) (?:to normal|with?in|inside|in range))\b",
            has_returned,
        ),
    )
)
_PAST_HIGH = re.compile(
    rf"\b(?:above|over|beyond|exceed(?:s|ed|ing)?)(?: {_OWN})*(?: (?:upper|high|maximum|max))?"
    r" (?:limit|threshold)s?\b",
    re.IGNORECASE,
)
_PAST_LOW = re.compile(
    rf"\b(?:below|under|beneath)(?: {_OWN})*(?: (?:lower|low|minimum|min))? (?:limit|threshold)s?\b",
    re.IGNORECASE,
)
_NORMAL = re.compile(
    r"\bnormal(?:ly)?\b"
    r"|\bwithin (?:(?:its|the|their|all|normal|set|given|allowed|expected) )*(?:limits?|ranges?|bounds)\b",
    re.IGNORECASE,
)
_GOOD = r"(?:normal(?:ly)?|within (?:\w+ )*?(?:limits?|ranges?|bounds)|fine|ok|okay)"
# Said of everything, even where a sensor is named beside it.
_ALL_SENSORS_NORMAL = re.compile(
    rf"\b(?:(?:all|every|each)(?: of)?(?: the)?(?: \w+)? (?:sensors?|systems?)|everything)\b"
    rf"[^.;]*?\b{_GOOD}\b",
    re.IGNORECASE,
)
_ALL_NORMAL = re.compile(
    rf"\b(?:all|every|each)\b[^.;]*?\b{_GOOD}\b|:\s*normal\b|^\W*normal\b"
    r"|\bnormal (?:conditions|operations?|state|window|period|day|readings)\b",
    re.IGNORECASE,
)
_NO_TROUBLE = re.compile(
    r"\bno (?:\w+ )?(?:anomal\w+|problems?|issues?|alarms?|alerts?|faults?)"
    r"(?: (?:was|were|is|are|have|has|detected|found|occurred|to|at|on|with|in|during)\b|\W*$)",
    re.IGNORECASE,
)


def false_claims(
    text: str, about: Sequence[SensorStats], *, scoped: bool, all_sensors: Sequence[SensorStats]
) -> Iterator[str]:
    """What `text` claims of `about` that none of them bears out. `scoped`: it names them or their place."""
    for name, phrase, holds in _PHRASES:
        match = phrase.search(text)
        if match and not _negated(text, match) and not any(map(holds, about)):
            yield f"{name} is not in the data"
    for name, phrase, kind in (("above", _PAST_HIGH, "above"), ("below", _PAST_LOW, "below")):
        match = phrase.search(text)
        if match is None or _negated(text, match) or _KEPT.search(text[: match.start()]):
            continue
        # "below its limit" is good news of a sensor that has an upper limit only.
        if not any(is_out(s, kind) or (s.low if kind == "below" else s.high) is None for s in about):
            yield f"{name} its limit is not in the data"
    yield from _false_comfort(text, about, scoped, all_sensors)


def _false_comfort(
    text: str, about: Sequence[SensorStats], scoped: bool, all_sensors: Sequence[SensorStats]
) -> Iterator[str]:
    """ "Normal", "no anomalies" and the like, said of what is not."""
    wrong = [sensor for sensor in all_sensors if sensor.excursions or is_silent(sensor)]
    others = _OTHERS_ONLY.search(text)
    everything = (_ALL_SENSORS_NORMAL,) if scoped else (_ALL_SENSORS_NORMAL, _ALL_NORMAL, _NO_TROUBLE)
    if wrong and not others and any(_said(phrase, text) for phrase in everything):
        yield "all normal is not in the data"
        return
    all_wrong = scoped and all(s.excursions or is_silent(s) for s in about)
    if all_wrong and not _CONTRAST.search(text) and (_said(_NORMAL, text) or _said(_NO_TROUBLE, text)):
        yield "normal is not in the data"


def _said(phrase: re.Pattern[str], text: str) -> bool:
    match = phrase.search(text)
    return match is not None and not _negated(text, match)


def _negated(text: str, match: re.Match[str]) -> bool:
    return bool(_NEGATION.search(text[: match.start()]))
