"""What the readings of one sensor in one window amount to. Pure functions over (time, value) lists.

Choices, all visible in the text the model gets: readings are rounded to the sensor's decimals first, so that
the text always agrees with the limits; the mean is the plain mean of the readings, not weighted by time; a
trend is claimed only when it stands out from the scatter; a span out of limits runs from the first reading
out to the first reading back in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import fsum, sqrt
from typing import Literal

from .config import SensorSpec
from .window import Excursion, SensorStats

# A slope is a trend when it explains this share of the variance and is this many standard errors from zero.
TREND_MIN_R2 = 0.25
TREND_MIN_T = 3.0
TREND_MIN_READINGS = 3


@dataclass(frozen=True)
class Reading:
    time_s: float  # Unix time
    value: float


def sensor_stats(
    spec: SensorSpec,
    readings: Sequence[Reading],
    *,
    start_s: float,
    end_s: float,
    before: Reading | None = None,
) -> SensorStats:
    """One sensor's line of the window [start_s, end_s). `readings` in order of time; `before`: the last one
    earlier.
    """
    if spec.on_change and before is not None:
        readings = [Reading(start_s, before.value), *readings]
    rounded = [Reading(r.time_s, round(r.value, spec.decimals) + 0.0) for r in readings]
    empty = SensorStats(
        spec.name, spec.quantity, spec.unit, spec.decimals, len(rounded), low=spec.low, high=spec.high
    )
    if not rounded:
        return empty  # the text says: silent all window
    values = [reading.value for reading in rounded]
    return replace(
        empty,
        minimum=min(values),
        maximum=max(values),
        mean=fsum(values) / len(values),
        last=values[-1],
        trend_per_hour=trend_per_hour(rounded),
        excursions=excursions(rounded, spec.low, spec.high, spec.merge_gap_s),
        silent_since_s=None
        if spec.on_change
        else silent_since(rounded[-1].time_s, end_s, spec.max_silence_s),
    )


def trend_per_hour(readings: Sequence[Reading]) -> float | None:
    """Least-squares slope per hour; 0.0 when it is lost in the scatter; None when there is too little to
    tell.
    """
    count = len(readings)
    if count < TREND_MIN_READINGS or readings[-1].time_s <= readings[0].time_s:
        return None
    hours = [(reading.time_s - readings[0].time_s) / 3600 for reading in readings]
    mean_h, mean_v = fsum(hours) / count, fsum(r.value for r in readings) / count
    spread_h = fsum((h - mean_h) ** 2 for h in hours)
    spread_v = fsum((r.value - mean_v) ** 2 for r in readings)
    product = fsum((h - mean_h) * (r.value - mean_v) for h, r in zip(hours, readings, strict=True))
    if spread_h == 0 or spread_v == 0:
        return 0.0
    slope = product / spread_h
    explained = slope * product  # <= spread_v, by Cauchy-Schwarz
    residual = max(spread_v - explained, 0.0)
    error = sqrt(residual / (count - 2) / spread_h)
    clear = explained >= TREND_MIN_R2 * spread_v and abs(slope) >= TREND_MIN_T * error
    return slope if clear else 0.0


def excursions(
    readings: Sequence[Reading], low: float | None, high: float | None, merge_gap_s: float
) -> tuple[Excursion, ...]:
    """Time spent beyond the limits, above first. A value on the limit is within it.

    Spans of one kind count as one when the sensor was back within the limit for less than `merge_gap_s`.
    """
    found = []
    if high is not None:
        found.append(_excursion("above", high, readings, [r.value > high for r in readings], merge_gap_s))
    if low is not None:
        found.append(_excursion("below", low, readings, [r.value < low for r in readings], merge_gap_s))
    return tuple(excursion for excursion in found if excursion is not None)


def _excursion(
    kind: Literal["above", "below"],
    limit: float,
    readings: Sequence[Reading],
    out: list[bool],
    merge_gap_s: float,
) -> Excursion | None:
    spans: list[tuple[float, float | None]] = []  # first reading out, first reading back in (None: still out)
    for index, reading in enumerate(readings):
        if out[index] and (index == 0 or not out[index - 1]):
            previous_end = spans[-1][1] if spans else None
            if previous_end is not None and reading.time_s - previous_end < merge_gap_s:
                spans[-1] = (spans[-1][0], None)
            else:
                spans.append((reading.time_s, None))
        elif not out[index] and index and out[index - 1]:
            spans[-1] = (spans[-1][0], reading.time_s)
    if not spans:
        return None
    beyond = [reading.value for reading, is_out in zip(readings, out, strict=True) if is_out]
    worst = max(beyond) if kind == "above" else min(beyond)
    return Excursion(kind, limit, worst, spans[0][0], spans[-1][1], len(spans))


def silent_since(last_s: float, end_s: float, max_silence_s: float | None) -> float | None:
    """Time of the last reading when that is more than `max_silence_s` before the window's end."""
    return last_s if max_silence_s is not None and end_s - last_s > max_silence_s else None
