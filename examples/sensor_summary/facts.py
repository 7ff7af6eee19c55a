"""Is a summary true? Holds each number, sensor name, claim and anomaly of a summary against the window it is
about.

The rule: no number or sensor name is published that is not in the data. A number in a sentence that names
sensors must belong to one of those sensors (or to the window); elsewhere it must stand somewhere in the data.
Counts, durations, units and words such as "mean" before a number are held to what they say;
docs/sensor-summary.md lists what is checked, what is refused although it may be true, and what can still
pass.

    text -> plain form -> names out (they say which sensors it is about) -> tokens -> each against the facts
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal

from .claims import false_claims, is_out, is_silent
from .mentions import Mentions
from .numerals import Token, canonical_unit, plain_form, tokens
from .prompt import Summary
from .window import DAY_S, SensorStats, Window, clock, number

_SENTENCE = re.compile(r"(?<=[.!?;])[\"')*]*\s+(?=\S)|\n+")
_LIST_MARK = re.compile(r"^\s*(?:\(?\d{1,2}[.)](?=\s|$)|[-*•])\s*")
# Words with letters and digits, or with a slash, that are ordinary language and name no sensor.
_WORDS = frozenset(
    "co2 o2 o3 n2 no2 so2 h2 h2s h2o ch4 nh3 pm1 pm2.5 pm10 "
    "and/or either/or on/off open/closed open/close "
    "min/max minimum/maximum max/min high/low low/high up/down in/out yes/no heating/cooling "
    "cooling/heating n/a "
    "input/output day/night indoor/outdoor inlet/outlet power/connection connection/power battery/connection "
    "temperature/humidity inspection/maintenance check/replace replace/recharge repair/replace".split()
)
_REFERS_BACK = re.compile(r"^\W*(?:it|its|this|the (?:sensor|value|reading|device|level))\b", re.IGNORECASE)


def untrue(window: Window, summary: Summary, *, parts: Sequence[Window] = ()) -> list[str]:
    """What in `summary` the window does not bear out, in words for a log; empty: all of it is true.

    `parts`: the groups of sensors that the summary was put together from; its texts may count those.
    """
    facts = _Facts(window, parts)
    found: list[str] = []
    found += facts.check_anomalies(summary)
    for text in (summary.title, summary.summary):
        found += facts.check_texts(text)
    for action in summary.actions:
        found += facts.check_texts(action, claims=False)
    for anomaly in summary.anomalies:
        found += facts.check_texts(anomaly.detail, about=anomaly.sensor)
    if summary.severity != expected_severity(window):
        found.append(f"severity {summary.severity}, expected {expected_severity(window)}")
    return list(dict.fromkeys(found))


def expected_anomalies(window: Window) -> set[tuple[str, str]]:
    """(sensor name, kind) of everything that was wrong in the window."""
    wrong: set[tuple[str, str]] = set()
    for sensor in window.sensors:
        wrong |= {(sensor.name, excursion.kind) for excursion in sensor.excursions}
        if is_silent(sensor):
            wrong.add((sensor.name, "silent"))
    return wrong


def expected_severity(window: Window) -> int:
    """2: a limit is still broken at the end; 1: anything else was wrong; 0: all is normal."""
    if any(e.last_s is None for sensor in window.sensors for e in sensor.excursions):
        return 2
    return 1 if expected_anomalies(window) else 0


def sentences(text: str) -> list[str]:
    """`text` cut at line ends, and after full stops, question marks and semicolons before white space."""
    return [part for part in _SENTENCE.split(text) if part.strip()]


class _Facts:
    """The window's names, numbers and times, and the texts held against them."""

    def __init__(self, window: Window, parts: Sequence[Window]) -> None:
        self.window = window
        self.sensors = {sensor.name: _SensorFacts(window, sensor) for sensor in window.sensors}
        self.units = {sensor.unit for sensor in window.sensors if sensor.unit}
        self.ends = _times(window, (window.start_s, window.end_s))
        moments = self.ends.union(*(facts.times for facts in self.sensors.values()))
        self.dates = sorted({moment.split(" ")[0] for moment in moments if " " in moment})
        self.counted = [window, *parts]
        # "All normal" may be said of one part.
        self.calmest = min(self.counted, key=lambda part: len(expected_anomalies(part))).sensors
        self.mentions = Mentions(window)

    def check_anomalies(self, summary: Summary) -> Iterator[str]:
        expected = expected_anomalies(self.window)
        given: list[tuple[str, str]] = [(anomaly.sensor, anomaly.kind) for anomaly in summary.anomalies]
        for name, kind in sorted(set(given) - expected):
            yield f"anomaly {name} {kind} is not in the data"
        for name, kind in sorted(expected - set(given)):
            yield f"anomaly {name} {kind} is missing"
        for name, kind in sorted({pair for pair in given if given.count(pair) > 1}):
            yield f"anomaly {name} {kind} is there twice"

    def check_texts(self, text: str, *, about: str | None = None, claims: bool = True) -> Iterator[str]:
        """What is untrue in the sentences of a text. `about`: the sensor it belongs to.

        A sentence that begins with "it" goes on about the sensors of the one before.
        """
        before: list[str] = []
        plain = plain_form(text)
        yield from (f"{word!r} is no sensor in the data" for word in self.mentions.unknown(plain))
        for sentence in sentences(plain):
            masked, named, loose = self.mentions.take(_LIST_MARK.sub("", sentence))
            scope = list(dict.fromkeys([*([about] if about in self.sensors else []), *named, *loose]))
            if not scope and _REFERS_BACK.match(sentence):
                scope = before
            before = scope
            yield from self._check_sentence(masked, scope)
            if claims:
                stats = [self.sensors[name].sensor for name in scope] or list(self.window.sensors)
                claimed = false_claims(masked, stats, scoped=bool(scope), all_sensors=self.calmest)
                yield from _about(scope, claimed)

    def _check_sentence(self, text: str, scope: list[str]) -> Iterator[str]:
        about = [self.sensors[name] for name in scope] or list(self.sensors.values())
        if self.dates:  # a date of the data, standing alone: "03-14"
            text = re.sub(rf"(?<![\d\x02-])({'|'.join(self.dates)})(?! ?[\d:])(?!-)", "\x02\\1", text)
        for token in tokens(text, self.units):
            if token.kind in ("name", "strange"):
                if token.text.casefold() not in _WORDS and canonical_unit(token.text) not in self._units():
                    what = "no sensor in the data" if token.kind == "name" else "not in the data"
                    yield f"{token.text!r} is {what}"
            elif token.kind in ("time", "date"):
                if not self._time_holds(token, text, about):
                    yield from _about(scope, [f"{token.text} is not in the data"])
            elif token.kind in ("number", "word_number") and not self._number_holds(token, text, about):
                written = text[token.start : token.end].strip()
                yield from _about(scope, [f"{written} is not in the data"])

    def _units(self) -> set[str]:
        return {canonical_unit(unit) for unit in self.units}

    def _time_holds(self, token: Token, text: str, about: Sequence[_SensorFacts]) -> bool:
        since = re.search(r"\bsince(?: about| around)?\W*$", text[: token.start], re.IGNORECASE)
        times = set(self.ends).union(*(facts.since if since else facts.times for facts in about))
        if token.text in times:
            return True
        # In a long window a time has its date before it; either may stand alone.
        return any(token.text in time.split(" ") for time in times)

    def _number_holds(self, token: Token, text: str, about: Sequence[_SensorFacts]) -> bool:
        before, after = text[: token.start], text[token.end :]
        if not token.unit and not token.per:
            noun = _counted_noun(before, after)
            if noun is not None:
                return bool(token.values & self._counts(noun, about, before, after))
        if token.kind == "word_number":
            if token.text.casefold() in ("one", "zero"):
                return True  # "one of them", "below zero": no count
            everything = set[Decimal]().union(
                *(self._counts(noun, about, "", "") for noun in _COUNTED.values())
            )
            return bool(token.values & everything) or any(facts.has(token.values) for facts in about)
        if token.unit and _SHARE.match(after):
            return False  # "60 % of the readings": no share is in the data
        if _is_duration(token) and token.values & self._lengths(token.unit):
            return True
        if token.per:
            return token.per == "h" and any(facts.has_slope(token.values, token.unit) for facts in about)
        role = _role(before)
        return any(facts.has(token.values, token.unit, role) for facts in about)

    def _counts(self, noun: str, about: Sequence[_SensorFacts], before: str, after: str) -> set[Decimal]:
        """What may be counted under a noun, between the texts before and after the number."""
        sensors = [facts.sensor for facts in about]
        found: set[int] = set()
        if noun == "sensor":
            for window in self.counted:
                found |= _sensor_counts(window, before, after)
        elif noun == "anomaly":
            kinds = [[kind for _, kind in expected_anomalies(window)] for window in self.counted]
            found = {len(wrong) for wrong in kinds} | {
                wrong.count(kind) for wrong in kinds for kind in _KINDS
            }
            found |= {sum(kind != "silent" for kind in wrong) for wrong in kinds}
            found.add(len(expected_anomalies(self.window) & {(s.name, k) for s in sensors for k in _KINDS}))
        elif noun == "reading":
            found = {s.count for s in sensors} | {sum(s.count for s in sensors)}
        elif noun == "span":
            times = [e.times for s in sensors for e in s.excursions]
            found = {*times, sum(times), len(times)}
        return {Decimal(value) for value in found}

    def _lengths(self, unit: str) -> set[Decimal]:
        """The window's own length, the one duration that is in the data."""
        for word, length_s in (("w", 7 * DAY_S), ("d", DAY_S), ("h", 3600), ("mi", 60), ("s", 1)):
            if unit.casefold().startswith(word):
                return {Decimal(round(self.window.end_s - self.window.start_s)) / length_s}
        return set()


class _SensorFacts:
    """One sensor's numbers by what they are, and its times."""

    def __init__(self, window: Window, sensor: SensorStats) -> None:
        self.sensor = sensor
        self.unit = canonical_unit(sensor.unit)

        def shown(*values: float | None) -> frozenset[Decimal]:
            return frozenset(Decimal(number(sensor, value)) for value in values if value is not None)

        highest = [e.worst for e in sensor.excursions if e.kind == "above"]
        lowest = [e.worst for e in sensor.excursions if e.kind == "below"]
        limits = shown(sensor.low, sensor.high, *(e.limit for e in sensor.excursions))
        size = shown(abs(sensor.trend_per_hour or 0.0))
        falls = (sensor.trend_per_hour or 0.0) < 0
        self.slopes = frozenset(size | ({-value for value in size} if falls else set())) - {Decimal(0)}
        self.roles = {
            "minimum": shown(sensor.minimum, *lowest),
            "maximum": shown(sensor.maximum, *highest),
            "mean": shown(sensor.mean),
            "last": shown(sensor.last),
            "worst": shown(*highest, *lowest),
            "limit": limits,
            "trend": self.slopes,
            "beyond a minimum": shown(sensor.minimum, *lowest) | limits,
            "beyond a maximum": shown(sensor.maximum, *highest) | limits,
        }
        self.values = frozenset[Decimal]().union(*self.roles.values())
        moments = [t for e in sensor.excursions for t in (e.first_s, e.last_s) if t is not None]
        ongoing = [e.first_s for e in sensor.excursions if e.last_s is None]
        silent = [] if sensor.silent_since_s is None else [sensor.silent_since_s]
        self.times = _times(window, [*moments, *silent])
        self.since = _times(window, [*ongoing, *silent])

    def has(self, values: frozenset[Decimal], unit: str = "", role: str | None = None) -> bool:
        """Whether a meaning is a number of this sensor, in that role, and the unit is not another's."""
        return bool(values & (self.roles[role] if role else self.values)) and self._unit_fits(unit)

    def has_slope(self, values: frozenset[Decimal], unit: str) -> bool:
        return bool(values & self.slopes) and self._unit_fits(unit)

    def _unit_fits(self, unit: str) -> bool:
        given = canonical_unit(unit)
        return not given or given == self.unit or (given == "°" and self.unit.startswith("°"))


_KINDS = ("above", "below", "silent")
# The noun after a number -> what is counted.
_COUNTED = {
    **dict.fromkeys(("sensor", "device", "probe"), "sensor"),
    **dict.fromkeys(
        ("anomaly", "anomalie", "alarm", "alert", "issue", "problem", "fault", "warning"), "anomaly"
    ),
    **dict.fromkeys(("reading", "value", "measurement", "sample", "message", "report"), "reading"),
    **dict.fromkeys(
        ("span", "time", "occasion", "excursion", "period", "episode", "interval", "event", "spike", "dip"),
        "span",
    ),
}
_NOUN = "|".join(_COUNTED)
_COUNT_AFTER = re.compile(
    r"^(?:\s+(?:out\s+)?of\s+(?:the\s+|all\s+)?\d+)?"
    r"(?:[\s-]+(?!(?:and|or|to|from|at|in|on|but|while|with|for|by|since|until|is|was|were|are|as|than|after|before)\b)"
    rf"[^\W\d_]+){{0,2}}?[\s-]+({_NOUN})s?\b",
    re.IGNORECASE,
)
_SHARE = re.compile(
    r"\s+of\s+(?:the\s+|all\s+)?(?:time|readings?|sensors?|values?|measurements?|window|day|period)\b",
    re.IGNORECASE,
)
_COUNT_BEFORE = re.compile(rf"\b({_NOUN})s?\s*[:=(]\s*$", re.IGNORECASE)
_FILL = (
    r"(?:\W|\b(?:of|was|is|were|are|at|value|values|reading|readings|level|being|a|an|the|its|recorded|measured|reached|"
    r"reaching|hit|about|around|only|as|so|stood|currently|temperature|humidity|pressure|moisture)\b)*$"
)
_ROLES = (
    ("limit", r"limits?|threshold|setpoint|allowed|permitted"),
    ("minimum", r"minimum|min|lowest|coldest"),
    ("maximum", r"maximum|max|highest|peak(?:ed|ing|s)?|hottest|warmest"),
    ("mean", r"mean|averag(?:e|ed|es|ing)|avg"),
    ("last", r"last|latest|most recent"),
    ("worst", r"worst"),
)
_ROLE_BEFORE = tuple(
    (role, re.compile(rf"(?<![\w/])(?:{words})(?![\w/]){_FILL}", re.IGNORECASE)) for role, words in _ROLES
)
_TREND_BEFORE = re.compile(r"\b(?:rising|falling)\b(?:\W|\b(?:by|about|at|a|rate|of)\b)*$", re.IGNORECASE)
_ANY_ROLE = "|".join(words for _, words in _ROLES)
_TWO_ROLES = re.compile(
    rf"\b(?:{_ANY_ROLE})\b(?:\s*,|\s+(?:and|or)|\s*&)\s+(?:the\s+)?(?:{_ANY_ROLE})\b{_FILL}", re.IGNORECASE
)
_BEYOND = re.compile(
    r"\b(?:above|over|beyond|exceed\w*|below|under|beneath|allowed)\b(?:\W+\w+){0,3}\W*$", re.IGNORECASE
)


def _counted_noun(before: str, after: str) -> str | None:
    match = _COUNT_AFTER.search(after) or _COUNT_BEFORE.search(before)
    return _COUNTED[match[1].lower()] if match else None


def _role(before: str) -> str | None:
    """What a number is said to be by the words right before it; None: nothing particular."""
    if _TREND_BEFORE.search(before):
        return "trend"
    if _TWO_ROLES.search(before):
        return None
    for role, pattern in _ROLE_BEFORE:
        match = pattern.search(before)
        if match:
            # "exceeded the maximum of 32" speaks of a limit.
            beyond = role in ("minimum", "maximum") and _BEYOND.search(before[: match.start()])
            return f"beyond a {role}" if beyond else role
    return None


def _is_duration(token: Token) -> bool:
    return bool(token.unit) and token.unit.casefold()[0] in "wdhms" and not token.per


def _times(window: Window, moments: Iterable[float]) -> frozenset[str]:
    return frozenset(clock(window, moment) for moment in moments)


def _sensor_counts(window: Window, before: str, after: str) -> set[int]:
    """How many sensors there may be said to be, by what the text around the number says of them."""
    if _OF.search(before):
        return {len(window.sensors)}
    above, below = (sum(is_out(s, kind) for s in window.sensors) for kind in ("above", "below"))
    out, silent = sum(bool(s.excursions) for s in window.sensors), sum(map(is_silent, window.sensors))
    everything, wrong = len(window.sensors), len({name for name, _ in expected_anomalies(window)})
    states = [counts for pattern, counts in (
        (_SAID_SILENT, {silent}),
        (_SAID_NORMAL, {everything - wrong, everything - out, everything - silent}),
        (_SAID_WRONG, {wrong, out, above, below, above + below}),
    ) if pattern.search(after)]  # fmt: skip
    if states:
        return set[int]().union(*states)
    words = [word for s in window.sensors for word in {s.quantity, *s.quantity.split()}]
    return {
        everything,
        wrong,
        everything - wrong,
        out,
        above,
        below,
        silent,
        *(words.count(word) for word in words),
    }


_OF = re.compile(r"\bof\s+(?:the\s+|all\s+)?$", re.IGNORECASE)
_SAID_SILENT = re.compile(r"^[^.,;]*\b(?:silent|offline|stopped|no (?:data|readings?))\b", re.IGNORECASE)
_SAID_NORMAL = re.compile(r"^[^.,;]*\b(?:normal|within|fine|ok)\b", re.IGNORECASE)
_SAID_WRONG = re.compile(
    r"^[^.,;]*\b(?:anomal\w+|out of|outside|exceed\w*|wrong|broke|above|below|violat\w+|problems?|issues?)\b",
    re.IGNORECASE,
)


def _about(scope: Sequence[str], problems: Iterable[str]) -> Iterator[str]:
    for problem in problems:
        yield problem + (f" of {', '.join(scope)}" if scope else "")
