"""The MQTT transport with real brokers (mosquitto, amqtt) and real clients, over a scripted engine."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.service import Service
from gemma_edge.runtime.transports import mqtt as mqtt_module
from gemma_edge.runtime.transports.mqtt import MqttTransport, Version
from gemma_edge.runtime.transports.mqtt_address import BrokerAddress, Topics
from gemma_edge.runtime.transports.openai_api import MAX_BODY_BYTES, ApiLimits

from .support.brokers import Mosquitto, amqtt_broker, mosquitto, tool
from .support.scripted_daemon import MODEL_NAME, scripted_service

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
    ) -> None:
        properties = None
        if reply_to is not None or correlation is not None:
            properties = Properties(PacketTypes.PUBLISH)
            if reply_to is not None:
                properties.ResponseTopic = reply_to
            if correlation is not None:
                properties.CorrelationData = correlation
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


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(broker: Mosquitto, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with serving(tmp_path_factory.mktemp("daemon"), broker.port) as running:
        yield running


def test_mqtt5_request_and_answer(broker: Mosquitto, daemon: Daemon) -> None:
    with peer(broker.port, "replies/me") as client:
        client.send(user("hello", max_tokens=50), reply_to="replies/me", correlation=b"\x00\xffid")
        message = client.wait(1)[0]
        assert text(message) == "You said: hello" and body(message)["object"] == "chat.completion"
        assert body(message)["model"] == MODEL_NAME and "transaction" not in body(message)
        assert message.properties.CorrelationData == b"\x00\xffid"
        assert message.properties.ContentType == "application/json"
        assert message.qos == 1 and not message.retain


def test_mqtt311_request_and_answer(broker: Mosquitto, daemon: Daemon) -> None:
    with peer(broker.port, TOPICS.response, v5=False) as client:
        client.send(user("hello", transaction="t-17"))
        client.send(user("again", transaction=18))
        first, second = client.wait(2)
        assert text(first) == "You said: hello" and body(first)["transaction"] == "t-17"
        assert text(second) == "You said: again" and body(second)["transaction"] == 18


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_the_daemon_itself_in_either_version(broker: Mosquitto, tmp_path: Path, version: Version) -> None:
    topics = Topics("home/edge", "n2")
    with (
        serving(tmp_path, broker.port, version=version, topics=topics),
        peer(broker.port, topics.response) as client,
    ):
        client.send(user("hello", transaction="x"), topic=topics.request)
        assert text(client.wait(1)[0]) == "You said: hello"


def test_plain_text_is_a_user_message(broker: Mosquitto, daemon: Daemon) -> None:
    with peer(broker.port, TOPICS.response) as client:
        for payload, said in [
            ("Is it warm?", "Is it warm?"),
            (" [1, 2] \n", "[1, 2]"),
            ('"hi" é'.encode(), '"hi" é'),
        ]:
            client.messages.clear()
            client.send(payload)
            assert text(client.wait(1)[0]) == f"You said: {said}"


BAD: list[tuple[bytes, str]] = [
    (b"", "invalid_request"),
    (b" \n", "invalid_request"),
    (b"\xff\xfe\x00", "invalid_request"),
    (b'{"messages": [', "invalid_request"),
    (b'{"messages": ' + b"[" * 20_000, "invalid_request"),
    (b'{"messages": []}', "invalid_request"),
    (b'{"nonsense": 1}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "x"}], "n": 2}', "invalid_request"),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "gpt-9"}', "model_not_found"),
    (b'{"messages": [{"role": "user", "content": "x"}], "transaction": [1]}', "invalid_request"),
    (b"word " * 20_000, "context_length_exceeded"),
    (b"x" * (MAX_BODY_BYTES + 1), "payload_too_large"),
    (b"fail", "internal_error"),
]


@pytest.mark.parametrize(("payload", "code"), BAD, ids=[repr(payload[:40]) for payload, _ in BAD])
def test_bad_payloads_are_answered_with_an_error(
    broker: Mosquitto, daemon: Daemon, payload: bytes, code: str
) -> None:
    with peer(broker.port, "replies/bad") as client:
        client.send(payload, reply_to="replies/bad", correlation=b"7")
        message = client.wait(1)[0]
        assert body(message)["error"]["code"] == code
        assert message.properties.CorrelationData == b"7"
        client.send("hello", reply_to="replies/bad")
        assert text(client.wait(2)[1]) == "You said: hello"


def test_errors_carry_the_transaction(broker: Mosquitto, daemon: Daemon) -> None:
    with peer(broker.port, TOPICS.response, v5=False) as client:
        client.send(user("x", transaction="t", temperature="hot"))
        answer = body(client.wait(1)[0])
        assert answer["transaction"] == "t" and answer["error"]["param"] == "temperature"


@pytest.mark.parametrize(
    "topic", ["$SYS/x", TOPICS.request, TOPICS.availability, "gemma-edge/other/request/chat", "x" * 2000]
)
def test_response_topics_that_would_do_harm_are_refused(
    broker: Mosquitto, daemon: Daemon, topic: str
) -> None:
    with peer(broker.port, TOPICS.response, TOPICS.request, "gemma-edge/other/request/chat") as client:
        client.send("hello", reply_to=topic, correlation=b"c")
        message = client.wait_for(lambda m: m.topic == TOPICS.response)
        assert (
            "Response Topic" in body(message)["error"]["message"]
            and message.properties.CorrelationData == b"c"
        )
        time.sleep(0.3)
        assert [m.topic for m in client.messages if m.payload != b"hello"] == [TOPICS.response]


def test_streaming_chunks_are_numbered(broker: Mosquitto, daemon: Daemon) -> None:
    with peer(broker.port, "replies/s") as client:
        request = user("repeat 10 word", stream=True, transaction=5, stream_options={"include_usage": True})
        client.send(request, reply_to="replies/s", correlation=b"s")
        client.wait_for(lambda m: bool(body(m).get("usage")))
        chunks = [body(message) for message in client.messages]
        assert [chunk["sequence"] for chunk in chunks] == list(range(len(chunks)))
        assert {chunk["transaction"] for chunk in chunks} == {5}
        assert {message.properties.CorrelationData for message in client.messages} == {b"s"}
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        assert said.split() == ["word"] * 10 and chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_tool_calls(broker: Mosquitto, daemon: Daemon) -> None:
    with peer(broker.port, TOPICS.response) as client:
        client.send(user("call lamp", tools=[{"type": "function", "function": {"name": "lamp"}}]))
        message = body(client.wait(1)[0])["choices"][0]["message"]
        assert message["tool_calls"][0]["function"]["name"] == "lamp"


def test_retained_requests_are_ignored(broker: Mosquitto, tmp_path: Path) -> None:
    topics = Topics("gemma-edge", "retained")
    with peer(broker.port, topics.response) as client:
        client.send("stale", topic=topics.request, retain=True)
        with serving(tmp_path, broker.port, topics=topics):
            client.stays_at(0)
            client.send("fresh", topic=topics.request)
            assert text(client.wait(1)[0]) == "You said: fresh"
        client.send(b"", topic=topics.request, retain=True)


def test_busy_is_answered_at_once_and_the_rest_is_served(broker: Mosquitto, tmp_path: Path) -> None:
    topics = Topics("gemma-edge", "busy")
    with (
        serving(tmp_path, broker.port, topics=topics, queue_size=2, step_s=0.02) as daemon,
        peer(broker.port, "replies/busy") as client,
    ):
        client.send(user("repeat 60 word"), topic=topics.request, reply_to="replies/busy", correlation=b"0")
        while daemon.service.health()["state"] != "generating":
            time.sleep(0.01)
        for number in range(1, 6):
            client.send(
                user("hello"), topic=topics.request, reply_to="replies/busy", correlation=b"%d" % number
            )
        refused = client.wait(3, timeout_s=1.0)  # the model is still busy with the first
        assert [body(m)["error"]["code"] for m in refused] == ["busy"] * 3
        assert [m.properties.CorrelationData for m in refused] == [b"3", b"4", b"5"]
        answers = client.wait(6, timeout_s=20)[3:]
        assert [m.properties.CorrelationData for m in answers] == [b"0", b"1", b"2"]


def test_a_repeated_request_that_is_still_running_is_answered_once(broker: Mosquitto, tmp_path: Path) -> None:
    topics = Topics("gemma-edge", "twice")
    with (
        serving(tmp_path, broker.port, topics=topics, step_s=0.02),
        peer(broker.port, topics.response) as client,
    ):
        for _ in range(2):
            client.send(user("repeat 40 word", transaction="same"), topic=topics.request)
        client.wait(1)
        client.stays_at(1, 1.5)
        client.send(user("repeat 4 word", transaction="same"), topic=topics.request)  # another payload
        client.wait(2)
        for _ in range(2):
            client.send("hello", topic=topics.request)  # nothing tells these two apart from two requests
        client.wait(4)


def test_a_redelivered_message_is_answered_once(broker: Mosquitto, daemon: Daemon) -> None:
    """Redelivery needs a lost acknowledgement, so the message is handed over with its DUP flag set."""
    with peer(broker.port, TOPICS.response) as client:
        client.send("hello once")
        client.wait(1)
        copy = paho.MQTTMessage(topic=TOPICS.request.encode())
        copy.payload, copy.qos, copy.dup = b"hello once", 1, True
        daemon.transport._receive(copy)
        client.stays_at(1)
        copy.payload = b"hello, lost before"
        daemon.transport._receive(copy)
        assert text(client.wait(2)[1]) == "You said: hello, lost before"


def test_availability_and_the_last_will(broker: Mosquitto, tmp_path: Path) -> None:
    topics = Topics("gemma-edge", "avail")
    with peer(broker.port, topics.availability) as client:
        with serving(tmp_path, broker.port, topics=topics):
            assert client.wait(1)[0].payload == b"online"
            with peer(broker.port, topics.availability) as late:
                message = late.wait(1)[0]
                assert message.payload == b"online" and message.retain
        assert [m.payload for m in client.wait(2)] == [b"online", b"offline"]
        with serving(tmp_path, broker.port, topics=topics) as daemon:
            client.wait(3)
            daemon.transport._client.socket().shutdown(2)  # type: ignore[union-attr]  # the line goes dead
            states = [m.payload for m in client.wait(5, timeout_s=15)]
            assert states[2:] == [b"online", b"offline", b"online"]  # the will, then the reconnection


def test_draining_says_offline_first_and_refuses_newcomers(broker: Mosquitto, tmp_path: Path) -> None:
    topics = Topics("gemma-edge", "drain")
    with (
        serving(tmp_path, broker.port, topics=topics, step_s=0.02) as daemon,
        peer(broker.port, topics.availability, topics.response) as client,
    ):
        client.send(user("repeat 60 word", transaction="running"), topic=topics.request)
        while daemon.service.health()["state"] != "generating":
            time.sleep(0.01)
        daemon.transport.begin_drain()
        drained = threading.Thread(target=daemon.service.drain, args=(20.0,))
        drained.start()
        client.wait_for(lambda m: m.payload == b"offline")
        client.send(user("hello", transaction="late"), topic=topics.request)
        refusal = client.wait_for(lambda m: b'"late"' in m.payload)
        assert body(refusal)["error"]["code"] == "shutting_down"
        assert not any(b'"running"' in m.payload for m in client.messages)
        drained.join()
        assert text(client.wait_for(lambda m: b'"running"' in m.payload)).split() == ["word"] * 60


def test_broker_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with mosquitto(tmp_path) as broker, serving(tmp_path, broker.port, step_s=0.02) as daemon:
        with peer(broker.port) as client:
            client.send(user("repeat 60 word", transaction="survivor"))
            while daemon.service.health()["state"] != "generating":
                time.sleep(0.01)
        broker.kill()
        time.sleep(2.5)  # the answer is ready while there is no broker
        assert daemon.service.health()["counts"]["completed"] == 1
        assert not daemon.transport.wait_online(0)
        broker.start()
        with peer(broker.port, TOPICS.response, TOPICS.availability) as client:
            client.wait_for(lambda m: m.payload == b"online", 20)
            answer = client.wait_for(lambda m: b'"survivor"' in m.payload)
            assert len(text(answer).split()) == 60
            client.send(user("hello", transaction="next"))
            assert text(client.wait_for(lambda m: b'"next"' in m.payload)) == "You said: hello"
    attempts = [record for record in caplog.records if "next attempt in" in record.getMessage()]
    assert 1 <= len(attempts) <= 8


GARBAGE = [b"\x30\x05\x00\x01a\xff\xff", b"\x00" * 10, b"\x90\x01", b"\xf0\xff\xff\xff\xff\xff"]


@pytest.mark.parametrize("garbage", GARBAGE, ids=repr)
def test_a_broker_that_talks_nonsense_does_not_end_the_daemon(tmp_path: Path, garbage: bytes) -> None:
    """It answers the CONNECT, sends what cannot be read, and stays silent: the daemon must try again."""
    connections: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(connection)
                    connection.recv(1000)
                    connection.sendall(b"\x20\x03\x00\x00\x00" + garbage + b"\xe0\x03")

        threading.Thread(target=accept, daemon=True).start()
        port = server.getsockname()[1]
        with serving(tmp_path, port, version="5", wait=False):
            deadline = time.monotonic() + 25
            while len(connections) < 2:
                assert time.monotonic() < deadline, "it did not come back"
                time.sleep(0.05)
        server.close()
        for connection in connections:
            connection.close()


def test_two_daemons_with_one_name_say_so_and_slow_down(
    broker: Mosquitto, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    topics = Topics("gemma-edge", "same")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        serving(tmp_path / "a", broker.port, topics=topics),
        serving(tmp_path / "b", broker.port, topics=topics),
    ):
        time.sleep(4)
    taken = [
        r.getMessage() for r in caplog.records if "does another daemon use this --node?" in r.getMessage()
    ]
    assert 1 <= len(taken) <= 6


def test_starting_before_the_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_module, "LONGEST_DELAY_S", 1.0)
    with mosquitto(tmp_path) as broker:
        broker.kill()
        with serving(tmp_path, broker.port, wait=False) as daemon:
            assert not daemon.transport.wait_online(0.5)
            broker.start()
            assert daemon.transport.wait_online(10)


def test_a_slow_reader_does_not_make_the_daemon_grow(
    broker: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the broker away, a stream is given up once too many chunks wait, and the model is free again."""
    monkeypatch.setattr(mqtt_module, "MAX_QUEUED_REPLIES", 20)
    with mosquitto(tmp_path) as own, serving(tmp_path, own.port, step_s=0.01) as daemon:
        with peer(own.port) as client:
            client.send(user("repeat 1500 word", stream=True))
            while daemon.service.health()["state"] != "generating":
                time.sleep(0.01)
        own.kill()
        deadline = time.monotonic() + 10
        while daemon.service.health()["counts"]["cancelled"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert any("given up" in record.getMessage() for record in caplog.records)


def test_amqtt_which_speaks_3_1_1_only(tmp_path: Path) -> None:
    with (
        amqtt_broker() as port,
        serving(tmp_path, port),
        peer(port, TOPICS.response, TOPICS.availability, v5=False) as client,
    ):
        client.send(user("hello", transaction="a"))
        answer = client.wait_for(lambda m: m.topic == TOPICS.response)
        assert text(answer) == "You said: hello" and body(answer)["transaction"] == "a"
        assert client.wait_for(lambda m: m.topic == TOPICS.availability).payload == b"online"


def test_a_wrong_password_is_logged_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run([tool("mosquitto_passwd"), "-b", "-c", str(passwords), "edge", "right"], check=True)
    passwords.chmod(0o644)
    with mosquitto(tmp_path, f"allow_anonymous false\nuser root\npassword_file {passwords}\n") as broker:
        wrong = BrokerAddress("127.0.0.1", broker.port, username="edge", password="wrong")
        with serving(tmp_path, broker.port, broker=wrong, wait=False) as daemon:
            assert not daemon.transport.wait_online(1.0)
        assert any("refused the connection (Not authorized)" in r.getMessage() for r in caplog.records)
        assert "wrong" not in caplog.text
        right = BrokerAddress("127.0.0.1", broker.port, username="edge", password="right")
        with serving(tmp_path, broker.port, broker=right):
            pass


def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    settings = f"allow_anonymous true\nuser root\ncertfile {certificate}\nkeyfile {key}\n"
    with mosquitto(tmp_path, settings) as broker:
        address = BrokerAddress("127.0.0.1", broker.port, tls=True)
        with serving(tmp_path, broker.port, broker=address, ca_file=certificate):
            pass
        with serving(tmp_path, broker.port, broker=address, wait=False) as distrustful:
            assert not distrustful.transport.wait_online(1.0)


def test_mosquitto_clients_with_mqtt5(broker: Mosquitto, daemon: Daemon) -> None:
    with listener(broker, "replies/cli", "-V", "5", "-F", "%D %p") as output:
        publish = [tool("mosquitto_pub"), "-p", str(broker.port), "-V", "5", "-q", "1", "-t", TOPICS.request]
        publish += [
            "-D",
            "publish",
            "response-topic",
            "replies/cli",
            "-D",
            "publish",
            "correlation-data",
            "q42",
        ]
        subprocess.run([*publish, "-m", "Is it warm?"], check=True, timeout=20)
        correlation, _, payload = output().partition(" ")
        assert correlation == "q42"
        assert json.loads(payload)["choices"][0]["message"]["content"] == "You said: Is it warm?"


def test_mosquitto_clients_with_mqtt311(broker: Mosquitto, daemon: Daemon) -> None:
    with listener(broker, TOPICS.response) as output:
        request = json.dumps(user("hello", transaction="abc"))
        publish = [
            tool("mosquitto_pub"),
            "-p",
            str(broker.port),
            "-q",
            "1",
            "-t",
            TOPICS.request,
            "-m",
            request,
        ]
        subprocess.run(publish, check=True, timeout=20)
        answer = json.loads(output())
        assert answer["transaction"] == "abc" and answer["choices"][0]["finish_reason"] == "stop"


@contextmanager
def listener(broker: Mosquitto, topic: str, *arguments: str) -> Iterator[Callable[[], str]]:
    """mosquitto_sub, subscribed already; the function waits for one message and gives what it prints."""
    before = broker.log().count(f"\t{topic} (QoS 1)")
    command = [tool("mosquitto_sub"), "-p", str(broker.port), "-q", "1", "-C", "1", "-t", topic, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 10
        while broker.log().count(f"\t{topic} (QoS 1)") == before:
            assert time.monotonic() < deadline, "mosquitto_sub did not subscribe"
            time.sleep(0.02)

        def output() -> str:
            return process.communicate(timeout=20)[0].strip()

        yield output
    finally:
        process.kill()
        process.wait()


def test_settings_are_checked() -> None:
    for base, node in [
        ("a/+", "n"),
        ("a//b", "n"),
        ("$SYS", "n"),
        ("a", "n/m"),
        ("a", ""),
        ("a", "n#"),
        ("", "n"),
    ]:
        with pytest.raises(ConfigError):
            Topics(base, node)
