"""The application's YAML: its schema, its checks, and the settings of one sensor once all is put together.

Strict: an unknown key is an error that names the nearest one. Knows nothing of MQTT connections or of the
model.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import tzinfo
from pathlib import Path
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import UNSET, UnsetType

from ...runtime.errors import ConfigError
from ...runtime.strict import decode_yaml_file
from ...runtime.transports.mqtt_address import BrokerAddress, Topics, node_from_hostname
from ..broker import broker_of
from . import topics
from .window import DAY_S

Decimals = Annotated[int, msgspec.Meta(ge=0, le=6)]
# YAML 1.1 reads a bare 18:00 as the number of minutes, 1080: both forms are taken.
TimeOfDay = str | int
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(d|h|min|s)")
_UNIT_S = {"d": DAY_S, "h": 3600, "min": 60, "s": 1}


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of everything in the file."""


class SensorSettings(Struct, frozen=True, kw_only=True):
    """How one sensor's values are named, shown and judged."""

    name: str | None = None  # template; None: the topic levels that wildcards stand for, and the field
    quantity: str | None = None  # "air temperature"; None: the field, or the topic's last level
    unit: str = ""
    decimals: Decimals = 1  # readings are rounded to this many digits
    low: float | None = None
    high: float | None = None
    max_silence: str | None = None  # duration; None: silent only when a whole window brings no reading
    merge_gap: str = "15min"  # a return within the limits that is shorter does not end an out-of-limit span
    on_change: bool = False  # publishes changes only: the last value before a window is carried into it
    # What text and true/false mean as numbers; "default": on, open, true, … 1; off, closed, false, … 0.
    states: Literal["default"] | dict[str | bool, float] | None = None


class Override(Struct, frozen=True, kw_only=True):
    """Replaces single settings of the sensor it is filed under; `ignore` leaves the sensor out."""

    ignore: bool = False
    quantity: str | UnsetType = UNSET
    unit: str | UnsetType = UNSET
    decimals: Decimals | UnsetType = UNSET
    low: float | UnsetType | None = UNSET
    high: float | UnsetType | None = UNSET
    max_silence: str | UnsetType | None = UNSET
    merge_gap: str | UnsetType = UNSET
    on_change: bool | UnsetType = UNSET


class JsonValue(Struct, frozen=True, kw_only=True):
    """One value of a JSON payload."""

    json: str  # path: keys and list indexes, joined by points


class TimeFrom(Struct, frozen=True, kw_only=True):
    """Where a reading's own time stands (one of the two): ISO 8601, Unix seconds or milliseconds."""

    field: str | None = None  # path in the payload
    user_property: str | None = None  # of MQTT 5


class Source(SensorSettings, frozen=True, kw_only=True):
    """One topic filter and how its payloads are read."""

    topic: str
    payload: Literal["number", "json", "zigbee2mqtt", "tasmota"] | JsonValue = "number"
    fields: dict[str, SensorSettings] | None = None  # path -> sensor; for json, zigbee2mqtt and tasmota
    time_from: Literal["arrival"] | TimeFrom = "arrival"
    expect: tuple[str, ...] = ()  # topics whose sensors are missed even if they never report


class CountWindow(Struct, frozen=True, kw_only=True):
    """The last so many readings, of all sensors of the summary together."""

    readings: Annotated[int, msgspec.Meta(ge=2, le=100_000)]


class Schedule(Struct, frozen=True, kw_only=True):
    """When windows end: `every` so long (counted from midnight), or `at` times of the day."""

    every: str | None = None
    at: tuple[TimeOfDay, ...] = ()


class SummaryConfig(Struct, frozen=True, kw_only=True):
    """One summary: which sensors, over which window, how often."""

    name: str
    site: str
    sources: Annotated[tuple[Source, ...], msgspec.Meta(min_length=1)]
    window: str | CountWindow = "6h"
    schedule: Schedule | None = None  # None: one window after the other
    overrides: dict[str, Override] = {}
    max_sensors: Annotated[int, msgspec.Meta(ge=1, le=64)] = 8  # in one request to the model
    max_readings: Annotated[int, msgspec.Meta(ge=100, le=1_000_000)] = 20_000  # kept for one sensor

    @property
    def window_s(self) -> float | None:
        """Length of a time window; None: the window is a number of readings."""
        return duration_s(self.window) if isinstance(self.window, str) else None


class Daemon(Struct, frozen=True, kw_only=True):
    """The gemma-edge daemon on the same broker."""

    base: str = "gemma-edge"
    node: str = msgspec.field(default_factory=lambda: node_from_hostname(socket.gethostname()))
    max_tokens: Annotated[int, msgspec.Meta(ge=64, le=8192)] = 700
    timeout: str = "5min"  # for one answer
    patience: str = "10min"  # for a busy or absent daemon, before the summary is computed instead

    @property
    def topics(self) -> Topics:
        return Topics(self.base, self.node)


class ClockTopic(Struct, frozen=True, kw_only=True):
    """The time of day comes from a topic (ISO 8601): for replaying a recorded log."""

    topic: str


class Config(Struct, frozen=True, kw_only=True):
    """The whole file."""

    broker: str  # mqtt://[user:password@]host[:port], mqtts:// for TLS
    summaries: Annotated[tuple[SummaryConfig, ...], msgspec.Meta(min_length=1)]
    password_file: str | None = None  # its first line, instead of a password in the URL
    ca_file: str | None = None  # for mqtts; None: the system's certificates
    daemon: Daemon = msgspec.field(default_factory=Daemon)
    time_zone: str | None = None  # "Europe/Madrid"; None: the machine's
    clock: Literal["system"] | ClockTopic = "system"

    @property
    def zone(self) -> tzinfo | None:
        return ZoneInfo(self.time_zone) if self.time_zone else None

    @property
    def broker_address(self) -> BrokerAddress:
        """Raises ConfigError."""
        return broker_of(self.broker, self.password_file)


@dataclass(frozen=True)
class SensorSpec:
    """All that is settled for one sensor before its first reading."""

    name: str
    quantity: str
    unit: str = ""
    decimals: int = 1
    low: float | None = None
    high: float | None = None
    max_silence_s: float | None = None
    merge_gap_s: float = 900.0
    on_change: bool = False


def load_config(path: Path) -> Config:
    """Read and check the file. Raises ConfigError naming the file, the place and what was expected."""
    config = decode_yaml_file(path, Config)
    check_config(config, str(path))
    return config


def check_config(config: Config, where: str) -> None:
    """Raises ConfigError for the first thing that the schema alone cannot see."""
    for problem in _problems(config):
        raise ConfigError(f"{where}: {problem}")


def sensor_spec(name: str, settings: SensorSettings, field: str, override: Override | None) -> SensorSpec:
    """The settings of the sensor called `name`, read from `field` (empty: the whole payload)."""
    fixed = settings.topic.rsplit("/", 1)[-1] if isinstance(settings, Source) else "+"
    spoken = field or (name if topics.has_wildcard(fixed) else fixed)
    spoken = spoken.rsplit(".", 1)[-1].rsplit("/", 1)[-1].replace("_", " ").lower()
    merged: dict[str, Any] = {
        "quantity": settings.quantity or spoken,
        **{key: getattr(settings, key) for key in _SPEC_KEYS},
    }
    for key in ("quantity", *_SPEC_KEYS):
        value = getattr(override, key, UNSET)
        if value is not UNSET:
            merged[key] = value
    silence, gap = merged.pop("max_silence"), merged.pop("merge_gap")
    return SensorSpec(
        name, max_silence_s=duration_s(silence) if silence else None, merge_gap_s=duration_s(gap), **merged
    )


_SPEC_KEYS = ("unit", "decimals", "low", "high", "max_silence", "merge_gap", "on_change")


def duration_s(text: str) -> float:
    """Seconds of "90s", "15min", "6h", "1d" or "1h30min". Raises ConfigError."""
    parts = _DURATION_PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ConfigError(f"{text!r} is no duration; expected something like 90s, 15min, 6h or 1d")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def minute_of_day(time: TimeOfDay) -> int:
    """Minutes since midnight of "06:00", or of 18:00 as YAML reads it (1080). Raises ConfigError."""
    if isinstance(time, int):
        minutes = time
    else:
        match = re.fullmatch(r"(\d{1,2}):(\d\d)", time)
        minutes = int(match[1]) * 60 + int(match[2]) if match and int(match[2]) < 60 else -1
    if not 0 <= minutes < 24 * 60:
        raise ConfigError(f'{time!r} is no time of day; expected "00:00" to "23:59"')
    return minutes


def _problems(config: Config) -> Iterator[str]:
    try:
        config.zone  # noqa: B018 - asked for its error
    except (ZoneInfoNotFoundError, ValueError, OSError):
        yield f"time_zone: {config.time_zone!r} is unknown; expected a name such as Europe/Madrid"
    for made in (lambda: config.broker_address, lambda: config.daemon.topics):
        try:
            made()
        except ConfigError as error:
            yield str(error).replace("--base ", "daemon.base: ").replace("--node ", "daemon.node: ")
    if config.ca_file is not None and not Path(config.ca_file).is_file():
        yield f"ca_file: {config.ca_file}: no such file"
    if isinstance(config.clock, ClockTopic) and topics.has_wildcard(config.clock.topic):
        yield f"clock.topic: {config.clock.topic!r}: expected a topic without wildcards"
    yield from _bad_durations("daemon", config.daemon, "timeout", "patience")
    seen: set[str] = set()
    for index, summary in enumerate(config.summaries):
        where = f"summaries[{index}]"
        if not re.fullmatch(r"[\w.-]+", summary.name):
            yield f"{where}.name: got {summary.name!r}, expected letters, digits and . _ -"
        if summary.name in seen:
            yield f"{where}.name: {summary.name!r} is taken by an earlier summary"
        seen.add(summary.name)
        yield from _summary_problems(where, summary)


def _summary_problems(where: str, summary: SummaryConfig) -> Iterator[str]:
    if not summary.site.strip() or len(summary.site) > topics.MAX_NAME or "\n" in summary.site:
        yield f"{where}.site: expected one line of 1 to {topics.MAX_NAME} characters"
    if isinstance(summary.window, str):
        yield from _bad_durations(where, summary, "window")
        if not 60 <= duration_s(summary.window) <= 31 * DAY_S:
            yield f"{where}.window: got {summary.window}, expected 60s to 31d"
    if summary.schedule is not None:
        schedule = summary.schedule
        if (schedule.every is None) == (not schedule.at):
            yield f"{where}.schedule: expected either every or at"
        yield from _bad_durations(f"{where}.schedule", schedule, "every")
        if schedule.every and not 10 <= duration_s(schedule.every) <= 31 * DAY_S:
            yield f"{where}.schedule.every: got {schedule.every}, expected 10s to 31d"
        for time in schedule.at:
            try:
                minute_of_day(time)
            except ConfigError as error:
                yield f"{where}.schedule.at: {error}"
    for index, source in enumerate(summary.sources):
        yield from _source_problems(f"{where}.sources[{index}]", source)
    for name, override in summary.overrides.items():
        yield from _bad_durations(f"{where}.overrides.{name}", override, "max_silence", "merge_gap")


def _source_problems(where: str, source: Source) -> Iterator[str]:
    if problem := topics.filter_problem(source.topic):
        yield f"{where}.topic: {problem}"
    one_value = source.payload == "number" or isinstance(source.payload, JsonValue)
    if one_value and source.fields is not None:
        yield f"{where}.fields: only for the payloads json, zigbee2mqtt and tasmota"
    if not one_value and not source.fields:
        yield f"{where}.fields: expected at least one, for example temperature: {{unit: °C}}"
    if isinstance(source.time_from, TimeFrom):
        if (source.time_from.field is None) == (source.time_from.user_property is None):
            yield f"{where}.time_from: expected either field or user_property"
        if source.payload == "number" and source.time_from.field is not None:
            yield f"{where}.time_from: a plain number has no fields; expected arrival or user_property"
    for topic in source.expect:
        if topics.has_wildcard(topic) or not topics.matches(source.topic, topic):
            yield f"{where}.expect: {topic!r} is not a topic that {source.topic!r} selects"
    for path, settings in {"": source, **(source.fields or {})}.items():
        place = f"{where}.fields.{path}" if path else where
        if settings.name is not None and (problem := topics.template_problem(settings.name)):
            yield f"{place}.name: {problem}"
        yield from _bad_durations(place, settings, "max_silence", "merge_gap")
        if settings.low is not None and settings.high is not None and settings.low >= settings.high:
            yield f"{place}: low {settings.low} is not below high {settings.high}"
        for key in ("low", "high"):
            limit = getattr(settings, key)
            if limit is not None and round(limit, settings.decimals) != limit:
                yield f"{place}.{key}: {limit} has more digits than decimals: {settings.decimals} shows"


def _bad_durations(where: str, struct: Struct, *keys: str) -> Iterator[str]:
    for key in keys:
        value = getattr(struct, key)
        if isinstance(value, str):
            try:
                duration_s(value)
            except ConfigError as error:
                yield f"{where}.{key}: {error}"
