"""Sounds over HTTP with the openai client: in chats and to be transcribed, by a real encoder and engine."""

from __future__ import annotations

import base64
import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest

from gemma_edge.runtime.service import ChatRequest, Service
from gemma_edge.runtime.sounds import Feed
from gemma_edge.runtime.transports import http_body
from gemma_edge.runtime.transports.http import HttpServer
from gemma_edge.runtime.transports.openai_api import MAX_BODY_BYTES, MAX_SOUND_BODY_BYTES, ApiLimits
from gemma_edge.runtime.transports.sockets import bind_tcp, bind_unix

from .support.daemon_process import UnixConnection, request, wait_until
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
from .support.sounds import RATE, SPEECH

CHAT, TRANSCRIBE = "/v1/chat/completions", "/v1/audio/transcriptions"


class Served:
    def __init__(self, path: Path, service: Service, tcp_port: int) -> None:
        self.path, self.service, self.tcp_port = path, service, tcp_port
        transport = httpx2.HTTPTransport(uds=str(path))
        self.client = openai.OpenAI(
            base_url="http://localhost/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
        )

    def chat(self, *parts: dict[str, Any], **more: Any) -> tuple[int, dict[str, str], Any]:
        return request(self.path, "POST", CHAT, {"messages": heard(*parts), **more})

    def transcribe(self, file: Any = None, **more: Any) -> Any:
        name = ("speech.wav", wav()) if file is None else ("speech.wav", file)
        return self.client.audio.transcriptions.create(file=name, model=MODEL_NAME, **more)


@contextmanager
def serving(service: Service, folder: Path) -> Iterator[Served]:
    unix = bind_unix(folder / "test.sock")
    tcp = bind_tcp("127.0.0.1:0", allow_remote=False)
    server = HttpServer(service, ApiLimits(MODEL_NAME, hears=service.ears is not None), [unix.socket, tcp])
    server.start()
    try:
        yield Served(unix.path, service, tcp.getsockname()[1])
    finally:
        server.close(10)
        unix.close()
        tcp.close()


@pytest.fixture(scope="module")
def served(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("http")
    with hearing_service(hearing_bundle(tiny_bundle)) as service, serving(service, folder) as server:
        yield server


@pytest.fixture(scope="module")
def deaf(tiny_bundle: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("http")
    bundle = hearing_bundle(tiny_bundle)
    with hearing_service(bundle, ears=False) as service, serving(service, folder) as server:
        yield server


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def heard(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


class TestChat:
    def test_the_openai_client_whole_and_streamed(self, served: Served) -> None:
        messages: Any = heard(text("What is said?"), input_audio(wav()))
        expected = said(served.service, ChatRequest(messages))
        assert expected
        create = served.client.chat.completions.create
        whole = create(model=MODEL_NAME, messages=messages)
        assert whole.choices[0].message.content == expected
        assert whole.usage is not None and whole.usage.prompt_tokens > 2 * 25
        chunks = create(model=MODEL_NAME, messages=messages, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        other: Any = heard(text("What is said?"), input_audio(SPEECH.read_bytes()))
        assert create(model=MODEL_NAME, messages=other).choices[0].message.content != expected

    def test_half_a_minute_of_the_largest_sound_arrives(self, served: Served) -> None:
        """30 s of stereo floats at 48 kHz pass the cap; here the context is what they are too long for."""
        half_a_minute = wav(np.zeros((48_000 * 30, 2), np.float32), 48_000, "FLOAT")
        status, _, body = served.chat(input_audio(half_a_minute))
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"
        at_16_khz = wav(np.zeros(RATE * 30, np.int16))
        assert len(base64.b64encode(at_16_khz)) > MAX_BODY_BYTES
        status, _, body = served.chat(input_audio(at_16_khz))
        assert status == 400 and body["error"]["code"] == "context_length_exceeded"

    def test_more_is_refused_with_its_cap(self, served: Served) -> None:
        status, _, body = served.chat(input_audio(bytes(MAX_SOUND_BODY_BYTES)))
        assert status == 413 and body["error"]["code"] == "payload_too_large"
        assert str(MAX_SOUND_BODY_BYTES) in body["error"]["message"]

    def test_only_sounds_may_be_long(self, served: Served) -> None:
        for raw in (
            json.dumps({"messages": heard(text("word " * MAX_BODY_BYTES))}).encode(),
            b'{"messages": [' + b"{}," * MAX_BODY_BYTES + b"{}]}",
            json.dumps({"messages": heard(input_audio(wav()), text("x" * MAX_BODY_BYTES))}).encode(),
        ):
            status, _, body = request(served.path, "POST", CHAT, raw)
            assert status == 413 and "besides the sounds" in body["error"]["message"]

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            ("not base64!", "not base64"),
            ("", "expected {'data'"),
            (base64.b64encode(b"RIFFnothing").decode(), "not a sound file"),
            (base64.b64encode(wav(np.zeros(31 * RATE, np.int16))).decode(), "at most 30 s"),
            (base64.b64encode(wav(np.zeros(50, np.int16))).decode(), "too short"),
        ],
    )
    def test_what_cannot_be_heard_is_a_400(self, served: Served, data: str, problem: str) -> None:
        part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
        status, _, body = served.chat(part)
        assert status == 400 and body["error"]["code"] == "invalid_request"
        assert problem in body["error"]["message"]

    def test_inner_parts_are_not_for_clients(self, served: Served) -> None:
        for part in ({"type": "audio", "file": "eA=="}, {"type": "audio", "feed": {}}, {"type": "audio"}):
            status, _, body = served.chat(part)
            assert status == 400 and "'input_audio'" in body["error"]["message"]

    def test_a_model_without_ears_says_so(self, deaf: Served) -> None:
        status, _, body = deaf.chat(input_audio(wav()))
        assert status == 400 and "hears nothing" in body["error"]["message"]
        status, _, body = deaf.chat(input_audio(wav(np.zeros(RATE * 30, np.int16))))
        assert status == 413 and "hears nothing" in body["error"]["message"]

    def test_many_large_bodies_at_once_are_too_many(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http_body, "MAX_HELD_BYTES", 300_000)
        waiting = UnixConnection(served.path)
        waiting.putrequest("POST", CHAT)
        waiting.putheader("content-length", "250000")
        waiting.endheaders()
        waiting.send(b" " * 240_000)
        wait_until(lambda: served.chat(input_audio(wav()))[0] == 429)
        waiting.close()
        wait_until(lambda: served.chat(input_audio(wav()))[0] == 200)


class TestTranscriptions:
    def test_the_openai_client(self, served: Served) -> None:
        expected = transcript_of(served.service, wav())
        assert expected
        whole = served.transcribe()
        assert whole.text == expected and whole.usage.type == "tokens"
        assert whole.usage.input_tokens > 2 * 25 and whole.usage.output_tokens > 0
        assert served.transcribe(response_format="text") == f"{expected}\n"
        verbose = served.transcribe(response_format="verbose_json")
        assert (verbose.text, verbose.language) == (expected, "english")
        assert verbose.duration == pytest.approx(2.0) and verbose.usage.seconds == pytest.approx(2.0)

    def test_streamed(self, served: Served) -> None:
        expected = transcript_of(served.service, wav())
        events = list(served.transcribe(stream=True))
        assert [event.type for event in events[-2:]] == ["transcript.text.delta", "transcript.text.done"]
        assert "".join(event.delta for event in events[:-1]) == events[-1].text == expected
        assert events[-1].usage.output_tokens > 0

    def test_language_prompt_and_temperature_reach_the_model(self, served: Served) -> None:
        german = transcript_of(served.service, wav(), "de")
        hinted = transcript_of(served.service, wav(), prompt="lamp")
        assert len({german, hinted, transcript_of(served.service, wav())}) == 3
        assert served.transcribe(language="de").text == german
        assert served.transcribe(language="German", temperature=0.0).text == german
        assert served.transcribe(prompt="lamp").text == hinted

    def test_flac(self, served: Served) -> None:
        data = SPEECH.read_bytes()
        assert served.transcribe(data).text == transcript_of(served.service, data)

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            ({"response_format": "srt"}, "response_format"),
            ({"response_format": "text", "stream": True}, "response_format"),
            ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
            ({"include": ["logprobs"]}, "include"),
            ({"chunking_strategy": "auto"}, "chunking_strategy"),
            ({"temperature": -1}, "temperature"),
            ({"language": "Klingon"}, "language"),
            ({"prompt": "x" * 3000}, "prompt"),
            ({"extra_body": {"promt": "x"}}, "promt"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_refused_fields_are_named(self, served: Served, more: dict[str, Any], param: str) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            served.transcribe(**more)
        assert refused.value.param == param and param in refused.value.message

    def test_other_models_and_sounds_are_refused(self, served: Served) -> None:
        with pytest.raises(openai.NotFoundError):
            served.client.audio.transcriptions.create(file=("x.wav", wav()), model="whisper-1")
        with pytest.raises(openai.BadRequestError, match="not a sound file"):
            served.transcribe(b"nothing")
        with pytest.raises(openai.BadRequestError, match="at most 30 s"):
            served.transcribe(wav(np.zeros(31 * RATE, np.int16)))
        with pytest.raises(openai.BadRequestError, match="too short"):
            served.transcribe(wav(np.zeros(10, np.int16)))
        with pytest.raises(openai.APIStatusError) as refused:
            served.transcribe(bytes(MAX_SOUND_BODY_BYTES))
        assert refused.value.status_code == 413

    @pytest.mark.parametrize(
        ("kind", "raw", "status"),
        [
            ("application/json", b"{}", 415),
            ("multipart/form-data", b"x", 400),
            ("multipart/form-data; boundary=b", b"", 400),
            ("multipart/form-data; boundary=b", b"--b\r\n\r\n", 400),
            ("multipart/form-data; boundary=b", b"\xff" * 1000, 400),
            (
                "multipart/form-data; boundary=b",
                b'--b\r\ncontent-disposition: form-data; name="file"\r\n\r\ntext\r\n--b--\r\n',
                400,
            ),
            (
                "multipart/form-data; boundary=b",
                b'--b\r\ncontent-disposition: form-data; name="x"\r\n\r\n' + b"y" * 70_000 + b"\r\n--b--\r\n",
                400,
            ),
        ],
    )
    def test_broken_forms(self, served: Served, kind: str, raw: bytes, status: int) -> None:
        got, _, body = request(served.path, "POST", TRANSCRIBE, raw, {"content-type": kind})
        assert got == status and "error" in body

    def test_a_model_without_ears_says_so(self, deaf: Served) -> None:
        with pytest.raises(openai.BadRequestError, match="hears nothing"):
            deaf.transcribe()

    def test_tcp_keeps_web_pages_out(self, served: Served) -> None:
        form = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n'
        form += wav() + b"\r\n--b--\r\n"

        def post(headers: dict[str, str]) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", served.tcp_port, timeout=20)
            kind = {"content-type": "multipart/form-data; boundary=b"}
            connection.request("POST", TRANSCRIBE, form, kind | headers)
            status = connection.getresponse().status
            connection.close()
            return status

        assert post({}) == 200
        assert post({"origin": "http://evil.example"}) == 403
        assert post({"sec-fetch-site": "cross-site"}) == 403
        assert post({"host": "evil.example"}) == 403

    def test_a_busy_daemon_is_busy_at_once(self, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
        """Somebody speaks, one waits, the next is refused; then both are served."""
        with (
            hearing_service(hearing_bundle(tiny_bundle), queue_size=1) as service,
            serving(service, tmp_path) as server,
        ):
            feed = Feed(RATE)
            speaking = service.submit(ChatRequest(heard({"type": "audio", "feed": feed})))
            wait_until(lambda: service.health()["state"] == "generating")
            answers: list[str] = []
            waiting = threading.Thread(target=lambda: answers.append(server.transcribe().text))
            waiting.start()
            wait_until(lambda: service.health()["queue_length"] == 1)
            with pytest.raises(openai.RateLimitError):
                server.transcribe()
            feed.put(clip(0.5))
            feed.end()
            assert list(speaking.events()) and not waiting.join(20)
            assert answers == [transcript_of(service, wav())]

    def test_curl(self, served: Served, tmp_path: Path) -> None:
        curl = shutil.which("curl")
        assert curl, "curl is not installed (.ci/run installs it)"
        (tmp_path / "speech.wav").write_bytes(wav())
        command = [curl, "-sS", "--unix-socket", str(served.path), f"http://localhost{TRANSCRIBE}"]
        command += ["-F", f"file=@{tmp_path}/speech.wav", "-F", "response_format=text"]
        result = subprocess.run(command, capture_output=True, check=True, text=True, timeout=30)
        assert result.stdout.strip() == transcript_of(served.service, wav())
