"""Connections to a broker, MQTT 5 or else 3.1.1, and questions to the daemon over one of them.

Knows the daemon's protocol (docs/mqtt.md); not what the questions are about. Threads: paho's network thread
runs every callback; any other thread may publish or ask.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import random
import ssl
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from paho.mqtt.client import Client, MQTTMessage, MQTTMessageInfo
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from ...runtime.transports.mqtt_address import BrokerAddress, Topics
from .summarizer import AskError

log = logging.getLogger(__name__)

KEEPALIVE_S = 30
CONNECT_TIMEOUT_S = 10.0
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0
GOODBYE_S = 10.0
MAX_QUEUED = 2000
# The daemon may become free or come back: worth waiting for.
PASSING = ("busy", "shutting_down", "cancelled", "offline")


@dataclass(frozen=True)
class Message:
    """What the application sees of an incoming message."""

    topic: str
    payload: bytes
    retained: bool
    properties: Mapping[str, str]  # MQTT 5 user properties
    correlation: bytes | None = None


class Stopped(Exception):
    """The application is being stopped."""


class Connection:
    """One client of the broker, reconnecting by itself, its subscriptions kept. Use with `with`."""

    def __init__(
        self,
        broker: BrokerAddress,
        subscriptions: Sequence[str],
        on_message: Callable[[Message], None],
        *,
        ca_file: str | None = None,
        stop: threading.Event | None = None,
        role: str = "sensor-summary",
    ) -> None:
        self.broker = broker
        self.subscriptions = tuple(dict.fromkeys(subscriptions))
        self._on_message = on_message
        self._ca_file = ca_file
        self._stop = stop or threading.Event()
        self._client_id = f"{role}-{uuid.uuid4().hex[:12]}"
        self._client: Client | None = None
        self._unconfirmed: deque[MQTTMessageInfo] = deque(maxlen=MAX_QUEUED)

    def __enter__(self) -> Connection:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_v5(self) -> bool:
        return self._client is not None and self._client.protocol == MQTTProtocolVersion.MQTTv5

    def connect(self) -> None:
        """Connect and subscribe, trying for as long as it takes. Raises Stopped."""
        delay_s = FIRST_DELAY_S
        versions = [MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311]
        while True:
            problem = self._try(versions[0])
            if problem is None:
                return
            if problem == "Unsupported protocol version" and len(versions) > 1:
                log.info("%s does not speak MQTT 5, trying 3.1.1", self.broker)
                versions.pop(0)
                continue
            log.warning("%s: %s; next attempt in %.0f s", self.broker, problem, delay_s)
            if self._stop.wait(delay_s * random.uniform(0.7, 1.0)):
                raise Stopped
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        properties: Properties | None = None,
        wait_s: float = 0.0,
    ) -> bool:
        """Publish with QoS 1. With `wait_s`: has the broker got it by then? Else: is it queued?"""
        assert self._client is not None, "publish() before connect()"
        info = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        if info.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            return False
        self._unconfirmed.append(info)
        return not wait_s or _confirmed([info], wait_s)

    def close(self) -> None:
        """Leave the broker, once it has what was published (or is not there to take it)."""
        if self._client is not None:
            if self._client.is_connected():
                _confirmed(list(self._unconfirmed), GOODBYE_S)
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def _try(self, version: MQTTProtocolVersion) -> str | None:
        """One attempt; None: connected and subscribed, else what went wrong."""
        is_v5 = version == MQTTProtocolVersion.MQTTv5
        client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if is_v5 else True,
            protocol=version,
        )
        client.max_queued_messages_set(MAX_QUEUED)
        client.reconnect_delay_set(int(FIRST_DELAY_S), int(LONGEST_DELAY_S))
        if self.broker.username:
            client.username_pw_set(self.broker.username, self.broker.password)
        if self.broker.tls:
            client.tls_set(ca_certs=self._ca_file)
        outcome: queue.Queue[str | None] = queue.Queue(1)

        def settle(problem: str | None) -> None:
            """The first outcome counts; later ones are of reconnections, which paho sees to."""
            with contextlib.suppress(queue.Full):
                outcome.put_nowait(problem)
            if problem is not None and self._client is client:
                log.warning("%s: %s", self.broker, problem)

        def on_connect(
            _client: Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
        ) -> None:
            if reason.is_failure:
                settle(str(reason))
            elif self.subscriptions:
                client.subscribe([(topic, 1) for topic in self.subscriptions])
            else:
                settle(None)

        def on_subscribe(
            _client: Client, _data: Any, _mid: int, reasons: list[ReasonCode], _properties: Any
        ) -> None:
            refused = [t for t, reason in zip(self.subscriptions, reasons, strict=False) if reason.is_failure]
            if refused:
                log.error("%s refuses the subscription to %s", self.broker, ", ".join(refused))
            settle(None)

        def on_disconnect(
            _client: Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
        ) -> None:
            if reason.is_failure:
                settle(f"the connection ended ({reason})")

        client.on_connect, client.on_subscribe, client.on_disconnect = on_connect, on_subscribe, on_disconnect
        client.on_message = self._receive
        try:
            # No properties: a broker that does not know MQTT 5 would wait for more bytes instead of refusing.
            client.connect(self.broker.host, self.broker.port, KEEPALIVE_S)
        except (OSError, ssl.SSLError, ValueError) as error:
            return f"cannot connect ({error})"
        client.loop_start()
        try:
            problem = outcome.get(timeout=CONNECT_TIMEOUT_S)
        except queue.Empty:
            problem = "no answer from the broker"
        if problem is None:
            self._client = client
        else:
            client.disconnect()
            client.loop_stop()
        return problem

    def _receive(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        properties = message.properties
        user = dict(getattr(properties, "UserProperty", None) or [])
        correlation = getattr(properties, "CorrelationData", None)
        try:
            self._on_message(
                Message(message.topic, bytes(message.payload), message.retain, user, correlation)
            )
        except Exception:  # one odd message must not end the network thread
            log.exception("a message on %s could not be handled", message.topic)


def _confirmed(messages: Iterable[MQTTMessageInfo], timeout_s: float) -> bool:
    """Whether the broker has all of them by then."""
    deadline = time.monotonic() + timeout_s
    for info in messages:
        while not info.is_published():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
    return True


class DaemonClient:
    """Asks the daemon over a connection that subscribes `topics_wanted` and passes messages to `handle`."""

    def __init__(
        self, topics: Topics, *, max_tokens: int, timeout_s: float, patience_s: float, stop: threading.Event
    ) -> None:
        self.topics = topics
        self.connection: Connection | None = None
        self._max_tokens = max_tokens
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._stop = stop
        self._own_response = f"{topics.response}/{uuid.uuid4().hex[:12]}"
        self._waiting: dict[str, queue.Queue[dict[str, Any]]] = {}
        self._online = threading.Event()
        self._changes = 0  # of the daemon's availability

    @property
    def topics_wanted(self) -> list[str]:
        return [self.topics.availability, self.topics.response, self._own_response]

    def handle(self, message: Message) -> bool:
        """Take a message of the daemon; False: it is not one."""
        if message.topic == self.topics.availability:
            self._changes += 1
            (self._online.set if message.payload == b"online" else self._online.clear)()
            return True
        if message.topic not in (self.topics.response, self._own_response):
            return False
        try:
            data = msgspec.json.decode(message.payload)
        except (msgspec.DecodeError, RecursionError):
            data = None
        if isinstance(data, dict):
            ticket = (
                message.correlation.decode(errors="replace")
                if message.correlation
                else data.get("transaction")
            )
            waiting = self._waiting.get(ticket) if isinstance(ticket, str) else None
            if waiting is not None:
                waiting.put(data)
        return True

    def ask(self, messages: list[dict[str, Any]], *, temperature: float, seed: int | None) -> tuple[str, str]:
        """(text, model name). Waits for a busy or absent daemon while patience lasts. Raises AskError."""
        deadline, delay_s = time.monotonic() + self._patience_s, FIRST_DELAY_S
        while True:
            try:
                return self._ask_once(messages, temperature, seed, deadline)
            except AskError as error:
                left_s = deadline - time.monotonic()
                if error.code not in PASSING or left_s <= 0:
                    raise
                pause_s = min(delay_s * random.uniform(0.5, 1.0), left_s)
                log.info("the daemon is %s, next attempt in %.1f s", error.code, pause_s)
            if self._stop.wait(pause_s):
                raise AskError("stopped", "the application is being stopped")
            delay_s = min(delay_s * 2, LONGEST_DELAY_S)

    def _ask_once(
        self, messages: list[dict[str, Any]], temperature: float, seed: int | None, deadline: float
    ) -> tuple[str, str]:
        while not self._online.wait(0.2):
            if self._stop.is_set():
                raise AskError("stopped", "the application is being stopped")
            if time.monotonic() > deadline:
                raise AskError("offline", f"no daemon is online at {self.topics.availability}")
        ticket = uuid.uuid4().hex
        body: dict[str, Any] = {
            "messages": messages,
            "temperature": temperature,
            "seed": seed,
            "max_tokens": self._max_tokens,
            "timeout_s": self._timeout_s,
        }
        assert self.connection is not None, "ask() before the connection is there"
        properties = None
        if self.connection.is_v5:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = self._own_response
            properties.CorrelationData = ticket.encode()
        else:
            body["transaction"] = ticket
        answer: queue.Queue[dict[str, Any]] = queue.Queue()
        self._waiting[ticket] = answer
        changes = self._changes
        try:
            payload = json.dumps(body, ensure_ascii=False).encode()
            if not self.connection.publish(self.topics.request, payload, properties=properties):
                raise AskError("busy", "too many messages wait for the broker")
            return self._wait(answer, changes)
        finally:
            del self._waiting[ticket]

    def _wait(self, answer: queue.Queue[dict[str, Any]], changes: int) -> tuple[str, str]:
        give_up = time.monotonic() + self._timeout_s + 5.0
        while True:
            try:
                return _content(answer.get(timeout=0.2))
            except queue.Empty:
                pass
            if self._stop.is_set():
                raise AskError("stopped", "the application is being stopped")
            if self._changes != changes:
                raise AskError("offline", "the daemon went away while it was answering")
            if time.monotonic() > give_up:
                raise AskError("timeout", f"no answer within {self._timeout_s:.0f} s")


def _content(data: dict[str, Any]) -> tuple[str, str]:
    """The text of a chat completion. Raises AskError for an error object, or what is no completion."""
    error = data.get("error")
    if isinstance(error, dict):
        raise AskError(str(error.get("code")), str(error.get("message")))
    try:
        choice = data["choices"][0]
        text = choice["message"]["content"] or ""
        if choice.get("finish_reason") == "length":
            log.warning("the answer was cut off at max_tokens")
        return str(text), str(data.get("model"))
    except (KeyError, IndexError, TypeError):
        raise AskError("invalid_answer", "the daemon's answer is no chat completion") from None
