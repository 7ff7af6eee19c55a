"""Keeps the readings of all sensors, bounded, until a window asks for them. Thread-safe; knows no connection.

Policy when a sensor sends more than `max_readings`: its oldest twentieth is dropped, the summary says how
many readings were dropped, and the log says so once per window. Payloads that cannot be read are counted and
logged once per topic.
"""

from __future__ import annotations

import heapq
import logging
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import tzinfo
from threading import Lock

from . import topics
from .config import Config, CountWindow, SensorSpec, Source, SummaryConfig, sensor_spec
from .payload import Measured, PayloadError, fields_of, name_of, read
from .statistics import Reading

log = logging.getLogger(__name__)

MAX_SENSORS = 256  # of one summary
MAX_LOGGED_TOPICS = 1000
MAX_FUTURE_S = 300.0  # a reading's own time may be this far ahead of the clock


@dataclass(frozen=True)
class SensorReadings:
    """One sensor's part of a window."""

    spec: SensorSpec
    readings: tuple[Reading, ...]  # in order of time
    before: Reading | None  # the last one before the window


@dataclass(frozen=True)
class Snapshot:
    """All readings of one window, copied."""

    start_s: float
    end_s: float
    sensors: tuple[SensorReadings, ...]  # in order of their names
    dropped: int  # readings of this window that were more than could be kept


class Collector:
    """Readings by summary and sensor."""

    def __init__(self, config: Config, *, quiet: bool = False) -> None:
        """quiet: bad payloads are counted, not logged."""
        self._quiet = quiet
        self._zone = config.zone
        self._lock = Lock()
        self._kept = [_Kept(summary, config.zone) for summary in config.summaries]
        self._bad: Counter[str] = Counter()

    def add(
        self,
        topic: str,
        payload: bytes,
        *,
        now_s: float,
        retained: bool = False,
        properties: Mapping[str, str] | None = None,
    ) -> int:
        """Take one message; how many readings it brought. A bad payload brings none, and never raises."""
        brought = 0
        with self._lock:
            for kept in self._kept:
                for source in kept.summary.sources:
                    if not topics.matches(source.topic, topic):
                        continue
                    try:
                        found = read(
                            source,
                            topic,
                            payload,
                            arrival_s=now_s,
                            properties=properties or {},
                            zone=self._zone,
                        )
                        brought += sum(kept.put(source, item, now_s, retained) for item in found)
                    except PayloadError as error:
                        self._count_bad(topic, error)
        return brought

    def snapshot(self, index: int, end_s: float, start_s: float | None) -> Snapshot:
        """The window [start_s, end_s) of the index-th summary; without `start_s`, its last so many readings.

        What no later window of the same length can need is forgotten.
        """
        with self._lock:
            return self._kept[index].snapshot(end_s, start_s)

    def new_readings(self, index: int) -> tuple[int, float]:
        """(readings since the last snapshot, time of the newest reading) of the index-th summary."""
        with self._lock:
            return self._kept[index].new, self._kept[index].newest_s

    @property
    def bad_payloads(self) -> int:
        with self._lock:
            return self._bad.total()

    def _count_bad(self, topic: str, error: PayloadError) -> None:
        known = topic in self._bad or len(self._bad) >= MAX_LOGGED_TOPICS
        self._bad[topic if len(self._bad) < MAX_LOGGED_TOPICS or topic in self._bad else "…"] += 1
        if not known and not self._quiet:
            log.warning("%s: payload cannot be used: %s (said once for this topic)", topic, error)


@dataclass
class _Series:
    """The readings of one sensor, in order of time: 16 bytes each."""

    spec: SensorSpec
    cap: int
    times: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))
    dropped: int = 0

    def put(self, time_s: float, value: float) -> bool:
        at = bisect_right(self.times, time_s)
        if at and self.times[at - 1] == time_s and self.values[at - 1] == value:
            return False  # delivered twice
        self.times.insert(at, time_s)
        self.values.insert(at, value)
        if len(self.times) > self.cap:
            self.forget(max(1, self.cap // 20))
            if not self.dropped:
                log.warning(
                    "%s: more than %d readings in a window, the oldest are dropped", self.spec.name, self.cap
                )
            self.dropped += max(1, self.cap // 20)
        return True

    def forget(self, count: int) -> None:
        del self.times[:count], self.values[:count]

    def between(self, start_s: float, end_s: float) -> SensorReadings:
        first, stop = bisect_left(self.times, start_s), bisect_left(self.times, end_s)
        readings = tuple(Reading(self.times[i], self.values[i]) for i in range(first, stop))
        before = Reading(self.times[first - 1], self.values[first - 1]) if first else None
        return SensorReadings(self.spec, readings, before)


class _Kept:
    """One summary's sensors."""

    def __init__(self, summary: SummaryConfig, zone: tzinfo | None) -> None:
        self.summary = summary
        self.series: dict[str, _Series] = {}
        self.new = 0  # readings since the last snapshot
        self.newest_s = 0.0
        self._full_logged = False
        for source in summary.sources:
            known = list(source.expect) or ([] if topics.has_wildcard(source.topic) else [source.topic])
            for topic in known:
                for path, settings in fields_of(source).items():
                    self._series(name_of(source, settings, topic, path), source, path)

    def put(self, source: Source, item: Measured, now_s: float, retained: bool) -> int:
        if retained and source.time_from == "arrival" and not item.settings.on_change:
            return 0  # an old value of unknown age, kept by the broker
        if item.time_s > now_s + MAX_FUTURE_S:
            raise PayloadError(f"{item.name}: its time is {item.time_s - now_s:.0f} s ahead of the clock")
        series = self._series(item.name, source, item.field)
        if series is None or not series.put(item.time_s, item.value):
            return 0
        self.new += 1
        self.newest_s = max(self.newest_s, item.time_s)
        return 1

    def snapshot(self, end_s: float, start_s: float | None) -> Snapshot:
        if start_s is None:
            assert isinstance(self.summary.window, CountWindow), "a time window has a start"
            times = (t for s in self.series.values() for t in s.times if t < end_s)
            start_s = min(heapq.nlargest(self.summary.window.readings, times), default=end_s)
        found = [series.between(start_s, end_s) for series in self.series.values()]
        # A sensor that reports changes only, and has never reported, is not known to be wrong.
        found = [f for f in found if f.readings or not f.spec.on_change or f.before is not None]
        dropped = sum(series.dropped for series in self.series.values())
        for series in self.series.values():
            series.dropped = 0
            # Later windows start later: what is older than this start, but for the last one, is of no use.
            series.forget(max(0, bisect_left(series.times, start_s) - 1))
        self.new = 0
        return Snapshot(start_s, end_s, tuple(sorted(found, key=lambda f: f.spec.name)), dropped)

    def _series(self, name: str, source: Source, path: str) -> _Series | None:
        """The sensor's readings; None: it is ignored, or there are too many sensors."""
        override = self.summary.overrides.get(name)
        if override is not None and override.ignore:
            return None
        if name not in self.series:
            if len(self.series) >= MAX_SENSORS:
                if not self._full_logged:
                    log.error(
                        "summary %s: more than %d sensors, %s and later ones are left out; narrow the topics",
                        self.summary.name, MAX_SENSORS, name,
                    )  # fmt: skip
                    self._full_logged = True
                return None
            settings = fields_of(source)[path]
            self.series[name] = _Series(
                sensor_spec(name, settings, path, override), self.summary.max_readings
            )
        return self.series[name]
