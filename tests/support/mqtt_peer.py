"""An MQTT client and a daemon's transport for tests: what is sent, what comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from gemma_edge.runtime.service import Service
from gemma_edge.runtime.transports.mqtt import MqttTransport, Version
from gemma_edge.runtime.transports.mqtt_address import BrokerAddress, Topics
from gemma_edge.runtime.transports.openai_api import ApiLimits

from .scripted_daemon import MODEL_NAME, scripted_service

TOPICS = Topics("gemma-edge", "node1")


class Daemon:
    """The transport and the service behind it."""

    def __init__(self, transport: MqttTransport, service: Service) -> None:
        self.transport, self.service = transport, service


@contextmanager
def serving(
    folder: Path,
    port: int,
    *,
    version: Version = "auto",
    queue_size: int = 8,
    step_s: float = 0.0,
    topics: Topics = TOPICS,
    broker: BrokerAddress | None = None,
    ca_file: Path | None = None,
    wait: bool = True,
) -> Iterator[Daemon]:
    service, _ = scripted_service(folder, queue_size=queue_size, step_s=step_s)
    transport = MqttTransport(
        service,
        ApiLimits(MODEL_NAME),
        broker or BrokerAddress("127.0.0.1", port),
        topics,
        version=version,
        ca_file=ca_file,
    )
    transport.start()
    try:
        assert not wait or transport.wait_online(10), "the daemon did not get online"
        yield Daemon(transport, service)
    finally:
        transport.begin_drain()
        service.drain(0.0)
        transport.close(5)


class Peer:
    """A client of the daemon: remembers every message it gets."""

    def __init__(self, port: int, *topics: str, v5: bool = True) -> None:
        self._client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5 if v5 else paho.MQTTv311
        )
        self._ready = threading.Event()
        self._got = threading.Condition()
        self.messages: list[paho.MQTTMessage] = []
        self._client.on_message = self._on_message
        self._client.on_connect = lambda client, *_: client.subscribe(
            [(topic, 1) for topic in topics or ("nothing",)]
        )
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._ready.wait(10)

    def _on_message(self, client: Any, userdata: Any, message: paho.MQTTMessage) -> None:
        with self._got:
            self.messages.append(message)
            self._got.notify_all()

    def send(
        self,
        payload: Any,
        *,
        topic: str = TOPICS.request,
        reply_to: str | None = None,
        correlation: bytes | None = None,
        retain: bool = False,
        user: dict[str, str] | None = None,
    ) -> None:
        properties = None
        if reply_to is not None or correlation is not None or user:
            properties = Properties(PacketTypes.PUBLISH)
            if reply_to is not None:
                properties.ResponseTopic = reply_to
            if correlation is not None:
                properties.CorrelationData = correlation
            if user:
                properties.UserProperty = list(user.items())
        raw = payload if isinstance(payload, str | bytes) else json.dumps(payload)
        self._client.publish(topic, raw, qos=1, properties=properties, retain=retain).wait_for_publish(10)

    def wait(self, count: int, timeout_s: float = 10.0) -> list[paho.MQTTMessage]:
        """The first `count` messages."""
        with self._got:
            assert self._got.wait_for(lambda: len(self.messages) >= count, timeout_s), (
                f"{len(self.messages)} messages of {count}: {[bytes(m.payload)[:200] for m in self.messages]}"
            )
            return self.messages[:count]

    def wait_for(
        self, holds: Callable[[paho.MQTTMessage], bool], timeout_s: float = 10.0
    ) -> paho.MQTTMessage:
        """The first message of which `holds` is true."""
        with self._got:
            assert self._got.wait_for(lambda: any(map(holds, self.messages)), timeout_s), (
                f"not among {[bytes(m.payload)[:200] for m in self.messages]}"
            )
            return next(message for message in self.messages if holds(message))

    def stays_at(self, count: int, for_s: float = 0.7) -> None:
        time.sleep(for_s)
        assert len(self.messages) == count, [bytes(m.payload)[:200] for m in self.messages]

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@contextmanager
def peer(port: int, *topics: str, v5: bool = True) -> Iterator[Peer]:
    client = Peer(port, *topics, v5=v5)
    try:
        yield client
    finally:
        client.close()


def body(message: paho.MQTTMessage) -> dict[str, Any]:
    return json.loads(message.payload)


def text(message: paho.MQTTMessage) -> str:
    return body(message)["choices"][0]["message"]["content"]


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}
