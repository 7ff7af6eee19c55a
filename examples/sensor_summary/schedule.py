"""When windows end. Pure functions of Unix time, the schedule and a time zone."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta, tzinfo

from .config import Schedule, SummaryConfig, duration_s, minute_of_day
from .window import DAY_S


def effective_schedule(summary: SummaryConfig) -> Schedule | None:
    """The summary's schedule; a time window without one follows on itself; a count window without one has
    none.
    """
    if summary.schedule is None and isinstance(summary.window, str):
        return Schedule(every=summary.window)
    return summary.schedule


def next_end(schedule: Schedule, after_s: float, zone: tzinfo | None) -> float:
    """The first end of a window later than `after_s`.

    `every` is counted from local midnight when it divides a day, else from 1970. Where the clock is put
    forward or back, times of day stay times of day.
    """
    if schedule.every is not None:
        every = duration_s(schedule.every)
        if DAY_S % every or every % 60:
            return (after_s // every + 1) * every
        minutes = [int(k * every // 60) for k in range(int(DAY_S // every))]
    else:
        minutes = sorted({minute_of_day(at) for at in schedule.at})
    today = datetime.fromtimestamp(after_s, zone).date()
    # Two days back to three ahead covers every date line and change of the clock.
    ends = (
        _moment_s(today + timedelta(days=days), minute, zone) for days in (-1, 0, 1, 2) for minute in minutes
    )
    return min(end for end in ends if end > after_s)


def _moment_s(day: date, minute: int, zone: tzinfo | None) -> float:
    """Unix time of a local time of day; one that the clock skips is as long after the jump."""
    return datetime.combine(day, time(minute // 60, minute % 60), zone).timestamp()
