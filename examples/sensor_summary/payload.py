"""From one MQTT message to readings: plain numbers, JSON, zigbee2mqtt and Tasmota, with states and
timestamps.

Pure functions. A payload that cannot be read raises PayloadError; what is no reading at all gives none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any

import msgspec

from . import topics
from .config import JsonValue, SensorSettings, Source

MAX_PAYLOAD_BYTES = 64 * 1024
MAX_VALUE = 1e12
LAST_TIME_S = 7_258_118_400.0  # the year 2200
_NUMERIC = re.compile(r"\d+(?:\.\d+)?")
_TRUE = ("on", "open", "opened", "true", "yes", "wet", "detected", "occupied", "home", "online")
_FALSE = ("off", "closed", "shut", "false", "no", "dry", "clear", "empty", "away", "offline")
DEFAULT_STATES: dict[str, float] = {**dict.fromkeys(_TRUE, 1.0), **dict.fromkeys(_FALSE, 0.0)}
# zigbee2mqtt speaks of itself and takes orders under the same prefix.
_NOT_ZIGBEE_READINGS = ("availability", "set", "get")


class PayloadError(Exception):
    """The message is not what its source's settings say."""


@dataclass(frozen=True)
class Measured:
    """One value read from a message."""

    name: str
    field: str
    settings: SensorSettings
    time_s: float
    value: float


def read(
    source: Source,
    topic: str,
    payload: bytes,
    *,
    arrival_s: float,
    properties: Mapping[str, str],
    zone: tzinfo | None,
) -> list[Measured]:
    """The readings in one message. Fields that are missing or null bring none. Raises PayloadError."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise PayloadError(f"{len(payload)} bytes, more than {MAX_PAYLOAD_BYTES}")
    if source.payload == "zigbee2mqtt" and _is_no_zigbee_reading(topic):
        return []
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        raise PayloadError("not UTF-8 text") from None
    if source.payload == "number":
        time_s = _time_s(source, None, arrival_s, properties, zone)
        return [
            Measured(name_of(source, source, topic, ""), "", source, time_s, number(text.strip(), source))
        ]
    try:
        data = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise PayloadError(f"not JSON ({error})") from None
    if not isinstance(data, dict | list):
        raise PayloadError(f"expected a JSON object, got {text[:40]}")
    time_s = _time_s(source, data, arrival_s, properties, zone)
    found = []
    for path, settings in fields_of(source).items():
        value = look_up(data, path)
        if value is not None:
            name = name_of(source, settings, topic, path)
            found.append(Measured(name, path, settings, time_s, number(value, settings)))
        elif isinstance(source.payload, JsonValue):
            raise PayloadError(f"no {path!r} in it")
    return found


def fields_of(source: Source) -> dict[str, SensorSettings]:
    """Path in the payload -> settings; "" is the whole payload."""
    if isinstance(source.payload, JsonValue):
        return {source.payload.json: source}
    return dict(source.fields or {"": source})


def name_of(source: Source, settings: SensorSettings, topic: str, path: str) -> str:
    """The sensor's name: from the template, or what the wildcards stand for and the field."""
    device = device_of(source, topic)
    field = path.replace(".", "_").lower() if source.payload == "tasmota" else path.rsplit(".", 1)[-1]
    if settings.name is not None:
        return topics.fill(settings.name, topic, device=device, field=field)
    return topics.clean_name("/".join([device, field] if source.fields else [device]))


def device_of(source: Source, topic: str) -> str:
    """zigbee2mqtt's friendly name, Tasmota's device, else the levels that wildcards stand for (or all
    levels).
    """
    levels = topic.split("/")
    if source.payload == "zigbee2mqtt":
        return "/".join(levels[1:])
    if source.payload == "tasmota" and len(levels) >= 3:
        return "/".join(levels[1:-1])
    return "/".join(topics.wild_levels(source.topic, topic) or levels)


def look_up(data: Any, path: str) -> Any:
    """The value at "a.b.0.c", None where the path ends early. A key with points in it is found as a whole,
    too.
    """
    if isinstance(data, dict):
        if path in data:
            return data[path]
        for key, value in data.items():
            if path.startswith(f"{key}."):
                return look_up(value, path[len(key) + 1 :])
    elif isinstance(data, list):
        head, _, rest = path.partition(".")
        if head.isdecimal() and int(head) < len(data):
            return look_up(data[int(head)], rest) if rest else data[int(head)]
    return None


def number(value: Any, settings: SensorSettings) -> float:
    """A finite number of sensible size, from a number, a number as text, or a state. Raises PayloadError."""
    if isinstance(value, bool | str):
        state = state_value(value, settings)
        if state is not None:
            return state
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise PayloadError(f"expected a number, got {str(value)[:40]}{_states_hint(value, settings)}")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise PayloadError(
            f"expected a number, got {str(value)[:40]!r}{_states_hint(value, settings)}"
        ) from None
    if not math.isfinite(result) or abs(result) > MAX_VALUE:
        raise PayloadError(f"{str(value)[:40]} is no measured value")
    return result


def state_value(value: bool | str, settings: SensorSettings) -> float | None:
    """What a state means as a number, if it is one. YAML's own reading of ON and OFF as true and false is
    undone.
    """
    if settings.states is None:
        return None
    text = str(value).strip().casefold()
    if settings.states == "default":
        return DEFAULT_STATES.get(text)
    for key, meaning in settings.states.items():
        if isinstance(key, bool):
            if text in (("true", "on", "yes") if key else ("false", "off", "no")):
                return meaning
        elif key.casefold() == text:
            return meaning
    return None


def parse_time(value: Any, zone: tzinfo | None) -> float:
    """Unix time of ISO 8601 text (in `zone` when it names none), or of Unix seconds or milliseconds."""
    try:
        if isinstance(value, str) and not _NUMERIC.fullmatch(value):
            moment = datetime.fromisoformat(value)
            time_s = (moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp()
        else:
            time_s = float("nan") if isinstance(value, bool) else float(value)
            time_s = time_s / 1000 if time_s > 1e11 else time_s
    except (TypeError, ValueError, OverflowError):
        time_s = float("nan")
    if not 0 <= time_s < LAST_TIME_S:
        raise PayloadError(f"expected a time, got {str(value)[:40]!r}")
    return time_s


def _time_s(
    source: Source, data: Any, arrival_s: float, properties: Mapping[str, str], zone: tzinfo | None
) -> float:
    if source.time_from == "arrival":
        return arrival_s
    if source.time_from.field is not None:
        value = look_up(data, source.time_from.field)
        if value is None:
            raise PayloadError(f"no time {source.time_from.field!r} in it")
        return parse_time(value, zone)
    name = source.time_from.user_property or ""
    if name not in properties:
        raise PayloadError(f"no MQTT 5 user property {name!r} on it")
    return parse_time(properties[name], zone)


def _is_no_zigbee_reading(topic: str) -> bool:
    levels = topic.split("/")
    return len(levels) > 1 and (levels[1] == "bridge" or levels[-1] in _NOT_ZIGBEE_READINGS)


def _states_hint(value: Any, settings: SensorSettings) -> str:
    if not isinstance(value, bool | str) or (
        isinstance(value, str) and value.strip().casefold() not in DEFAULT_STATES
    ):
        return ""
    return "; set states: default to read it as 1 or 0" if settings.states is None else ""
