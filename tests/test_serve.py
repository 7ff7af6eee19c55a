"""`gemma-edge serve` as a process: start, sockets, signals, systemd; scripted and with the real engine."""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from gemma_edge.runtime import serve
from gemma_edge.runtime.errors import ConfigError, GemmaEdgeError
from gemma_edge.runtime.transports.mqtt_address import node_from_hostname, parse_broker_url
from gemma_edge.runtime.transports.sockets import (
    bind_tcp,
    bind_unix,
    default_socket_path,
    parse_uri,
    split_host_port,
)

from .support.brokers import mosquitto
from .support.daemon_process import SCRIPTED, SERVE, chat, daemon_process, request, stream, user, wait_until
from .support.mqtt_peer import body, peer, text


def scripted(path: Path, *options: str) -> list[str]:
    return [*SCRIPTED, "--socket", str(path), *options]


def test_ready_line_and_private_socket(tmp_path: Path) -> None:
    path = tmp_path / "run" / "x.sock"
    with daemon_process(scripted(path, "--tcp", "127.0.0.1:0"), tmp_path / "log") as daemon:
        ready = daemon.wait_ready()
        assert ready.startswith(f"ready: scripted on unix:{path}, http://127.0.0.1:")
        assert (
            stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        )
        assert chat(path, "hello")[2]["choices"][0]["message"]["content"] == "You said: hello"
        with socket.create_connection(("127.0.0.1", int(ready.rpartition(":")[2]))) as tcp:
            tcp.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert b"200 OK" in tcp.recv(4096)


def test_default_socket_is_in_the_runtime_folder(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with daemon_process(SCRIPTED, tmp_path / "log", env):
        assert chat(tmp_path / "gemma-edge" / "gemma-edge.sock", "hello")[0] == 200


def test_a_stale_socket_is_replaced_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with daemon_process(scripted(path), tmp_path / "log") as first:
        first.process.kill()
        first.wait_exit()
    assert path.exists()
    with daemon_process(scripted(path), tmp_path / "log2"):
        with daemon_process(scripted(path), tmp_path / "log3", ready=False) as second:
            assert second.wait_exit() == 1 and "another gemma-edge serves here" in second.log()
        assert chat(path, "hello")[0] == 200


def test_sigterm_finishes_the_running_request_and_refuses_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with daemon_process(scripted(path, "--step-s", "0.02"), tmp_path / "log") as daemon:
        answers: list[Any] = []
        running = threading.Thread(target=lambda: answers.append(chat(path, "repeat 80 word")))
        running.start()
        wait_until(lambda: request(path, "GET", "/health")[2]["state"] == "generating")
        daemon.terminate()
        wait_until(lambda: request(path, "GET", "/health")[2]["state"] == "draining", 2)
        status, _, refusal = chat(path, "hello")
        assert status == 503 and refusal["error"]["code"] == "shutting_down"
        running.join()
        assert (
            answers[0][0] == 200
            and answers[0][2]["choices"][0]["message"]["content"].split() == ["word"] * 80
        )
        assert daemon.wait_exit() == 0 and not path.exists()
        assert "all requests finished" in daemon.log()


@pytest.mark.parametrize("streaming", [False, True])
def test_the_drain_has_a_deadline(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "x.sock"
    options = ("--step-s", "0.02", "--drain-timeout", "0.5")
    with daemon_process(scripted(path, *options), tmp_path / "log") as daemon:
        answers: list[Any] = []

        def ask() -> None:
            request_body: dict[str, Any] = {"messages": user("repeat 1500 word")}
            if streaming:
                answers.append(json.loads(stream(path, request_body)[-1]))
            else:
                answers.append(request(path, "POST", "/v1/chat/completions", request_body)[2])

        running = threading.Thread(target=ask)
        running.start()
        wait_until(lambda: request(path, "GET", "/health")[2]["state"] == "generating")
        started = time.monotonic()
        os.kill(daemon.process.pid, signal.SIGINT)
        assert daemon.wait_exit() == 0 and 0.4 < time.monotonic() - started < 25  # of 30
        running.join()
        assert answers[0]["error"]["code"] == "shutting_down"
        assert "unfinished requests were cancelled" in daemon.log()


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with daemon_process(scripted(path, "--step-s", "0.02"), tmp_path / "log") as daemon:

        def ask() -> None:
            with pytest.raises((OSError, http.client.HTTPException)):
                chat(path, "repeat 1500 word")

        running = threading.Thread(target=ask)
        running.start()
        wait_until(lambda: request(path, "GET", "/health")[2]["state"] == "generating")
        daemon.terminate()
        wait_until(lambda: "stopping" in daemon.log())
        daemon.terminate()
        assert daemon.wait_exit(5) == -signal.SIGTERM
        running.join()


def test_http_and_mqtt_together(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with mosquitto(tmp_path) as broker:
        url = f"mqtt://127.0.0.1:{broker.port}"
        options = ("--mqtt", url, "--base", "house/ai", "--node", "pi", "--step-s", "0.02")
        response, availability = "house/ai/pi/response/chat", "house/ai/pi/availability"
        with (
            peer(broker.port, response, availability) as client,
            daemon_process(scripted(path, *options), tmp_path / "log") as daemon,
        ):
            assert daemon.wait_ready().endswith(f"{url} (house/ai/pi/request/chat)")
            assert client.wait(1)[0].payload == b"online"
            client.send(
                {"messages": user("repeat 60 word"), "transaction": 1}, topic="house/ai/pi/request/chat"
            )
            wait_until(lambda: request(path, "GET", "/health")[2]["state"] == "generating")
            daemon.terminate()
            assert daemon.wait_exit() == 0
            assert [m.topic for m in client.wait(3)] == [availability, availability, response]
            assert (
                client.messages[1].payload == b"offline" and text(client.messages[2]).split() == ["word"] * 60
            )
        with (
            peer(broker.port, availability) as client,
            daemon_process(scripted(path, *options), tmp_path / "log2") as daemon,
        ):
            client.wait_for(lambda m: m.payload == b"online")
            daemon.process.kill()
            client.wait_for(lambda m: m.payload == b"offline" and not m.retain)  # its last will


def test_mqtt_alone_and_password_from_the_environment(tmp_path: Path) -> None:
    with mosquitto(tmp_path) as broker:
        env = {"GEMMA_EDGE_MQTT": f"mqtt://me@127.0.0.1:{broker.port}", "GEMMA_EDGE_MQTT_PASSWORD": "s3cret"}
        command = [*SCRIPTED, "--no-http", "--node", "pi"]
        with (
            peer(broker.port, "gemma-edge/pi/response/chat") as client,
            daemon_process(command, tmp_path / "log", env) as daemon,
        ):
            client.send("hello", topic="gemma-edge/pi/request/chat")
            assert text(client.wait(1)[0]) == "You said: hello"
            assert "s3cret" not in daemon.log() and "unix:" not in daemon.log()
            assert "u'me'" in broker.log()


def test_serving_goes_on_without_the_broker(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with daemon_process(scripted(path, "--mqtt", "mqtt://127.0.0.1:1"), tmp_path / "log") as daemon:
        assert "cannot connect" in daemon.log() and "next attempt in" in daemon.log()
        assert chat(path, "hello")[0] == 200
        daemon.terminate()
        assert daemon.wait_exit() == 0


def test_systemd_is_told(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        env = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with daemon_process(scripted(tmp_path / "x.sock"), tmp_path / "log", env) as daemon:
            assert systemd.recv(1000).startswith(b"READY=1")
            daemon.terminate()
            assert systemd.recv(1000) == b"STOPPING=1"
            assert daemon.wait_exit() == 0


def test_what_is_in_the_way_is_not_removed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(GemmaEdgeError, match="not a socket"):
        bind_unix(file)
    assert file.read_text() == "precious"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as foreign:
        foreign.bind(str(tmp_path / "foreign"))
        foreign.listen()
        with pytest.raises(GemmaEdgeError, match="another program listens"):
            bind_unix(tmp_path / "foreign")
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        bind_unix(tmp_path / ("x" * 108))


def test_a_default_folder_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    default_socket_path().parent.mkdir()
    default_socket_path().parent.chmod(0o777)
    with pytest.raises(GemmaEdgeError, match="not a private folder"):
        bind_unix(default_socket_path())


def test_a_socket_for_a_group(tmp_path: Path) -> None:
    listener = bind_unix(tmp_path / "x.sock", 0o660)
    assert stat.S_IMODE(listener.path.stat().st_mode) == 0o660
    listener.close()
    assert not listener.path.exists()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"])
def test_tcp_is_for_loopback_unless_allowed(address: str) -> None:
    with pytest.raises(ConfigError, match="--allow-remote"):
        bind_tcp(address, allow_remote=False)


def test_tcp_can_be_remote_when_allowed() -> None:
    with (
        bind_tcp("0.0.0.0:0", allow_remote=True) as listener,
        pytest.raises(GemmaEdgeError, match="cannot listen"),
    ):
        listener.listen()
        bind_tcp(f"0.0.0.0:{listener.getsockname()[1]}", allow_remote=True)


@pytest.mark.parametrize(
    "address", ["8080", ":8080", "localhost:", "localhost:x", "::1:80", "localhost:70000", "a:²"]
)
def test_bad_tcp_addresses(address: str) -> None:
    with pytest.raises(ConfigError):
        split_host_port(address)


def test_broker_urls() -> None:
    full = parse_broker_url("mqtts://us%40er:p%3Ass@broker.example:1234")
    assert (full.host, full.port, full.tls, full.username, full.password) == (
        *("broker.example", 1234, True),
        *("us@er", "p:ss"),
    )
    assert str(full) == "mqtts://broker.example:1234" and "p:ss" not in repr(full)
    assert parse_broker_url("mqtt://host").port == 1883 and parse_broker_url("mqtts://host").port == 8883
    assert str(parse_broker_url("mqtt://[::1]")) == "mqtt://[::1]:1883"
    assert parse_broker_url("mqtt://u@h", password="env").password == "env"


@pytest.mark.parametrize(
    "url",
    [
        "host",
        "http://host",
        "mqtt://",
        "mqtt://h:99999",
        "mqtt://h/t",
        "mqtt://:topsecret@h",
        "mqtt://u:topsecret@h:x",
    ],
)
def test_bad_broker_urls(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_broker_url(url)
    assert "topsecret" not in str(refused.value)


def test_node_names_from_host_names() -> None:
    assert node_from_hostname("pi-4.home.arpa") == "pi-4"
    assert node_from_hostname("büro/1") == "b-ro-1" and node_from_hostname("+++") == "node"


@pytest.mark.parametrize(
    "options",
    [
        ["--queue-size", "0"],
        ["--max-tokens", "-1"],
        ["--timeout", "nan"],
        ["--timeout", "1e9"],
        ["--drain-timeout", "-1"],
        ["--no-http"],
        ["--no-http", "--socket", "x", "--mqtt", "mqtt://h"],
        ["--socket-mode", "9"],
        ["--socket-mode", "044"],
        ["--mqtt", "mqtt://h", "--node", "a/b"],
        ["--mqtt", "mqtt://h", "--mqtt-ca", "ca.pem"],
        ["--mqtt", "mqtts://h", "--mqtt-ca", "/no/such/file"],
        ["--audio-folder", "/tmp"],
        ["--mqtt", "mqtt://h", "--audio-folder", "/no/such/folder"],
        ["--wyoming", "tcp://localhost"],
        ["--wyoming", "unix://relative"],
        ["--wyoming", "stdio://"],
        ["--wyoming-system", "Answer briefly."],
        ["--languages", "en,tlh"],
        ["--languages", ""],
    ],
    ids=" ".join,
)
def test_bad_options(options: list[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_serve_arguments(parser)
    with pytest.raises(ConfigError, match=r"--"):
        serve.settings_from(parser.parse_args(["bundle", *options]))


def test_wyoming_addresses(tmp_path: Path) -> None:
    assert parse_uri("unix:///run/x.sock", option="--wyoming") == Path("/run/x.sock")
    assert parse_uri("tcp://[::1]:10300", option="--wyoming") == "[::1]:10300"
    parser = argparse.ArgumentParser()
    serve.add_serve_arguments(parser)
    options = ["bundle", "--no-http", "--wyoming", "tcp://0.0.0.0:0", "--languages", "de-DE,English"]
    settings = serve.settings_from(parser.parse_args(options))
    assert settings.languages == ("de", "en")
    with pytest.raises(ConfigError, match=r"--wyoming 0.0.0.0:0: .* --allow-remote"), serve.Daemon(settings):
        pass


def test_missing_wyoming_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    serve.add_serve_arguments(parser)
    settings = serve.settings_from(parser.parse_args(["bundle", "--no-http", "--wyoming", "tcp://[::1]:0"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GemmaEdgeError, match=r"gemma-edge\[voice\]"), serve.Daemon(settings):
        pass


def test_missing_http_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    serve.add_serve_arguments(parser)
    settings = serve.settings_from(parser.parse_args(["bundle", "--socket", str(tmp_path / "x.sock")]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GemmaEdgeError, match=r"gemma-edge\[http\]"), serve.Daemon(settings):
        pass


def test_a_missing_bundle_is_a_clear_error(tmp_path: Path) -> None:
    command = [*SERVE, str(tmp_path / "none"), "--socket", str(tmp_path / "x.sock")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (
        result.returncode == 1
        and "no such bundle folder" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_the_real_engine_over_http_and_mqtt(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    """One greedy question, one answer: over HTTP whole and streamed, by the openai client, and over MQTT."""
    bundle = tiny_bundle().path
    path = tmp_path / "x.sock"
    question = {"messages": user("temperature of the kitchen?"), "max_tokens": 24}
    with mosquitto(tmp_path) as broker:
        command = [*SERVE, str(bundle), "--socket", str(path), "--node", "pi"]
        command += ["--mqtt", f"mqtt://127.0.0.1:{broker.port}"]
        with (
            daemon_process(command, tmp_path / "log") as daemon,
            peer(broker.port, "gemma-edge/pi/response/chat", "replies/me") as client,
        ):
            assert bundle.name in daemon.wait_ready()
            status, _, whole = request(path, "POST", "/v1/chat/completions", question)
            assert status == 200 and 0 < whole["usage"]["completion_tokens"] <= 24
            answer = whole["choices"][0]["message"]["content"]
            chunks = [json.loads(event) for event in stream(path, question)[:-1]]
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == answer
            transport = httpx2.HTTPTransport(uds=str(path))
            with openai.OpenAI(
                base_url="http://localhost/v1", api_key="none", http_client=httpx2.Client(transport=transport)
            ) as api:
                model = api.models.list().data[0].id
                completion: Any = api.chat.completions.create(model=model, **question)  # type: ignore[call-overload]
            assert completion.choices[0].message.content == answer
            client.send(question | {"transaction": 1}, topic="gemma-edge/pi/request/chat")
            client.send(question, topic="gemma-edge/pi/request/chat", reply_to="replies/me", correlation=b"2")
            by_topic, by_property = client.wait(2, timeout_s=30)
            assert text(by_topic) == text(by_property) == answer and body(by_topic)["transaction"] == 1
            assert by_property.topic == "replies/me" and by_property.properties.CorrelationData == b"2"
            sampled = [
                chat(path, "kitchen", temperature=1.0, seed=seed, max_tokens=16)[2] for seed in (5, 5, 6)
            ]
            first, second, other = [one["choices"][0]["message"]["content"] for one in sampled]
            assert first == second != other
            daemon.terminate()
            assert daemon.wait_exit() == 0
