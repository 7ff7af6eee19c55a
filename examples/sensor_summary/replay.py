"""Publishes a recorded log over MQTT at its own pace or faster, with the recorded time on a clock topic.

A log is JSON lines, gzipped or not: `{"time": ISO 8601, "topic": …, "payload": text}`, in order of time.
Before the messages of a moment that moment is published to the clock topic; on MQTT 5 each message also
carries it as the user property `timestamp`.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import msgspec
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from ...runtime.errors import ConfigError
from .mqtt import Connection

MAX_UNCONFIRMED = 100  # messages on their way to the broker
CONFIRM_TIMEOUT_S = 30.0


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a log."""

    time: datetime
    topic: str
    payload: str


def read_log(path: Path) -> Iterator[Record]:
    """The records of a log file. Raises ConfigError naming the line."""
    decoder = msgspec.json.Decoder(Record)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            last: datetime | None = None
            for number, line in enumerate(file, 1):
                try:
                    record = decoder.decode(line)
                except msgspec.DecodeError as cause:
                    raise ConfigError(
                        f"{path}, line {number}: expected time, topic and payload ({cause})"
                    ) from cause
                if record.time.tzinfo is None or (last is not None and record.time < last):
                    raise ConfigError(f"{path}, line {number}: expected times with their offset, in order")
                last = record.time
                yield record
    except (OSError, EOFError) as cause:
        raise ConfigError(f"{path}: cannot be read ({cause})") from cause


def replay(
    records: Iterator[Record],
    connection: Connection,
    clock_topic: str,
    *,
    speed: float,
    stop: threading.Event,
) -> int:
    """Publish all records; `speed` is recorded seconds per second, 0: as fast as the broker takes them.

    Returns how many were published. Ends early when `stop` is set.
    """
    count = 0
    began: datetime | None = None
    began_s = time.monotonic()
    moment: datetime | None = None
    for record in records:
        began = began or record.time
        if speed:
            due_s = began_s + (record.time - began).total_seconds() / speed
            stop.wait(max(0.0, due_s - time.monotonic()))
        if stop.is_set():
            return count
        if record.time != moment:
            moment = record.time
            connection.publish(clock_topic, moment.isoformat().encode())
        properties = None
        if connection.is_v5:
            properties = Properties(PacketTypes.PUBLISH)
            properties.UserProperty = ("timestamp", record.time.isoformat())
        count += 1
        confirm = count % MAX_UNCONFIRMED == 0
        sent = connection.publish(
            record.topic,
            record.payload.encode(),
            properties=properties,
            wait_s=CONFIRM_TIMEOUT_S if confirm else 0.0,
        )
        if not sent:
            raise ConfigError(f"{connection.broker} takes no more messages; is it still there?")
    return count
