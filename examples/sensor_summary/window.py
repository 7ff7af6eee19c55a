"""What is known of one window of sensor readings, and its one text form for the model.

Every number the model may use stands in that text. Nothing here computes statistics (`statistics.py` does) or
talks to a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Literal

DAY_S = 86_400


@dataclass(frozen=True)
class Excursion:
    """All the time a sensor spent beyond one of its limits in the window."""

    kind: Literal["above", "below"]
    limit: float
    worst: float  # the value farthest out
    first_s: float  # Unix time of the first reading out
    last_s: float | None  # Unix time of the end of the last span; None: still out at the last reading
    times: int = 1  # separate spans


@dataclass(frozen=True)
class SensorStats:
    """One sensor over the window. `minimum` to `trend_per_hour` are None when there were no readings."""

    name: str  # "bench-3/air_temperature"
    quantity: str  # "air temperature"
    unit: str  # "°C"; "" for none
    decimals: int  # digits after the point in the text form
    count: int
    minimum: float | None = None
    maximum: float | None = None
    mean: float | None = None
    last: float | None = None
    trend_per_hour: float | None = None  # least-squares slope; 0.0: steady
    low: float | None = None  # limits
    high: float | None = None
    excursions: tuple[Excursion, ...] = ()  # at most one of each kind
    silent_since_s: float | None = None  # Unix time of the last reading, when that is too long ago


@dataclass(frozen=True)
class Window:
    """All sensors of one site from start to end."""

    site: str
    start_s: float  # Unix time
    end_s: float
    sensors: tuple[SensorStats, ...]
    zone: tzinfo | None = None  # of the times in the text; None: the machine's


def clock(window: Window, time_s: float) -> str:
    """A time as the text shows it: "10:40", or "03-14 10:40" when the window is a day or longer."""
    moment = datetime.fromtimestamp(time_s, window.zone)
    long = window.end_s - window.start_s >= DAY_S
    return moment.strftime("%m-%d %H:%M" if long else "%H:%M")


def number(sensor: SensorStats, value: float) -> str:
    """A value as the text shows it, with the sensor's decimals; never "-0.0"."""
    text = f"{value:.{sensor.decimals}f}"
    return text.lstrip("-") if not text.strip("-0.") else text


def render_window(window: Window) -> str:
    """The user message: a head line, then one line for each sensor.

    Names stand in quotes, as they will in the answer: a tokenizer cuts a word after a space differently, and
    a small model copies tokens, not letters.
    """
    head = f"Site '{window.site}', {clock(window, window.start_s)} to {clock(window, window.end_s)}, " + (
        f"{len(window.sensors)} sensors:"
    )
    return "\n".join([head, *(render_sensor(window, sensor) for sensor in window.sensors)])


def render_sensor(window: Window, sensor: SensorStats) -> str:
    """One line: what was measured, its statistics, its limits, and what was wrong."""
    unit = f", {sensor.unit}" if sensor.unit else ""
    parts = [f"- '{sensor.name}' ({sensor.quantity}{unit}): {sensor.count} readings"]
    if sensor.count:
        for word, value in (
            ("min", sensor.minimum),
            ("max", sensor.maximum),
            ("mean", sensor.mean),
            ("last", sensor.last),
        ):
            if value is not None:
                parts.append(f"{word} {number(sensor, value)}")
        if sensor.trend_per_hour is not None:
            parts.append(render_trend(sensor))
    if sensor.low is not None and sensor.high is not None:
        parts.append(f"limits {number(sensor, sensor.low)} to {number(sensor, sensor.high)}")
    elif sensor.high is not None:
        parts.append(f"limit at most {number(sensor, sensor.high)}")
    elif sensor.low is not None:
        parts.append(f"limit at least {number(sensor, sensor.low)}")
    for excursion in sensor.excursions:
        parts.append(render_excursion(window, sensor, excursion))
    if sensor.silent_since_s is not None:
        parts.append(f"SILENT since {clock(window, sensor.silent_since_s)}")
    elif not sensor.count:
        parts.append("SILENT all window")
    return ", ".join(parts)


def render_trend(sensor: SensorStats) -> str:
    """ "rising 1.2/h", "falling 0.4/h" or "steady" (a slope that rounds to zero)."""
    slope = sensor.trend_per_hour or 0.0
    size = number(sensor, abs(slope))
    if float(size) == 0.0:
        return "steady"
    return f"{'rising' if slope > 0 else 'falling'} {size}/h"


def render_excursion(window: Window, sensor: SensorStats, excursion: Excursion) -> str:
    """ "ABOVE 10:40 to 11:20 worst 37.9", "BELOW since 10:40 worst -2.1", with "in 3 spans" if several."""
    first = clock(window, excursion.first_s)
    span = f"since {first}" if excursion.last_s is None else f"{first} to {clock(window, excursion.last_s)}"
    several = f" in {excursion.times} spans" if excursion.times > 1 else ""
    return f"{excursion.kind.upper()} {span}{several} worst {number(sensor, excursion.worst)}"
