"""A daemon process that hears: HTTP, Wyoming and MQTT give one transcript of a sound, and it stops well."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.error import Error

from .support.brokers import Mosquitto, mosquitto
from .support.daemon_process import SERVE, DaemonProcess, daemon_process, request, wait_until
from .support.hearing import clip, hearing_bundle, wav
from .support.mqtt_peer import body, peer
from .support.sounds import RATE

FORM = dict(rate=RATE, width=2, channels=1)


class Running:
    def __init__(self, daemon: DaemonProcess, broker: Mosquitto, folder: Path) -> None:
        self.daemon, self.broker = daemon, broker
        self.socket = folder / "http.sock"
        self.unix = f"unix://{folder}/wyoming.sock"
        ready = daemon.wait_ready()
        self.tcp = next(word.rstrip(",") for word in ready.split() if word.startswith("tcp://"))
        assert f"wyoming {self.unix}, wyoming {self.tcp}" in ready


@pytest.fixture
def running(tiny_bundle: Callable[..., Any], tmp_path: Path) -> Iterator[Running]:
    bundle = hearing_bundle(tiny_bundle).path
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "x.wav").write_bytes(wav())
    with mosquitto(tmp_path) as broker:
        command = [*SERVE, str(bundle), "--socket", str(tmp_path / "http.sock"), "--max-tokens", "12"]
        command += ["--mqtt", f"mqtt://127.0.0.1:{broker.port}", "--node", "pi"]
        command += ["--audio-folder", str(tmp_path / "sounds")]
        command += ["--wyoming", f"unix://{tmp_path}/wyoming.sock", "--wyoming", "tcp://127.0.0.1:0"]
        with daemon_process(command, tmp_path / "log") as daemon:
            yield Running(daemon, broker, tmp_path)


def state(socket: Path) -> str:
    return request(socket, "GET", "/health")[2]["state"]


async def transcribed(uri: str, before_stop: Callable[[], Any] = lambda: None) -> str:
    async with AsyncClient.from_uri(uri, read_timeout=30.0) as client:
        await client.write_event(Transcribe(language="en").event())
        await client.write_event(AudioStart(**FORM).event())
        raw = clip().tobytes()
        for at in range(0, len(raw), 2048):
            await client.write_event(AudioChunk(audio=raw[at : at + 2048], **FORM).event())
        await asyncio.to_thread(before_stop)
        await client.write_event(AudioStop().event())
        while event := await client.read_event():
            assert not Error.is_type(event.type), event
            if Transcript.is_type(event.type):
                return Transcript.from_event(event).text
    raise AssertionError("no transcript")


def test_every_protocol_gives_the_same_transcript_and_it_stops_well(running: Running) -> None:
    transport = httpx2.HTTPTransport(uds=str(running.socket))
    with openai.OpenAI(
        base_url="http://localhost/v1", api_key="none", http_client=httpx2.Client(transport=transport)
    ) as api:
        model = api.models.list().data[0].id
        expected = api.audio.transcriptions.create(file=("x.wav", wav()), model=model).text
    assert expected
    assert asyncio.run(transcribed(running.unix)) == expected == asyncio.run(transcribed(running.tcp))
    with peer(running.broker.port, "gemma-edge/pi/response/audio") as client:
        client.send(wav(), topic="gemma-edge/pi/request/audio")
        client.send({"path": "x.wav"}, topic="gemma-edge/pi/request/audio")
        assert [body(message)["text"] for message in client.wait(2, timeout_s=30)] == [expected] * 2

    def stop() -> None:
        """SIGTERM while somebody speaks: newcomers are refused, the sentence is finished."""
        wait_until(lambda: state(running.socket) == "generating")
        running.daemon.terminate()
        wait_until(lambda: state(running.socket) == "draining")
        status, _, refusal = request(
            running.socket, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
        )
        assert status == 503 and refusal["error"]["code"] == "shutting_down"

    assert asyncio.run(transcribed(running.tcp, stop)) == expected
    assert running.daemon.wait_exit() == 0
    assert "all requests finished" in running.daemon.log() and "Traceback" not in running.daemon.log()
    assert not Path(running.unix.removeprefix("unix://")).exists()


def test_an_unfinished_sentence_does_not_outlive_the_drain(
    tiny_bundle: Callable[..., Any], tmp_path: Path
) -> None:
    command = [*SERVE, str(hearing_bundle(tiny_bundle).path), "--drain-timeout", "0.5"]
    socket = tmp_path / "http.sock"
    command += ["--wyoming", f"unix://{tmp_path}/w.sock", "--socket", str(socket)]
    with daemon_process(command, tmp_path / "log") as daemon:

        async def speak() -> dict[str, Any]:
            async with AsyncClient.from_uri(f"unix://{tmp_path}/w.sock", read_timeout=30.0) as client:
                await client.write_event(AudioChunk(audio=clip(0.5).tobytes(), **FORM).event())
                await asyncio.to_thread(wait_until, lambda: state(socket) == "generating")
                daemon.terminate()
                event = await client.read_event()
                assert event is not None and Error.is_type(event.type)
                return event.data

        assert asyncio.run(speak())["code"] == "shutting_down"
        assert daemon.wait_exit(10) == 0, json.dumps(daemon.log())
        assert "Traceback" not in daemon.log()
