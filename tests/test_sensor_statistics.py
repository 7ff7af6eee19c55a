"""Statistics of a window against naive references, and the schedule of windows."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.examples.sensor_summary.app import Timer
from gemma_edge.examples.sensor_summary.config import (
    Config,
    Schedule,
    SensorSpec,
    Source,
    SummaryConfig,
)
from gemma_edge.examples.sensor_summary.schedule import next_end
from gemma_edge.examples.sensor_summary.statistics import (
    Reading,
    excursions,
    sensor_stats,
    silent_since,
    trend_per_hour,
)
from gemma_edge.examples.sensor_summary.window import Excursion

HOUR_S = 3600.0
MADRID = ZoneInfo("Europe/Madrid")
steps = st.lists(st.tuples(st.integers(1, 1000), st.floats(-1e6, 1e6)), min_size=1, max_size=60)
series = steps.map(
    lambda steps: [Reading(sum(s for s, _ in steps[: i + 1]), v) for i, (_, v) in enumerate(steps)]
)


@given(series, st.integers(0, 3))
@settings(deadline=None)
def test_min_max_mean_last(readings: list[Reading], decimals: int) -> None:
    stats = sensor_stats(SensorSpec("s", "q", decimals=decimals), readings, start_s=0, end_s=1e5)
    values = [round(r.value, decimals) for r in readings]
    assert (stats.count, stats.minimum, stats.maximum, stats.last) == (
        len(values),
        min(values),
        max(values),
        values[-1],
    )
    assert stats.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-9)
    assert stats.minimum <= stats.mean + 1e-9 and stats.mean <= stats.maximum + 1e-9  # type: ignore[operator]


def naive_excursion(readings: list[Reading], limit: float, gap_s: float, kind: str) -> Excursion | None:
    """Each reading out holds until the next one; what touches, or nearly so, is one span."""
    sign = 1 if kind == "above" else -1
    is_out = [sign * (r.value - limit) > 0 for r in readings]
    if not any(is_out):
        return None
    spans: list[list[float | None]] = []
    for i, out in enumerate(is_out):
        if out:
            end = readings[i + 1].time_s if i + 1 < len(readings) else None
            back_s = readings[i].time_s - (spans[-1][1] or 0.0) if spans else 0.0
            if spans and (back_s == 0 or back_s < gap_s):
                spans[-1][1] = end
            else:
                spans.append([readings[i].time_s, end])
    worst = max((r.value for r, out in zip(readings, is_out, strict=True) if out), key=lambda v: sign * v)
    return Excursion(kind, limit, worst, spans[0][0], spans[-1][1], len(spans))  # type: ignore[arg-type]


@given(series, st.floats(-1e6, 1e6), st.sampled_from([0.0, 50.0, 900.0, 1e5]))
@settings(deadline=None)
def test_out_of_limit_spans(readings: list[Reading], limit: float, gap_s: float) -> None:
    above = naive_excursion(readings, limit, gap_s, "above")
    below = naive_excursion(readings, limit - 10, gap_s, "below")
    assert excursions(readings, limit - 10, limit, gap_s) == tuple(e for e in (above, below) if e)


def at(*minutes_and_values: tuple[float, float]) -> list[Reading]:
    return [Reading(minute * 60, value) for minute, value in minutes_and_values]


def test_a_span_ends_at_the_first_reading_back_in() -> None:
    readings = at((0, 1), (5, 11), (10, 12), (15, 9), (20, 8))
    assert excursions(readings, None, 10, 0) == (Excursion("above", 10, 12, 300, 900),)
    assert excursions(readings[:3], None, 10, 0) == (Excursion("above", 10, 12, 300, None),)
    assert excursions(at((0, 10)), 10, 10.5, 0) == (), "a value on the limit is within it"


def test_short_returns_do_not_end_a_span() -> None:
    readings = at((0, 11), (5, 9), (10, 12), (40, 9), (60, 13), (65, 9))
    (found,) = excursions(readings, None, 10, 15 * 60)
    assert (found.times, found.first_s, found.last_s, found.worst) == (2, 0, 65 * 60, 13)
    # Back within the limits at the end, be it only just: no longer out.
    (found,) = excursions(at((0, 11), (5, 9)), None, 10, 15 * 60)
    assert found.last_s == 300


def test_rounding_comes_first() -> None:
    spec = SensorSpec("s", "q", decimals=1, high=32.0)
    assert sensor_stats(spec, at((0, 32.04)), start_s=0, end_s=60).excursions == ()
    stats = sensor_stats(spec, at((0, 32.06)), start_s=0, end_s=60)
    assert stats.excursions[0].worst == stats.maximum == 32.1
    zero = sensor_stats(SensorSpec("s", "q"), at((0, -0.04)), start_s=0, end_s=60)
    assert str(zero.minimum) == "0.0"


@given(st.floats(-100, 100), st.floats(-50, 50), st.integers(3, 50), st.integers(1, 900))
@settings(deadline=None)
def test_a_clean_slope_is_found(slope: float, level: float, count: int, step_s: int) -> None:
    readings = [Reading(i * step_s, level + slope * i * step_s / HOUR_S) for i in range(count)]
    found = trend_per_hour(readings)
    assert found is not None
    if abs(slope) * count * step_s / HOUR_S > 1e-6:
        assert found == pytest.approx(slope, rel=1e-4)


@given(st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_the_slope_is_that_of_least_squares_or_none(seed: int) -> None:
    rng = random.Random(seed)
    hours = np.sort([rng.uniform(0, 6) for _ in range(rng.randint(3, 80))])
    values = rng.uniform(-3, 3) * hours + [rng.gauss(0, rng.choice([0.1, 1, 5])) for _ in hours]
    found = trend_per_hour([Reading(h * HOUR_S, v) for h, v in zip(hours, values, strict=True)])
    assert found == 0.0 or found == pytest.approx(np.polyfit(hours, values, 1)[0], rel=1e-6)


def test_noise_is_steady() -> None:
    rng = random.Random(1)
    for count in (4, 8, 36, 72):
        falsely = sum(
            trend_per_hour([Reading(i * 300.0, rng.gauss(20, 1)) for i in range(count)]) != 0.0
            for _ in range(400)
        )
        assert falsely <= 400 * 0.1 if count == 4 else falsely <= 400 * 0.02, (count, falsely)


def test_too_little_for_a_trend() -> None:
    assert trend_per_hour(at((0, 1), (5, 2))) is None
    assert trend_per_hour([Reading(5, 1), Reading(5, 2), Reading(5, 3)]) is None
    assert trend_per_hour(at((0, 1), (5, 1), (10, 1))) == 0.0


def test_silence() -> None:
    assert silent_since(100, 200, 99) == 100
    assert silent_since(100, 200, 100) is None
    assert silent_since(100, 200, None) is None
    spec = SensorSpec("s", "q", max_silence_s=60)
    assert sensor_stats(spec, [], start_s=0, end_s=100, before=Reading(-5, 1)).silent_since_s is None
    assert sensor_stats(spec, [Reading(10, 1)], start_s=0, end_s=100).silent_since_s == 10


def test_a_sensor_that_reports_changes_carries_its_last_value() -> None:
    spec = SensorSpec("door", "opening", decimals=0, high=0, on_change=True, max_silence_s=1)
    stats = sensor_stats(spec, [], start_s=100, end_s=1000, before=Reading(5, 1))
    assert (stats.count, stats.last, stats.silent_since_s) == (1, 1, None)
    assert stats.excursions == (Excursion("above", 0, 1, 100, None),)


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("schedule", "after", "expected"),
    [
        (Schedule(at=("06:00", 1080)), "2026-03-14T05:59:59+01:00", "2026-03-14T06:00:00+01:00"),
        (Schedule(at=("06:00", 1080)), "2026-03-14T06:00:00+01:00", "2026-03-14T18:00:00+01:00"),
        (Schedule(at=("06:00", 1080)), "2026-03-14T18:00:00+01:00", "2026-03-15T06:00:00+01:00"),
        (Schedule(every="6h"), "2026-03-14T13:00:00+01:00", "2026-03-14T18:00:00+01:00"),
        (Schedule(every="15min"), "2026-03-14T13:00:00+01:00", "2026-03-14T13:15:00+01:00"),
        (Schedule(every="1d"), "2026-03-14T13:00:00+01:00", "2026-03-15T00:00:00+01:00"),
        # The clock is put forward at 02:00, and back at 03:00 in October.
        (Schedule(every="6h"), "2026-03-29T01:00:00+01:00", "2026-03-29T06:00:00+02:00"),
        (Schedule(at=("02:30",)), "2026-03-29T01:00:00+01:00", "2026-03-29T03:30:00+02:00"),
        (Schedule(at=("02:30",)), "2026-10-25T01:00:00+02:00", "2026-10-25T02:30:00+02:00"),
        (Schedule(at=("02:30",)), "2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"),
    ],
)  # fmt: skip
def test_when_windows_end(schedule: Schedule, after: str, expected: str) -> None:
    assert next_end(schedule, moment(after), MADRID) == moment(expected)


def test_lengths_that_do_not_divide_a_day_count_from_1970() -> None:
    assert next_end(Schedule(every="7h"), 1_000_000_000, MADRID) == (1_000_000_000 // 25_200 + 1) * 25_200
    assert next_end(Schedule(every="10s"), 1_000_000_003, MADRID) == 1_000_000_010


@given(
    st.floats(0, 4e9),
    st.sampled_from([Schedule(every="6h"), Schedule(at=("02:30", "23:59")), Schedule(every="7h")]),
)
@settings(deadline=None)
def test_the_next_end_is_always_later(after_s: float, schedule: Schedule) -> None:
    end_s = next_end(schedule, after_s, MADRID)
    assert after_s < end_s <= after_s + 2 * 86_400
    assert next_end(schedule, end_s, MADRID) > end_s


def timer(**summary: object) -> Timer:
    settings = {"name": "s", "site": "x", "sources": (Source(topic="a"),), **summary}
    return Timer(Config(broker="mqtt://h", summaries=(SummaryConfig(**settings),), time_zone="UTC"))  # type: ignore[arg-type]


def test_windows_follow_each_other() -> None:
    watch = timer(window="6h")
    day = datetime(2026, 3, 14, tzinfo=UTC).timestamp()
    assert watch.due(day) == []
    assert watch.due(day + 5.9 * HOUR_S) == []
    assert watch.due(day + 6 * HOUR_S) == [(0, day, day + 6 * HOUR_S)]
    assert watch.due(day + 6 * HOUR_S) == []
    # After a long sleep only the last window.
    assert watch.due(day + 31 * HOUR_S) == [(0, day + 24 * HOUR_S, day + 30 * HOUR_S)]


def test_a_first_window_begins_with_the_application() -> None:
    day = datetime(2026, 3, 14, tzinfo=UTC).timestamp()
    watch = timer(window="6h")
    watch.due(day + HOUR_S)
    assert watch.due(day + 6 * HOUR_S) == [(0, day + HOUR_S, day + 6 * HOUR_S)]
    watch = timer(window="6h")
    watch.due(day + 5 * HOUR_S)
    assert watch.due(day + 6 * HOUR_S) == [], "an hour says too little of six"
    assert watch.due(day + 12 * HOUR_S) == [(0, day + 6 * HOUR_S, day + 12 * HOUR_S)]


def test_a_clock_that_is_put_back_closes_no_window_twice() -> None:
    day = datetime(2026, 3, 14, tzinfo=UTC).timestamp()
    watch = timer(window="1h")
    watch.due(day)
    assert len(watch.due(day + HOUR_S)) == 1
    assert watch.due(day - 5 * HOUR_S) == []
    assert watch.due(day - 5 * HOUR_S + 60) == []
    assert watch.due(day - 4 * HOUR_S) == [(0, day - 5 * HOUR_S, day - 4 * HOUR_S)]
