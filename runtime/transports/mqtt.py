"""Requests and answers over MQTT 5 or 3.1.1, with paho (docs/mqtt.md is the protocol). Knows no model.

Threads: a supervisor connects and reconnects; paho's network thread decodes requests and hands them to the
service, never waiting for the model; each accepted request has one short-lived thread that publishes its
events. The service's queue bounds how many there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import secrets
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from paho.mqtt.client import (
    Client,
    ConnectFlags,
    DisconnectFlags,
    MQTTMessage,
    MQTTMessageInfo,
)
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.exception import MQTTException
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from ..errors import ConfigError, RequestError
from ..service import Done, Job, Service
from .mqtt_address import BrokerAddress, Topics
from .mqtt_client import CONNACK_TIMEOUT_S, LoopClient, connect, find_version, new_client
from .mqtt_requests import (
    Fields,
    Replies,
    audio_fields,
    audio_request,
    chat_fields,
    chat_request,
    user_properties,
)
from .openai_api import ApiError, ApiLimits
from .openai_reply import ReplyHead, error_object, failure
from .sound_folder import SoundFolder

log = logging.getLogger(__name__)

Version = Literal["auto", "5", "3.1.1"]

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0  # between attempts to connect
STEADY_S = 30.0  # a connection that lasted so long was a good one: the delays start anew
MAX_QUEUED_REPLIES = 512  # while the broker is slow or away
RECENT_REQUESTS = 64  # answered ones that are remembered, to know a redelivered copy


@dataclass(frozen=True)
class Route:
    """Where an answer goes and what it must carry."""

    topic: str
    correlation: bytes | None = None  # Correlation Data
    transaction: str | int | None = None


RequestKey = tuple[str, bytes | None, str | int | None, bytes]


class MqttTransport:
    """Serves `service` through a broker from `start()` until `close()`."""

    def __init__(
        self,
        service: Service,
        limits: ApiLimits,
        broker: BrokerAddress,
        topics: Topics,
        *,
        version: Version = "auto",
        ca_file: Path | None = None,
        sounds: SoundFolder | None = None,
    ) -> None:
        """sounds: where requests may name files."""
        if ca_file is not None and not (broker.tls and ca_file.is_file()):
            raise ConfigError(f"--mqtt-ca {ca_file}: needs an mqtts:// address and a readable file")
        self._service = service
        self._limits = limits
        self._broker = broker
        self._topics = topics
        self._ca_file = ca_file
        self._sounds = sounds
        self._finds_version = version == "auto"
        self._client = self._new_client(
            MQTTProtocolVersion.MQTTv311 if version == "3.1.1" else MQTTProtocolVersion.MQTTv5
        )
        self._closing = threading.Event()
        self._draining = False
        self._online = threading.Event()  # connected and subscribed
        self._changed = threading.Event()  # the connection ended, or its attempt failed: `_reason` says why
        self._reason = ""
        self._supervisor = threading.Thread(target=self._supervise, name="mqtt", daemon=True)
        self._lock = threading.Lock()  # guards the three below
        self._workers: set[threading.Thread] = set()
        self._running: set[RequestKey] = set()
        self._recent: OrderedDict[RequestKey, None] = OrderedDict()
        self._unsent: deque[MQTTMessageInfo] = deque(maxlen=MAX_QUEUED_REPLIES)

    def start(self) -> None:
        """Begin to connect, and keep at it; returns at once."""
        self._supervisor.start()

    def wait_online(self, timeout_s: float) -> bool:
        """Whether the daemon is connected and subscribed, after at most `timeout_s`."""
        return self._online.wait(timeout_s)

    def begin_drain(self) -> None:
        """Tell everyone that no more requests are taken. Those that come still are answered with an error."""
        self._draining = True
        if self._online.is_set():
            self._publish_availability()

    def close(self, timeout_s: float) -> None:
        """Wait for the answers that are being written, then leave the broker."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        while self._unsent and self._online.is_set():
            with contextlib.suppress(RuntimeError, ValueError):  # lost with its connection, or never queued
                self._unsent.popleft().wait_for_publish(max(0.01, deadline - time.monotonic()))
        self._closing.set()
        self._changed.set()
        self._supervisor.join(max(1.0, deadline - time.monotonic()))

    # --- the connection: supervisor thread

    def _supervise(self) -> None:
        failures = 0
        while not self._closing.is_set():
            started = time.monotonic()
            was_online = self._one_connection()
            if self._closing.is_set():
                return
            steady = was_online and time.monotonic() - started > STEADY_S
            failures = 1 if steady else failures + 1
            if was_online and failures > 1:  # mosquitto 2.0 does not tell that a session was taken over
                self._reason += "; does another daemon use this --node?"
            longest_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(failures - 1, 16))
            delay_s = longest_s * random.uniform(0.5, 1.0)
            log.warning("%s: %s; next attempt in %.1f s", self._broker, self._reason, delay_s)
            self._closing.wait(delay_s)

    def _one_connection(self) -> bool:
        """Connect, and return when the connection has ended (`_reason` says why): had it ever been online?"""
        self._changed.clear()
        self._reason = "no answer from the broker"
        try:
            if self._finds_version:
                self._use_version(find_version(self._bare_client(MQTTProtocolVersion.MQTTv5), self._broker))
            client = self._client
            connect(client, self._broker, max_request_bytes=self._limits.max_body_bytes)
        except (OSError, ValueError, MQTTException) as cause:
            self._reason = f"cannot connect ({cause})"
            return False
        client.loop_start()
        if not self._changed.wait(CONNACK_TIMEOUT_S) and self._online.is_set():
            self._changed.wait()
        was_online = self._online.is_set()
        self._online.clear()
        client.disconnect()  # lets the loop end, whatever is still queued
        client.loop_stop()
        return was_online

    def _use_version(self, version: MQTTProtocolVersion) -> None:
        if (
            version != self._client.protocol
        ):  # answers that still wait in the old client are lost: rare enough
            self._client = self._new_client(version)

    def _bare_client(self, version: MQTTProtocolVersion) -> LoopClient:
        # The same id at each start: the broker then ends a dead connection of this node at once.
        client_id = f"{self._topics.base}-{self._topics.node}".replace("/", "-")
        return new_client(self._broker, client_id, version, self._ca_file)

    def _new_client(self, version: MQTTProtocolVersion) -> LoopClient:
        client = self._bare_client(version)
        client.will_set(self._topics.availability, b"offline", qos=1, retain=True)
        client.max_queued_messages_set(MAX_QUEUED_REPLIES)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_loop_end = self._fail
        return client

    # --- callbacks: paho's network thread

    def _on_connect(
        self,
        client: Client,
        userdata: Any,
        flags: ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._fail(f"the broker refused the connection ({reason})")
        else:
            client.subscribe([(self._topics.request, 1), (self._topics.request_audio, 1)])

    def _on_subscribe(
        self,
        client: Client,
        userdata: Any,
        mid: int,
        reasons: list[ReasonCode],
        properties: Properties | None,
    ) -> None:
        if reasons[-1].is_failure and not reasons[0].is_failure:
            log.warning(
                "the broker refused the subscription to %s (%s): requests with sound files do not arrive",
                self._topics.request_audio,
                reasons[-1],
            )
        if reasons[0].is_failure:
            self._fail(f"the broker refused the subscription to {self._topics.request} ({reasons[0]})")
            return
        self._publish_availability()
        self._online.set()
        number = "5" if client.protocol == MQTTProtocolVersion.MQTTv5 else "3.1.1"
        log.info("connected to %s with MQTT %s, requests on %s", self._broker, number, self._topics.request)

    def _on_disconnect(
        self,
        client: Client,
        userdata: Any,
        flags: DisconnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        self._fail(f"the connection ended ({reason})")

    def _fail(self, reason: str) -> None:
        if not self._changed.is_set():  # the first reason is the cause
            self._reason = reason
            self._changed.set()

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        try:
            self._receive(message)
        except Exception:  # one odd message must not end the network thread
            log.exception("a message on %s could not be handled", message.topic)

    def _receive(self, message: MQTTMessage) -> None:
        if message.retain:
            log.info("a retained message on %s is ignored: requests are not retained", message.topic)
            return
        properties = message.properties
        correlation = getattr(properties, "CorrelationData", None)
        response_topic = getattr(properties, "ResponseTopic", None)
        refusal = None if response_topic is None else self._topics.refusal(response_topic)
        heard = message.topic == self._topics.request_audio
        own_topic = self._topics.response_audio if heard else self._topics.response
        topic = own_topic if response_topic is None or refusal else response_topic
        route = Route(topic, correlation)
        try:
            if refusal:
                raise ApiError(refusal, "ResponseTopic")
            payload = bytes(message.payload)
            fields = self._fields(payload, properties) if heard else chat_fields(payload, self._limits)
            route = Route(topic, correlation, fields.transaction)
            key = (topic, correlation, route.transaction, hashlib.sha256(payload).digest())
            if self._is_copy(key, message.dup):
                log.info("a second copy of a request on %s is dropped", message.topic)
                return
            head = ReplyHead(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), self._limits.model)
            if heard:
                request, replies = audio_request(fields, self._limits, head, self._sounds)
            else:
                request, replies = chat_request(fields, self._limits, head)
            job = self._service.submit(request)
        except RequestError as error:
            log.info("a request for %s is refused: %s", topic, error)
            self._publish(route, error_object(error))
            return
        worker = threading.Thread(
            target=self._work, args=(job, replies, route, key), name="mqtt-answer", daemon=True
        )
        with self._lock:
            self._workers.add(worker)
            self._running.add(key)
            self._recent[key] = None
            while len(self._recent) > RECENT_REQUESTS:
                self._recent.popitem(last=False)
        worker.start()

    def _fields(self, payload: bytes, properties: Properties | None) -> Fields:
        return audio_fields(payload, user_properties(properties), self._limits)

    def _is_copy(self, key: RequestKey, redelivered: bool) -> bool:
        """A request of which one is running, or (if the broker says so) one that was answered already."""
        named = key[1] is not None or key[2] is not None  # two anonymous requests may well be the same text
        with self._lock:
            return (key in self._running and (named or redelivered)) or (key in self._recent and redelivered)

    # --- answers: a thread for each request

    def _work(self, job: Job, replies: Replies, route: Route, key: RequestKey) -> None:
        try:
            self._answer(job, replies, route)
        except Exception:
            log.exception("an answer to %s failed", route.topic)
            self._publish(
                route, error_object(RequestError("internal_error", "an error inside the daemon; see its log"))
            )
        finally:
            job.cancel()
            with self._lock:
                self._running.discard(key)
                self._workers.discard(threading.current_thread())

    def _answer(self, job: Job, replies: Replies, route: Route) -> None:
        sequence = 0
        for event in job.events():
            if error := failure(event):
                numbered = {"sequence": sequence} if replies.stream else {}
                self._publish(route, error_object(error) | numbered)
                return
            for chunk in replies.chunks(event):
                if not replies.stream:
                    continue  # it is in the whole
                if not self._publish(route, chunk | {"sequence": sequence}):
                    log.warning(
                        "%s: %d answers wait for the broker, this one is given up",
                        route.topic,
                        MAX_QUEUED_REPLIES,
                    )
                    return
                sequence += 1
            if isinstance(event, Done) and not replies.stream:
                self._publish(route, replies.whole())

    # --- publishing: any thread

    def _publish(self, route: Route, reply: dict[str, Any]) -> bool:
        """Queue a reply; paho keeps it over a reconnection. False: too many are waiting, it is dropped."""
        if route.transaction is not None:
            reply = reply | {"transaction": route.transaction}
        client = self._client
        properties = None
        if client.protocol == MQTTProtocolVersion.MQTTv5:
            properties = Properties(PacketTypes.PUBLISH)
            properties.PayloadFormatIndicator = 1
            properties.ContentType = "application/json"
            if route.correlation is not None:
                properties.CorrelationData = route.correlation
        info = client.publish(route.topic, msgspec.json.encode(reply), qos=1, properties=properties)
        self._unsent.append(info)
        return info.rc != MQTTErrorCode.MQTT_ERR_QUEUE_SIZE

    def _publish_availability(self) -> None:
        word = b"offline" if self._draining else b"online"
        self._unsent.append(self._client.publish(self._topics.availability, word, qos=1, retain=True))
