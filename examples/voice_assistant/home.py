"""The home: carries out calls over MQTT, and keeps the last message of every topic that can be read.

Threads: a supervisor connects and reconnects; paho's network thread takes messages; any thread may call. A
command that the broker does not confirm in time has failed: its connection is given up with it, so that it is
not delivered minutes later, when nobody wants it any more.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paho.mqtt.client import MQTTMessage
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.exception import MQTTException
from paho.mqtt.reasoncodes import ReasonCode

from ...runtime.transports.mqtt_address import BrokerAddress
from ...runtime.transports.mqtt_client import (
    CONNACK_TIMEOUT_S,
    KEEPALIVE_S,
    LoopClient,
    find_version,
    new_client,
)
from . import tools as calls
from .config import Config, Tool
from .tools import CallError, Outgoing, Reading

log = logging.getLogger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 0.5, 30.0  # between attempts to connect
CONFIRM_S = 2.0  # for the broker to confirm a command
MAX_READINGS = 1000  # topics
MAX_PAYLOAD_BYTES = 64 << 10


@dataclass(frozen=True)
class Outcome:
    """What came of a call. result: what the model is told; done: what was published or read, for people."""

    result: dict[str, Any]
    done: str
    ok: bool


class Home:
    """The declared tools, and the broker behind them. `with` connects in the background and leaves."""

    def __init__(self, config: Config) -> None:
        self.tools: Sequence[Tool] = config.tools
        self.declarations = [calls.declaration(tool) for tool in config.tools]
        self._link = Link(
            config.broker_address,
            calls.read_filters(config.tools),
            Path(config.ca_file) if config.ca_file else None,
        )

    def __enter__(self) -> Home:
        self._link.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def wait_online(self, timeout_s: float) -> bool:
        return self._link.online.wait(timeout_s)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Outcome:
        """Carry a call out. Never raises for what the model or the broker did wrong: the result says it."""
        try:
            tool = calls.find_tool(self.tools, name)
            values = calls.check_arguments(tool, arguments)
            reading = calls.reading(tool, values)
            if reading is not None:
                text = self._link.read(reading)
                return Outcome({"value": text}, f"{reading.topic}: {text}", True)
            messages = calls.messages(tool, values)
            for message in messages:
                self._link.publish(message)
        except CallError as error:
            log.warning("%s(%s): %s", name, json.dumps(arguments, ensure_ascii=False)[:200], error)
            return Outcome({"error": str(error)}, str(error), False)
        return Outcome({"status": "ok"}, "; ".join(map(str, messages)), True)


class Link:
    """A connection to the broker that is made anew whenever it is lost."""

    def __init__(self, broker: BrokerAddress, filters: Sequence[str], ca_file: Path | None) -> None:
        self._broker, self._filters, self._ca_file = broker, list(filters), ca_file
        self._client: LoopClient | None = None
        self.online = threading.Event()  # connected and subscribed
        self._ended = threading.Event()  # this connection, or the attempt: `_reason` says why
        self._reason = ""
        self._closing = threading.Event()
        self._lock = threading.Lock()  # of the readings
        self._readings: OrderedDict[str, tuple[bytes, float]] = OrderedDict()  # topic -> payload, time
        self._supervisor = threading.Thread(target=self._supervise, name="home-mqtt", daemon=True)

    def start(self) -> None:
        self._supervisor.start()

    def close(self) -> None:
        self._closing.set()
        self._ended.set()
        self._supervisor.join(10)

    def publish(self, message: Outgoing) -> None:
        """Publish with QoS 1 and wait until the broker has it. Raises CallError."""
        client = self._client
        if client is None or not self.online.is_set():
            raise CallError("unreachable")
        try:
            info = client.publish(message.topic, message.payload, qos=1, retain=message.retain)
            if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
                info.wait_for_publish(CONFIRM_S)
            confirmed = info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS and info.is_published()
        except (RuntimeError, ValueError):  # the connection ended meanwhile
            confirmed = False
        if not confirmed:
            self._end(f"no confirmation within {CONFIRM_S:g} s")
            raise CallError("unreachable")

    def read(self, reading: Reading) -> str:
        """The last message. Raises CallError when there is none, or it is too old."""
        with self._lock:
            found = self._readings.get(reading.topic)
        if found is None:
            raise CallError("no value" if self.online.is_set() else "unreachable")
        payload, at = found
        age_s = time.monotonic() - at
        if reading.max_age_s is not None and age_s > reading.max_age_s:
            raise CallError(f"its last value is {age_s / 60:.0f} minutes old")
        return calls.value_of(payload, reading)

    def _supervise(self) -> None:
        delay_s = FIRST_DELAY_S
        while not self._closing.is_set():
            if self._one_connection():
                delay_s = FIRST_DELAY_S
            if self._closing.is_set():
                return
            log.warning("%s: %s; next attempt in %.1f s", self._broker, self._reason, delay_s)
            self._closing.wait(delay_s * random.uniform(0.7, 1.0))
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def _one_connection(self) -> bool:
        """Connect, and return when the connection has ended: had it been online?"""
        self._ended.clear()
        self._reason = "no answer from the broker"
        client_id = f"voice-assistant-{uuid.uuid4().hex[:12]}"
        try:
            probe = new_client(self._broker, client_id, MQTTProtocolVersion.MQTTv5, self._ca_file)
            client = new_client(self._broker, client_id, find_version(probe, self._broker), self._ca_file)
            client.on_connect = self._on_connect
            client.on_subscribe = self._on_subscribe
            client.on_disconnect = lambda c, u, f, reason, p: self._end(f"the connection ended ({reason})")
            client.on_message = self._on_message
            client.on_loop_end = self._end
            self._client = client
            client.connect(self._broker.host, self._broker.port, KEEPALIVE_S)
        except (OSError, ValueError, MQTTException) as cause:
            self._reason = f"cannot connect ({cause})"
            return False
        client.loop_start()
        if not self._ended.wait(CONNACK_TIMEOUT_S) and self.online.is_set():
            self._ended.wait()
        was_online = self.online.is_set()
        self.online.clear()
        client.disconnect()
        client.loop_stop()
        return was_online

    def _end(self, reason: str) -> None:
        if not self._ended.is_set():  # the first reason is the cause
            self._reason = reason
            self.online.clear()
            self._ended.set()

    # --- callbacks: paho's network thread

    def _on_connect(
        self, client: Any, userdata: Any, flags: Any, reason: ReasonCode, properties: Any
    ) -> None:
        if reason.is_failure:
            self._end(f"the broker refused the connection ({reason})")
        elif self._filters:
            client.subscribe([(topic, 1) for topic in self._filters])
        else:
            self._is_online()

    def _on_subscribe(
        self, client: Any, userdata: Any, mid: int, reasons: list[ReasonCode], properties: Any
    ) -> None:
        for topic, reason in zip(self._filters, reasons, strict=False):
            if reason.is_failure:
                log.error("%s refuses the subscription to %s (%s)", self._broker, topic, reason)
        self._is_online()

    def _is_online(self) -> None:
        log.info("connected to %s", self._broker)
        self.online.set()

    def _on_message(self, client: Any, userdata: Any, message: MQTTMessage) -> None:
        payload = bytes(message.payload)
        if len(payload) > MAX_PAYLOAD_BYTES:
            log.warning("%s: %d bytes are too many for a reading", message.topic, len(payload))
            return
        with self._lock:
            if payload:
                self._readings[message.topic] = (payload, time.monotonic())
                self._readings.move_to_end(message.topic)
                while len(self._readings) > MAX_READINGS:
                    self._readings.popitem(last=False)
            else:  # how a retained message is cleared
                self._readings.pop(message.topic, None)
