"""The MQTT protocol with a real broker (mosquitto) and real clients, over a scripted engine."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.transports.mqtt import Version
from gemma_edge.runtime.transports.mqtt_address import Topics
from gemma_edge.runtime.transports.openai_api import MAX_BODY_BYTES

from .support.brokers import Mosquitto, mosquitto, tool
from .support.mqtt_peer import TOPICS, Daemon, body, peer, serving, text, user
from .support.scripted_daemon import MODEL_NAME


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
