"""Sounds over MQTT with a real broker: as payloads, in chats, by path; a real encoder and engine answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from gemma_edge.runtime.service import ChatRequest, Service
from gemma_edge.runtime.transports.mqtt import MqttTransport, Version
from gemma_edge.runtime.transports.mqtt_address import BrokerAddress, Topics
from gemma_edge.runtime.transports.openai_api import MAX_SOUND_BODY_BYTES, ApiLimits
from gemma_edge.runtime.transports.sound_folder import SoundFolder

from .support.brokers import Mosquitto, mosquitto
from .support.hearing import (
    MODEL_NAME,
    clip,
    hearing_bundle,
    hearing_service,
    input_audio,
    said,
    transcript_of,
    wav,
)
from .support.mqtt_peer import Peer, body, peer, text
from .support.sounds import RATE, SPEECH

TOPICS = Topics("gemma-edge", "ears")
REPLIES = "replies/ears"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "sounds"
    folder.mkdir()
    (folder / "question.wav").write_bytes(wav())
    (folder / "no-sound.wav").write_text("nothing")
    (folder / "large.wav").write_bytes(bytes(MAX_SOUND_BODY_BYTES + 1))
    (folder.parent / "secret.wav").write_bytes(wav())
    (folder / "out.wav").symlink_to(folder.parent / "secret.wav")
    return folder


@contextmanager
def serving(
    service: Service, port: int, folder: Path | None, topics: Topics = TOPICS, version: Version = "auto"
) -> Iterator[MqttTransport]:
    limits = ApiLimits(MODEL_NAME, hears=service.ears is not None)
    sounds = None if folder is None else SoundFolder(folder)
    address = BrokerAddress("127.0.0.1", port)
    transport = MqttTransport(service, limits, address, topics, version=version, sounds=sounds)
    transport.start()
    try:
        assert transport.wait_online(10), "the daemon did not get online"
        yield transport
    finally:
        transport.begin_drain()
        transport.close(5)


@pytest.fixture(scope="module")
def service(tiny_bundle: Callable[..., Any]) -> Iterator[Service]:
    with hearing_service(hearing_bundle(tiny_bundle)) as running:
        yield running


@pytest.fixture(scope="module")
def daemon(broker: Mosquitto, service: Service, folder: Path) -> Iterator[MqttTransport]:
    with serving(service, broker.port, folder) as running:
        yield running


@pytest.fixture
def client(broker: Mosquitto, daemon: MqttTransport) -> Iterator[Peer]:
    with peer(broker.port, REPLIES, TOPICS.response_audio, TOPICS.response) as running:
        yield running


def reply(client: Peer, payload: Any, **more: Any) -> dict[str, Any]:
    """The one reply to a request on request/audio."""
    client.messages.clear()
    client.send(payload, topic=TOPICS.request_audio, **more)
    return body(client.wait(1, timeout_s=20)[0])


def test_a_sound_file_is_transcribed(client: Peer, service: Service) -> None:
    expected = transcript_of(service, wav())
    assert expected
    client.send(wav(), topic=TOPICS.request_audio, reply_to=REPLIES, correlation=b"\x00id")
    message = client.wait(1)[0]
    assert message.topic == REPLIES and message.properties.CorrelationData == b"\x00id"
    assert message.properties.ContentType == "application/json"
    assert body(message)["text"] == expected and body(message)["usage"]["output_tokens"] > 0
    assert reply(client, SPEECH.read_bytes())["text"] == transcript_of(service, SPEECH.read_bytes())
    assert client.messages[0].topic == TOPICS.response_audio


def test_parameters_are_user_properties(client: Peer, service: Service) -> None:
    german = reply(client, wav(), user={"language": "de", "transaction": "t1", "timeout_s": "60"})
    assert german["text"] == transcript_of(service, wav(), "de") and german["transaction"] == "t1"
    verbose = reply(client, wav(), user={"response_format": "verbose_json"})
    assert verbose["duration"] == pytest.approx(2.0) and verbose["language"] == "english"


def test_streamed(client: Peer, service: Service) -> None:
    client.send(wav(), topic=TOPICS.request_audio, user={"stream": "true", "transaction": "s"})
    client.wait_for(lambda message: b"transcript.text.done" in message.payload)
    events = [body(message) for message in client.messages]
    assert [event["sequence"] for event in events] == list(range(len(events)))
    assert {event["transaction"] for event in events} == {"s"}
    assert "".join(event["delta"] for event in events[:-1]) == events[-1]["text"]
    assert events[-1]["text"] == transcript_of(service, wav())


def test_a_question_about_the_sound(client: Peer, service: Service) -> None:
    part = {"type": "audio", "file": wav()}
    content = [{"type": "text", "text": "What is asked?"}, part]
    expected = said(service, ChatRequest([{"role": "user", "content": content}], max_tokens=5))
    answer = reply(client, wav(), user={"question": "What is asked?", "max_tokens": "5"})
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["completion_tokens"] == 5
    alone = said(service, ChatRequest([{"role": "user", "content": [part]}]))
    assert reply(client, wav(), user={"question": ""})["choices"][0]["message"]["content"] == alone


def test_a_file_in_the_folder(client: Peer, service: Service, folder: Path) -> None:
    expected = transcript_of(service, wav())
    answer = reply(client, {"path": "question.wav", "language": "en", "transaction": 7})
    assert answer["text"] == expected and answer["transaction"] == 7
    assert reply(client, {"path": str(folder / "question.wav")})["text"] == expected
    tools = [{"type": "function", "function": {"name": "lamp"}}]
    answer = reply(client, {"path": "question.wav", "question": "", "tools": tools, "max_tokens": 3})
    assert answer["usage"]["completion_tokens"] == 3


def test_mqtt311(broker: Mosquitto, service: Service, folder: Path) -> None:
    topics = Topics("gemma-edge", "ears311")
    with (
        serving(service, broker.port, folder, topics, "3.1.1"),
        peer(broker.port, topics.response_audio, v5=False) as client,
    ):
        client.send(wav(), topic=topics.request_audio)
        assert body(client.wait(1)[0])["text"] == transcript_of(service, wav())
        client.send({"path": "question.wav", "transaction": "x"}, topic=topics.request_audio)
        assert body(client.wait(2)[1])["transaction"] == "x"


def test_input_audio_in_a_chat(client: Peer, service: Service) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "Listen."}, input_audio(wav())]}]
    client.send({"messages": messages}, topic=TOPICS.request)
    message = client.wait(1)[0]
    assert message.topic == TOPICS.response
    assert text(message) == said(service, ChatRequest(messages))


def test_half_a_minute_arrives(client: Peer) -> None:
    """It passes the caps; the tiny model's context is what it is too long for."""
    long = wav(np.zeros((48_000 * 30, 2), np.float32), 48_000, "FLOAT")
    assert reply(client, long)["error"]["code"] == "context_length_exceeded"
    chat = {"messages": [{"role": "user", "content": [input_audio(long)]}]}
    client.send(chat, topic=TOPICS.request, reply_to=REPLIES)
    assert body(client.wait(2)[1])["error"]["code"] == "context_length_exceeded"


BAD: list[tuple[Any, dict[str, str], str, str]] = [
    (b"", {}, "invalid_request", "empty"),
    (b"nothing", {}, "invalid_request", "not a sound file"),
    (bytes(MAX_SOUND_BODY_BYTES + 1), {}, "payload_too_large", str(MAX_SOUND_BODY_BYTES)),
    (wav(np.zeros(31 * RATE, np.int16)), {}, "invalid_request", "at most 30 s"),
    (wav(np.zeros(10, np.int16)), {}, "invalid_request", "too short"),
    (wav(clip(0.1)), {"langage": "de"}, "invalid_request", "did you mean `language`"),
    (wav(clip(0.1)), {"language": "tlh"}, "invalid_request", "language: expected"),
    (wav(clip(0.1)), {"stream": "perhaps"}, "invalid_request", "stream"),
    (wav(clip(0.1)), {"response_format": "text"}, "invalid_request", "replies are JSON"),
    (wav(clip(0.1)), {"model": "whisper-1"}, "model_not_found", "no model"),
    (wav(clip(0.1)), {"path": "question.wav"}, "invalid_request", "`path`"),
    (wav(clip(0.1)), {"question": "x", "n": "2"}, "invalid_request", "`n`"),
    ({"path": "question.wav"}, {"language": "de"}, "invalid_request", "in the JSON"),
    ({"path": "question.wav", "question": "x", "messages": []}, {}, "invalid_request", "messages"),
    ({"path": "question.wav", "stream": "true"}, {}, "invalid_request", "stream"),
    ({"path": ["x"]}, {}, "invalid_request", "path: expected"),
    ({"language": "de"}, {}, "invalid_request", "path: expected"),
    ({"path": "../secret.wav"}, {}, "invalid_request", "not in the sound folder"),
    ({"path": "out.wav"}, {}, "invalid_request", "not in the sound folder"),
    ({"path": "/etc/passwd"}, {}, "invalid_request", "not in the sound folder"),
    ({"path": "none.wav"}, {}, "invalid_request", "No such file"),
    ({"path": "no-sound.wav"}, {}, "invalid_request", "not a sound file"),
    ({"path": "large.wav"}, {}, "payload_too_large", "more than"),
    (b'{"path": ', {}, "invalid_request", "not valid JSON"),
]


@pytest.mark.parametrize(
    ("payload", "properties", "code", "problem"), BAD, ids=[f"{n}-{bad[3]}" for n, bad in enumerate(BAD)]
)
def test_bad_requests_are_answered_with_an_error(
    client: Peer, payload: Any, properties: dict[str, str], code: str, problem: str
) -> None:
    answer = reply(client, payload, user=properties, reply_to=REPLIES, correlation=b"c")
    assert answer["error"]["code"] == code and problem in answer["error"]["message"]
    assert client.messages[0].properties.CorrelationData == b"c"


def test_without_a_folder_and_without_ears(
    broker: Mosquitto, service: Service, tiny_bundle: Callable[..., Any]
) -> None:
    topics = Topics("gemma-edge", "no-folder")
    with (
        serving(service, broker.port, None, topics),
        peer(broker.port, topics.response_audio) as client,
    ):
        client.send({"path": "question.wav", "transaction": 1}, topic=topics.request_audio)
        answer = body(client.wait(1)[0])
        assert "--audio-folder" in answer["error"]["message"] and answer["transaction"] == 1
    topics = Topics("gemma-edge", "deaf")
    with (
        hearing_service(hearing_bundle(tiny_bundle), ears=False) as deaf,
        serving(deaf, broker.port, None, topics),
        peer(broker.port, topics.response_audio, topics.response) as client,
    ):
        for payload, topic in (
            (wav(), topics.request_audio),
            ({"path": "x.wav"}, topics.request_audio),
            ({"messages": [{"role": "user", "content": [input_audio(wav())]}]}, topics.request),
        ):
            client.messages.clear()
            client.send(payload, topic=topic)
            assert "hears nothing" in body(client.wait(1)[0])["error"]["message"]


def test_answers_go_to_no_request_topic(client: Peer) -> None:
    client.send(wav(), topic=TOPICS.request_audio, reply_to=TOPICS.request_audio)
    message = client.wait(1)[0]
    assert message.topic == TOPICS.response_audio and "Response Topic" in body(message)["error"]["message"]
    client.stays_at(1)


def test_a_broker_that_forbids_sounds_leaves_the_rest(service: Service, tmp_path: Path) -> None:
    """An access list from before sounds were there: chats go on."""
    rules = tmp_path / "acl"
    topics = Topics("gemma-edge", "acl")
    rules.write_text(
        f"topic read {topics.request}\ntopic write gemma-edge/#\ntopic read gemma-edge/acl/response/#\n"
    )
    rules.chmod(0o644)
    tmp_path.chmod(0o755)
    settings = f"allow_anonymous true\nacl_file {rules}\nuser root\n"
    with (
        mosquitto(tmp_path, settings) as broker,
        serving(service, broker.port, None, topics),
        peer(broker.port, topics.response) as client,
    ):
        client.send("hello", topic=topics.request)
        assert json.loads(client.wait(1)[0].payload)["object"] == "chat.completion"


def test_a_broker_that_refuses_the_subscription_for_sounds(
    daemon: MqttTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """mosquitto's access lists refuse nothing at this point; other brokers do."""
    granted, refused = (
        ReasonCode(PacketTypes.SUBACK, "Granted QoS 1"),
        ReasonCode(PacketTypes.SUBACK, "Not authorized"),
    )
    daemon._on_subscribe(daemon._client, None, 1, [granted, refused], None)
    assert "requests with sound files do not arrive" in caplog.text and daemon.wait_online(0)
    assert not daemon._changed.is_set()  # the connection goes on
