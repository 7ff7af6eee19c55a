"""Reads the numbers, times, dates, units and number words in a sentence; knows nothing of sensors or truth.

A sentence is first put into plain form (one minus sign, no thin spaces, ASCII digits), then cut into tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

MASK = "\x01"  # stands where a sensor's name was

Kind = Literal["number", "word_number", "time", "date", "name", "word", "strange"]


@dataclass(frozen=True)
class Token:
    """One piece of a sentence.

    text: for times "HH:MM" or "MM-DD HH:MM", for dates "MM-DD" or "YYYY-MM-DD", else as written.
    values: what the number may mean ("1,013" is 1013 or 1.013).
    unit: as written, "" for none. per: "h" in "1.2 °C/h", "" for none.
    """

    kind: Kind
    text: str
    start: int
    end: int
    values: frozenset[Decimal] = frozenset()
    unit: str = ""
    per: str = ""


_MONTHS = "january february march april may june july august september october november december".split()
_MONTH = "|".join(f"{name[:3]}(?:{name[3:]})?" if name != "may" else "may" for name in _MONTHS)
_MONTH_DAY = re.compile(
    rf"\b(?:({_MONTH})\.?\s+(\d{{1,2}})(?:st|nd|rd|th)?|(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?({_MONTH}))\b(?![\d:])",
    re.IGNORECASE,
)
_SPACES = re.compile(r"[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_LETTERS = {
    "µ": "µ",
    "μ": "µ",
    "º": "°",
    "℃": "°C",
    "℉": "°F",
    "％": "%",
    "’": "'",
    "‘": "'",
    "′": "'",
    "“": '"',
    "”": '"',
}
# Digits of another kind that are part of a unit or formula when they follow a letter: m³, CO₂.
_SMALL = {**{c: str(i) for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")}, "¹": "1", "²": "2", "³": "3"}

# One unit -> how else it is written (folded).
_SPELLINGS = {
    "°c": "c, degc, deg c, degree celsius, degrees celsius, degrees c, celsius, ° c",
    "°f": "f, degf, deg f, degree fahrenheit, degrees fahrenheit, degrees f, fahrenheit, ° f",
    "°": "degree, degrees, deg",
    "%": "percent, per cent, pct, %rh, % rh, % relative humidity, percentage points",
    "lx": "lux",
    "v": "volt, volts",
    "a": "amp, amps, ampere, amperes",
    "w": "watt, watts",
    "kw": "kilowatt, kilowatts",
    "l": "liter, liters, litre, litres",
    "m": "meter, meters, metre, metres",
    "kg": "kilogram, kilograms",
}
_SAME_UNIT = {other: unit for unit, others in _SPELLINGS.items() for other in [unit, *others.split(", ")]}
_OTHER_UNITS = (
    "°C °F K % hPa kPa MPa Pa mbar bar psi V mV kV A mA W mW kW MW Wh kWh MWh VA kVA Hz kHz rpm lx klx dB "
    "dBA ppm ppb µg/m3 mg/m3 mg/l g/m3 m/s mm/s km/h mph m3/h l/min l/h l/s m3 mm cm m km l ml g kg t "
    "µS/cm mS/cm"
).split()
_DURATION = (
    "hours hour hrs hr h minutes minute mins min seconds second secs sec s days day d weeks week months "
    "month years year"
).split()

_SMALL_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_WORD_VALUES = {
    **{word: Decimal(i) for i, word in enumerate(_SMALL_WORDS)},
    **{word: Decimal(20 + 10 * i) for i, word in enumerate(_TENS)},
    **{
        f"{ten}-{word}": Decimal(20 + 10 * i + j)
        for i, ten in enumerate(_TENS)
        for j, word in enumerate(_SMALL_WORDS[1:10], 1)
    },
    "hundred": Decimal(100), "thousand": Decimal(1000), "dozen": Decimal(12), "half": Decimal("0.5"),
    "twice": Decimal(2), "thrice": Decimal(3), "couple": Decimal(2), "pair": Decimal(2),
}  # fmt: skip
_TIME_WORDS = {"noon": "12:00", "midday": "12:00", "midnight": "00:00"}

_NUMBER = r"(?:(?<![\w)%°])[+-])?\d+(?:[.,']\d+)*"
_TOKEN = re.compile(
    r"(?P<date_time>(?<!\d)\d\d-\d\d \d\d:\d\d(?!\d))"
    r"|(?P<iso>(?<!\d)\d{4}-\d\d-\d\d(?!\d))"
    r"|(?P<month_day>\x02\d\d-\d\d)"
    r"|(?P<time>(?<![\d:])\d{1,2}:\d\d(?::\d\d)?(?![\d:])(?:\s?[ap](?:m\b|\.m\.))?)"
    r"|(?P<ampm>(?<![\d.,:])\d{1,2}\s?[ap](?:m\b|\.m\.))"
    rf"|(?P<number>{_NUMBER})"
    r"|(?P<name>[^\W\d_][\w.:-]*(?:[/_][\w.:-]*\w)+"
    r"|[^\W\d_]+(?:-[^\W\d_]+)*(?:[-.]?\d[^\W_]*)+(?:-[^\W_]+)*)"
    r"|(?P<word>[^\W\d_]+(?:['-][^\W\d_]+)*)",
    re.IGNORECASE,
)


def plain_form(text: str) -> str:
    """`text` with one kind of minus, space, digit and degree sign, and without what cannot be seen."""
    text = "".join(_LETTERS.get(c, c) for c in text if unicodedata.category(c) != "Cf")
    text = re.sub(r"(?<=[^\W\d_])[₀-₉¹²³]", lambda match: _SMALL[match[0]], text)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", "", text)
    text = _SPACES.sub(" ", text)
    # A dash right before a digit is a sign, unless a digit, letter or unit stands right before it: a range.
    text = re.sub(r"(?<![\w)%°])[−‒–﹣－](?=\d)", "-", text)
    text = re.sub(r"(?<=[\w)%°])[−‒–﹣－](?=\d)", " - ", text)
    text = re.sub(r"\bminus (?=\d)", "-", text, flags=re.IGNORECASE)
    text = "".join(str(unicodedata.digit(c)) if unicodedata.category(c) == "Nd" else c for c in text)
    return _MONTH_DAY.sub(_month_day, text)


def tokens(text: str, units: Iterable[str]) -> Iterator[Token]:
    """The tokens of a text in plain form. `units`: those that the data has, beside the usual ones."""
    after_number = _after_number(tuple(sorted(set(units))))
    position, covered = 0, 0
    while match := _TOKEN.search(text, position):
        yield from _strange(text, covered, match.start())
        token = _token(text, match, after_number)
        yield token
        position = covered = max(token.end, match.end())
    yield from _strange(text, covered, len(text))


def canonical_unit(unit: str) -> str:
    """One spelling for units that mean the same."""
    folded = " ".join(unit.split()).casefold()
    # mW and MW, mV and MV are not the same.
    return _SAME_UNIT.get(folded, unit if re.match(r"[mM][A-Z]", unit) else folded)


def number_meanings(text: str) -> frozenset[Decimal]:
    """What the digits of a number may mean: "1,013.2" 1013.2; "1,013" 1013 or 1.013; "37,9" 37.9; "1.013,2"
    1013.2.
    """
    sign, digits = ("-", text[1:]) if text[0] == "-" else ("", text.lstrip("+"))
    marks = re.findall(r"[.,']", digits)
    groups = re.split(r"[.,']", digits)
    found: set[str] = set()
    thousands = len(groups) > 1 and 1 <= len(groups[0]) <= 3
    if not marks:
        found.add(digits)
    elif len(marks) == 1:
        if marks[0] != "'":
            found.add(digits.replace(",", "."))
        if marks[0] != "." and thousands and len(groups[1]) == 3:
            found.add("".join(groups))
    elif len(set(marks)) == 1 and thousands and all(len(group) == 3 for group in groups[1:]):
        found.add("".join(groups))
    elif (
        len(set(marks[:-1])) == 1
        and marks[-1] not in (marks[0], "'")
        and thousands
        and all(len(group) == 3 for group in groups[1:-1])
    ):
        found.add("".join(groups[:-1]) + "." + groups[-1])
    return frozenset(Decimal(sign + number) for number in found)


def clock_text(hour: int, minute: int) -> str:
    return f"{0 if hour == 24 and minute == 0 else hour:02d}:{minute:02d}"


def _month_day(match: re.Match[str]) -> str:
    name, day = (match[1], match[2]) if match[1] else (match[4], match[3])
    month = next(i for i, month in enumerate(_MONTHS, 1) if month.startswith(name[:3].lower()))
    return f"\x02{month:02d}-{int(day):02d}"


def _after_number(units: tuple[str, ...]) -> re.Pattern[str]:
    """What may follow a number: a unit or a duration, then "per hour" and the like."""
    spelled = sorted({*units, *_OTHER_UNITS, *_SAME_UNIT} - {""}, key=len, reverse=True)
    # A single letter after a space is a unit only if the data has it: "5 A" but not "5 a day".
    glued = "|".join(re.escape(unit) for unit in spelled)
    spaced = "|".join(
        re.escape(unit) for unit in spelled if len(unit) > 1 or not unit.isalpha() or unit in units
    )
    time = "|".join(_DURATION)
    return re.compile(
        rf"(?:(?P<unit>{glued})|\s(?P<spaced>{spaced})|[\s-]?(?P<duration>{time}))?(?![^\W\d_])"
        rf"(?:\s?/\s?(?P<slash>{time})(?!\w)|\s(?:per|an|a|every|each)\s(?P<per>{time})(?!\w)|\s(?P<hourly>hourly)(?!\w))?",
        re.IGNORECASE,
    )


def _token(text: str, match: re.Match[str], after_number: re.Pattern[str]) -> Token:
    start, end, written = match.start(), match.end(), match[0]
    match match.lastgroup:
        case "date_time":
            return Token("time", written, start, end)
        case "iso":
            return Token("date", written, start, end)
        case "month_day":
            return Token("date", written[1:], start, end)
        case "time" | "ampm":
            time = _time(written)
            return Token("time", time, start, end) if time else Token("strange", written, start, end)
        case "name":
            return Token("name", written, start, end)
        case "word":
            folded = written.casefold()
            if folded in _TIME_WORDS:
                return Token("time", _TIME_WORDS[folded], start, end)
            if folded in _WORD_VALUES:
                return Token("word_number", written, start, end, frozenset([_WORD_VALUES[folded]]))
            return Token("word", written, start, end)
    return _number_token(text, written, start, end, after_number)


def _number_token(text: str, written: str, start: int, end: int, after_number: re.Pattern[str]) -> Token:
    values = number_meanings(written)
    follow = after_number.match(text, end)
    unit = per = ""
    if follow is not None:
        unit = follow["unit"] or follow["spaced"] or follow["duration"] or ""
        per = follow["slash"] or follow["per"] or ("h" if follow["hourly"] else "")
        end = follow.end()
    ordinal = re.compile(r"(?:st|nd|rd|th)\b").match(text, end)
    if ordinal and not unit:
        return Token("word_number", written + ordinal[0], start, ordinal.end(), values)
    glued = re.compile(r"[^\W\d_][\w/.:-]*\w|[^\W\d_]|_\w+|/[^\W\d_]\w*").match(text, end)
    if glued or not values:
        end = glued.end() if glued else end
        return Token("strange", text[start:end], start, end)
    return Token("number", written, start, end, values, unit, _SHORT_TIME.get(per.casefold(), per.casefold()))


_SHORT_TIME = {word: "h" for word in ("hour", "hours", "hr", "hrs", "h")}


def _time(written: str) -> str | None:
    """ "HH:MM" on the 24-hour clock; None: there is no such time, or it has seconds other than zero."""
    parts = re.match(r"(\d{1,2})(?::(\d\d))?(?::(\d\d))?\s?(?:([ap])\.?m)?", written, re.IGNORECASE)
    assert parts is not None, "_TOKEN matched it"
    hour, minute, second = int(parts[1]), int(parts[2] or 0), int(parts[3] or 0)
    if parts[4]:
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + (12 if parts[4].lower() == "p" else 0)
    if second or minute > 59 or hour > 24 or (hour == 24 and minute):
        return None
    return clock_text(hour, minute)


def _strange(text: str, start: int, end: int) -> Iterator[Token]:
    """Numerals that are no plain digits, such as ½, ³ and Ⅳ."""
    for index in range(start, end):
        if unicodedata.category(text[index]) in ("No", "Nl"):
            yield Token("strange", text[index], index, index + 1)
