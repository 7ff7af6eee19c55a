"""Makes paho clients and connects them: TLS, passwords, MQTT versions. Knows no topic and no request."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from .mqtt_address import BrokerAddress

KEEPALIVE_S = 30
CONNACK_TIMEOUT_S = 10.0
ROOM_BYTES = 3 * 1024 * 1024  # between a request's cap and the packets that the broker drops (MQTT 5)


class LoopClient(Client):
    """paho's client, which tells when its network thread ends, even by an exception."""

    on_loop_end: Callable[[str], None] | None = None

    def loop_forever(self, timeout: float = 1.0, retry_first_connection: bool = False) -> MQTTErrorCode:
        reason = "the connection ended"
        try:
            return super().loop_forever(timeout, retry_first_connection)
        except Exception as cause:  # paho raises on packets that it cannot read
            reason = f"the connection broke ({type(cause).__name__}: {cause})"
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        finally:
            if self.on_loop_end is not None:
                self.on_loop_end(reason)


def _send_at_once(client: Client, userdata: Any, sock: Any) -> None:
    """No Nagle delay: a chunk must not wait for the acknowledgement of the last one."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def new_client(
    broker: BrokerAddress, client_id: str, version: MQTTProtocolVersion, ca_file: Path | None
) -> LoopClient:
    """A client that keeps no session and does not reconnect by itself."""
    client = LoopClient(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        clean_session=None if version == MQTTProtocolVersion.MQTTv5 else True,
        protocol=version,
        reconnect_on_failure=False,
    )
    client.on_socket_open = _send_at_once
    if broker.username:
        client.username_pw_set(broker.username, broker.password)
    if broker.tls:
        client.tls_set(ca_certs=str(ca_file) if ca_file else None)
    return client


def connect(client: Client, broker: BrokerAddress, *, max_request_bytes: int) -> None:
    """Send the CONNECT; its answer comes to the client's callbacks. Raises OSError or ValueError."""
    if client.protocol == MQTTProtocolVersion.MQTTv5:
        properties = Properties(PacketTypes.CONNECT)
        properties.MaximumPacketSize = max_request_bytes + ROOM_BYTES
        client.connect(broker.host, broker.port, KEEPALIVE_S, clean_start=True, properties=properties)
    else:
        client.connect(broker.host, broker.port, KEEPALIVE_S)


def find_version(probe: Client, broker: BrokerAddress) -> MQTTProtocolVersion:
    """Ask with a bare MQTT 5 CONNECT: every old broker refuses it, while some hang on one with a will.

    probe: a fresh MQTT 5 client. Raises what `connect` raises.
    """
    answers: list[ReasonCode] = []
    probe.on_connect = lambda client, userdata, flags, reason, properties: answers.append(reason)
    probe.connect(broker.host, broker.port, KEEPALIVE_S, clean_start=True)
    deadline = time.monotonic() + CONNACK_TIMEOUT_S
    while not answers and time.monotonic() < deadline:
        if probe.loop(0.2) != MQTTErrorCode.MQTT_ERR_SUCCESS:
            break
    probe.disconnect()
    is_old = bool(answers) and answers[0] == "Unsupported protocol version"
    return MQTTProtocolVersion.MQTTv311 if is_old else MQTTProtocolVersion.MQTTv5
