"""The MQTT connection with real brokers: restarts, last will, versions, passwords, TLS, odd brokers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gemma_edge.runtime.transports import mqtt as mqtt_module
from gemma_edge.runtime.transports.mqtt_address import BrokerAddress, Topics

from .support.brokers import Mosquitto, amqtt_broker, mosquitto, tool
from .support.mqtt_peer import TOPICS, body, peer, serving, text, user


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
