"""The application: readings in, windows out, one worker that has them summarised and publishes the reports.

Threads: paho's network thread collects readings and, with a clock topic, closes windows; a timer thread
closes windows by the system's clock; one worker asks the model. A window's readings are copied when it
closes, so nothing is lost or mixed up while the model thinks.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any

from .collector import Collector, Snapshot
from .config import ClockTopic, Config, duration_s
from .mqtt import Connection, DaemonClient, Message, Stopped
from .payload import PayloadError, parse_time
from .schedule import effective_schedule, next_end
from .statistics import sensor_stats
from .summarizer import Report, computed, summarize
from .window import Window

log = logging.getLogger(__name__)

MAX_WAITING = 64  # windows; a later one is lost, and the log says so
MAX_FOR_MODEL = 8  # with more windows waiting the model cannot keep up: summaries are computed
SHORTEST_FIRST = 0.5  # a first window that the application saw less of is left out
PUBLISH_WAIT_S = 10.0


@dataclass(frozen=True)
class Closed:
    """A window that has ended, waiting for its summary."""

    index: int
    snapshot: Snapshot


class App:
    """Runs until `stop` is set."""

    def __init__(self, config: Config, stop: threading.Event) -> None:
        self.config = config
        self.stop = stop
        self.topics = config.daemon.topics
        self.collector = Collector(config)
        self.daemon = DaemonClient(
            self.topics,
            max_tokens=config.daemon.max_tokens,
            timeout_s=duration_s(config.daemon.timeout),
            patience_s=duration_s(config.daemon.patience),
            stop=stop,
        )
        self.ready = threading.Event()  # connected and subscribed
        self._closed: queue.Queue[Closed] = queue.Queue(MAX_WAITING)
        self._timer = Timer(config)
        self._timer_lock = threading.Lock()
        self._now_s: float | None = None  # by the clock topic

    def run(self) -> None:
        """Connect, collect and summarise. Windows that are waiting at the end are summarised without the
        model.
        """
        wanted = [source.topic for summary in self.config.summaries for source in summary.sources]
        if isinstance(self.config.clock, ClockTopic):
            wanted.append(self.config.clock.topic)
        connection = Connection(
            self.config.broker_address,
            [*wanted, *self.daemon.topics_wanted],
            self._receive,
            ca_file=self.config.ca_file,
            stop=self.stop,
        )
        self.daemon.connection = connection
        try:
            with connection:
                log.info("connected to %s, %d summaries", connection.broker, len(self.config.summaries))
                timer = threading.Thread(target=self._run_timer, name="timer", daemon=True)
                timer.start()
                self.ready.set()
                self._work(connection)
                timer.join()
        except Stopped:
            pass

    # --- paho's thread ---

    def _receive(self, message: Message) -> None:
        if self.daemon.handle(message):
            return
        clock = self.config.clock
        if isinstance(clock, ClockTopic):
            if message.topic == clock.topic:
                self._tick(message)
                return
            now_s = self._now_s
            if now_s is None:
                return  # the recorded day has not begun
        else:
            now_s = time.time()
        brought = self.collector.add(
            message.topic,
            message.payload,
            now_s=now_s,
            retained=message.retained,
            properties=message.properties,
        )
        if brought:
            self._close_full(now_s)

    def _tick(self, message: Message) -> None:
        if message.retained:
            return  # the end of an earlier replay
        try:
            now_s = parse_time(message.payload.decode(errors="replace").strip(), self.config.zone)
        except PayloadError as error:
            log.warning("%s: %s", message.topic, error)
            return
        self._now_s = now_s
        self._close_due(now_s)

    # --- the timer's thread, or paho's with a clock topic ---

    def _run_timer(self) -> None:
        while not self.stop.is_set():
            if self.config.clock == "system":
                self._close_due(time.time())
            self.stop.wait(0.5)

    def _close_due(self, now_s: float) -> None:
        with self._timer_lock:
            for index, start_s, end_s in self._timer.due(now_s):
                self._close(index, end_s, start_s)

    def _close_full(self, now_s: float) -> None:
        """Close the windows of so many readings that have them and no schedule."""
        for index, summary in enumerate(self.config.summaries):
            if summary.schedule is None and not isinstance(summary.window, str):
                with self._timer_lock:
                    count, newest_s = self.collector.new_readings(index)
                    if count >= summary.window.readings:
                        # The reading that fills the window belongs to it.
                        self._close(index, max(now_s, newest_s) + 0.001, None)

    def _close(self, index: int, end_s: float, start_s: float | None) -> None:
        closed = Closed(index, self.collector.snapshot(index, end_s, start_s))
        try:
            self._closed.put_nowait(closed)
        except queue.Full:
            log.error("%d windows wait for their summaries, this one is lost", MAX_WAITING)

    # --- the worker: the caller's thread ---

    def _work(self, connection: Connection) -> None:
        while not (self.stop.is_set() and self._closed.empty()):
            try:
                closed = self._closed.get(timeout=0.2)
            except queue.Empty:
                continue
            try:
                self._summarise(connection, closed)
            except Exception:  # the next window may well succeed
                log.exception("window of summary %d could not be summarised", closed.index)

    def _summarise(self, connection: Connection, closed: Closed) -> None:
        summary = self.config.summaries[closed.index]
        window = make_window(closed.snapshot, summary.site, self.config.zone)
        if not window.sensors:
            log.warning("summary %s: no sensor has reported yet, nothing to summarise", summary.name)
            return
        if self.stop.is_set() or self._closed.qsize() > MAX_FOR_MODEL:
            report = computed(window)
        else:
            report = summarize(window, self.daemon.ask, summary.max_sensors)
        payload = json.dumps(
            report_object(summary.name, window, report, closed.snapshot.dropped), ensure_ascii=False
        )
        topic = f"{self.topics.base}/{self.topics.node}/summary/{summary.name}"
        if not connection.publish(topic, payload.encode(), retain=True, wait_s=PUBLISH_WAIT_S):
            log.warning("%s: the broker has not confirmed the summary yet", topic)
        log.info("%s: severity %d, by %s", topic, report.summary.severity, report.generated_by)


class Timer:
    """Which windows end by now. Not thread-safe."""

    def __init__(self, config: Config) -> None:
        self._zone = config.zone
        self._summaries = config.summaries
        self._schedules = [effective_schedule(summary) for summary in config.summaries]
        self._next: list[float] | None = None
        self._began_s = 0.0
        self._now_s = 0.0

    def due(self, now_s: float) -> list[tuple[int, float | None, float]]:
        """(index of the summary, start, end) of each window that ended since the last call.

        After a long sleep only the last window of each summary; after the clock is put back, none until it
        ends.
        """
        if self._next is None or now_s < self._now_s - 60:
            self._began_s = now_s
            self._next = [next_end(s, now_s, self._zone) if s else float("inf") for s in self._schedules]
        self._now_s = now_s
        found: list[tuple[int, float | None, float]] = []
        for index, schedule in enumerate(self._schedules):
            if schedule is None or now_s < self._next[index]:
                continue
            end_s = self._next[index]
            while (following := next_end(schedule, end_s, self._zone)) <= now_s:
                end_s = following
            self._next[index] = following
            length_s = self._summaries[index].window_s
            if length_s is None:
                found.append((index, None, end_s))
            elif end_s - self._began_s >= SHORTEST_FIRST * length_s:
                found.append((index, max(end_s - length_s, self._began_s), end_s))
            else:
                log.info(
                    "summary %s: the first window is too short, the next one counts",
                    self._summaries[index].name,
                )
        return found


def make_window(snapshot: Snapshot, site: str, zone: tzinfo | None) -> Window:
    """The statistics of a closed window."""
    sensors = tuple(
        sensor_stats(s.spec, s.readings, start_s=snapshot.start_s, end_s=snapshot.end_s, before=s.before)
        for s in snapshot.sensors
    )
    return Window(site, snapshot.start_s, snapshot.end_s, sensors, zone)


def report_object(name: str, window: Window, report: Report, dropped: int) -> dict[str, Any]:
    """What is published, as plain data (docs/sensor-summary.md lists the fields)."""
    summary = report.summary
    return {
        "name": name,
        "site": window.site,
        "title": summary.title,
        "summary": summary.summary,
        "severity": summary.severity,
        "anomalies": [{"sensor": a.sensor, "kind": a.kind, "detail": a.detail} for a in summary.anomalies],
        "actions": list(summary.actions),
        "generated_by": report.generated_by,
        "model": report.model,
        "attempts": report.attempts,
        "start": iso(window.start_s, window.zone),
        "end": iso(window.end_s, window.zone),
        "sensors": len(window.sensors),
        "parts": list(report.parts),
        "dropped_readings": dropped,
    }


def iso(time_s: float, zone: tzinfo | None) -> str:
    """ISO 8601 with the offset from UTC."""
    return datetime.fromtimestamp(time_s, UTC).astimezone(zone).isoformat(timespec="seconds")
