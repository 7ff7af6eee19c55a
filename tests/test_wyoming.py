"""The Wyoming protocol with the `wyoming` client over both transports; a real encoder and engine answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wyoming.asr import Transcribe, Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.error import Error
from wyoming.event import Event, async_write_event
from wyoming.handle import Handled
from wyoming.info import Describe, Info
from wyoming.ping import Ping

from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.service import ChatRequest, Service
from gemma_edge.runtime.transports import conversations, wyoming, wyoming_events, wyoming_speech
from gemma_edge.runtime.transports.conversations import Conversations
from gemma_edge.runtime.transports.openai_api import ApiLimits
from gemma_edge.runtime.transports.sockets import bind_tcp, bind_unix
from gemma_edge.runtime.transports.wyoming import Offer, WyomingServer
from gemma_edge.runtime.transports.wyoming_events import MAX_HEADER_BYTES, read_event

from .support.daemon_process import wait_until
from .support.hearing import (
    MODEL_NAME,
    clip,
    hearing_bundle,
    hearing_service,
    said,
    transcript_of,
    wav,
)
from .support.sounds import RATE

CHUNK_BYTES = 2048


class Served:
    def __init__(self, service: Service, server: WyomingServer, unix: str, tcp: str) -> None:
        self.service, self.server = service, server
        self.uris = {"unix": unix, "tcp": tcp}
        self.uri = unix

    def counts(self) -> dict[str, int]:
        return self.service.health()["counts"]


@contextmanager
def serving(service: Service, folder: Path, **offer: Any) -> Iterator[Served]:
    unix = bind_unix(folder / "w.sock")
    tcp = bind_tcp("127.0.0.1:0", allow_remote=False)
    limits = ApiLimits(MODEL_NAME, hears=service.ears is not None)
    server = WyomingServer(Offer(service, limits, **offer), [unix.socket, tcp])
    server.start()
    try:
        port = tcp.getsockname()[1]
        yield Served(service, server, f"unix://{unix.path}", f"tcp://127.0.0.1:{port}")
    finally:
        server.close(5)
        assert not server.running
        unix.close()
        tcp.close()


@pytest.fixture(scope="module")
def service(tiny_bundle: Callable[..., Any]) -> Iterator[Service]:
    with hearing_service(hearing_bundle(tiny_bundle)) as running:
        yield running


@pytest.fixture(scope="module")
def served(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(service, tmp_path_factory.mktemp("wyoming"), languages=("en", "de")) as server:
        yield server


@asynccontextmanager
async def client(uri: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient.from_uri(uri, read_timeout=20.0) as peer:
        yield peer


async def send(peer: AsyncClient, *events: Any) -> None:
    for event in events:
        await peer.write_event(event if isinstance(event, Event) else event.event())


def sound(
    samples: np.ndarray, rate: int = RATE, *, chunk_bytes: int = CHUNK_BYTES, stop: bool = True
) -> list[Any]:
    """audio-start, audio-chunk …, audio-stop."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    form = dict(rate=rate, width=samples.dtype.itemsize, channels=channels)
    raw = samples.tobytes()
    chunks = [AudioChunk(audio=raw[at : at + chunk_bytes], **form) for at in range(0, len(raw), chunk_bytes)]
    return [AudioStart(**form), *chunks, *([AudioStop()] if stop else [])]


async def until(peer: AsyncClient, *types: str) -> list[Event]:
    """Every event, up to one of these types."""
    events: list[Event] = []
    while not events or events[-1].type not in types:
        event = await peer.read_event()
        assert event is not None, f"closed after {events}"
        events.append(event)
    return events


async def heard(uri: str, samples: np.ndarray, **asked: Any) -> list[Event]:
    async with client(uri) as peer:
        await send(peer, Transcribe(**asked), *sound(samples))
        return await until(peer, "transcript-stop", "error")


def text_of(events: list[Event]) -> str:
    return next(Transcript.from_event(event).text for event in events if Transcript.is_type(event.type))


async def failure(peer: AsyncClient) -> Error:
    """The error that comes, after which the connection ends."""
    error = Error.from_event((await until(peer, "error"))[-1])
    assert await peer.read_event() is None
    return error


def expecting(uri: str, *events: Any) -> Error:
    async def run() -> Error:
        async with client(uri) as peer:
            await send(peer, *events)
            return await failure(peer)

    return asyncio.run(run())


def run(coroutine: Awaitable[Any]) -> Any:
    async def within() -> Any:
        async with asyncio.timeout(60):
            return await coroutine

    return asyncio.run(within())


class TestInfo:
    @pytest.mark.parametrize("transport", ["unix", "tcp"])
    def test_describe(self, served: Served, transport: str) -> None:
        async def describe() -> Info:
            async with client(served.uris[transport]) as peer:
                await send(peer, Describe(), Ping("still there?"))
                info, pong = await until(peer, "pong")
                assert pong.data["text"] == "still there?"
                return Info.from_event(info)

        info = run(describe())
        (asr,), (handle,) = info.asr, info.handle
        assert asr.installed and asr.supports_transcript_streaming and asr.models[0].name == MODEL_NAME
        assert asr.models[0].languages == ["en", "de"]
        assert handle.installed and handle.supports_handled_streaming and not handle.supports_home_control

    def test_without_ears_there_is_no_asr(self, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
        with (
            hearing_service(hearing_bundle(tiny_bundle), ears=False) as deaf,
            serving(deaf, tmp_path) as server,
        ):

            async def describe() -> Info:
                async with client(server.uri) as peer:
                    await send(peer, Describe())
                    return Info.from_event((await until(peer, "info"))[-1])

            assert run(describe()).asr == []
            assert "hears nothing" in expecting(server.uri, *sound(clip(0.2))).text


class TestHearing:
    @pytest.mark.parametrize("transport", ["unix", "tcp"])
    def test_the_transcript_and_its_pieces(self, served: Served, transport: str) -> None:
        expected = transcript_of(served.service, wav())
        assert expected
        events = run(heard(served.uris[transport], clip(), language="en-US", name=MODEL_NAME))
        kinds = [event.type for event in events]
        pieces = [event.data["text"] for event in events if event.type == "transcript-chunk"]
        assert kinds == [
            "transcript-start",
            *["transcript-chunk"] * len(pieces),
            "transcript",
            "transcript-stop",
        ]
        assert "".join(pieces) == text_of(events) == expected
        assert events[0].data["language"] == "en"

    def test_it_is_prefilled_while_somebody_speaks(self, served: Served) -> None:
        async def speak() -> None:
            async with client(served.uri) as peer:
                await send(peer, Transcribe(), *sound(clip(1.0), stop=False))
                await asyncio.to_thread(wait_until, lambda: served.service.health()["state"] == "generating")
                await send(peer, AudioStop())
                events = await until(peer, "transcript-stop")
                assert text_of(events) == transcript_of(served.service, wav(clip(1.0)))

        run(speak())

    def test_many_at_once_over_both_transports(self, served: Served) -> None:
        lengths = [0.5, 1.0, 1.5, 2.0, 0.7, 1.2]
        expected = [transcript_of(served.service, wav(clip(length))) for length in lengths]
        uris = [served.uris["unix" if number % 2 else "tcp"] for number in range(len(lengths))]

        async def together() -> list[list[Event]]:
            speakers = [heard(uri, clip(length)) for uri, length in zip(uris, lengths, strict=True)]
            return await asyncio.gather(*speakers)

        assert [text_of(events) for events in run(together())] == expected

    def test_language_and_context(self, served: Served) -> None:
        events = run(heard(served.uri, clip(), language="de", context={"a": 1}))
        assert text_of(events) == transcript_of(served.service, wav(), "de")
        assert events[-2].data["context"] == {"a": 1} and events[-2].data["language"] == "de"

    @pytest.mark.parametrize("chunk_bytes", [7, 1001, 10**6])
    def test_chunks_of_any_size(self, served: Served, chunk_bytes: int) -> None:
        async def speak() -> list[Event]:
            async with client(served.uri) as peer:
                await send(peer, *sound(clip(0.5), chunk_bytes=chunk_bytes))
                return await until(peer, "transcript-stop", "error")

        assert text_of(run(speak())) == transcript_of(served.service, wav(clip(0.5)))

    def test_chunks_without_a_beginning(self, served: Served) -> None:
        async def speak() -> list[Event]:
            async with client(served.uri) as peer:
                await send(peer, *sound(clip(0.5))[1:])
                return await until(peer, "transcript-stop", "error")

        assert text_of(run(speak())) == transcript_of(served.service, wav(clip(0.5)))

    def test_other_formats(self, served: Served) -> None:
        stereo = np.repeat((clip().astype(np.int32) << 16)[:, None], 2, axis=1)
        assert run(heard(served.uri, stereo))[-1].type == "transcript-stop"

        async def speak() -> str:
            async with client(served.uri) as peer:
                await send(peer, *sound(np.repeat(clip(), 3), 48_000))
                return (await until(peer, "transcript-stop", "error"))[-1].type

        assert run(speak()) == "transcript-stop"

    def test_several_requests_on_one_connection(self, served: Served) -> None:
        async def speak() -> list[str]:
            async with client(served.uri) as peer:
                texts = []
                for length in (0.5, 1.0, 0.5):
                    await send(peer, Event("whatever"), Transcribe(), *sound(clip(length)))
                    texts.append(text_of(await until(peer, "transcript-stop")))
                return texts

        first, second, third = run(speak())
        assert first == third == transcript_of(served.service, wav(clip(0.5)))
        assert second == transcript_of(served.service, wav(clip(1.0)))

    def test_a_new_request_takes_the_place_of_the_old(self, served: Served) -> None:
        async def speak() -> list[Event]:
            async with client(served.uri) as peer:
                await send(peer, *sound(clip(1.0), stop=False), *sound(clip(0.5)))
                return await until(peer, "transcript-stop", "error")

        before = served.counts()["cancelled"]
        events = run(speak())
        assert [event.type for event in events].count("transcript") == 1
        assert text_of(events) == transcript_of(served.service, wav(clip(0.5)))
        wait_until(lambda: served.counts()["cancelled"] == before + 1)


class TestLeaving:
    @pytest.mark.parametrize("transport", ["unix", "tcp"])
    def test_in_the_middle_of_speech(self, served: Served, transport: str) -> None:
        before = served.counts()["cancelled"]

        async def leave() -> None:
            async with client(served.uris[transport]) as peer:
                await send(peer, Transcribe(), *sound(clip(1.0), stop=False))
                await asyncio.to_thread(wait_until, lambda: served.service.health()["state"] == "generating")

        run(leave())
        wait_until(lambda: served.counts()["cancelled"] == before + 1)
        assert served.service.health()["state"] == "ready"
        assert text_of(run(heard(served.uris[transport], clip()))) == transcript_of(served.service, wav())

    def test_in_the_middle_of_an_event(self, served: Served) -> None:
        async def leave(raw: bytes) -> None:
            _, writer = await asyncio.open_unix_connection(served.uri.removeprefix("unix://"))
            writer.write(raw)
            await writer.drain()
            writer.close()
            await writer.wait_closed()

        for raw in (b"", b'{"type": "audio-', b'{"type": "x", "data_length": 9}\n{"a"', b"\n"):
            run(leave(raw))
        assert run(heard(served.uri, clip(0.5)))[-1].type == "transcript-stop"

    def test_while_waiting_for_the_answer(self, served: Served) -> None:
        before = served.counts()

        async def leave() -> None:
            async with client(served.uri) as peer:
                await send(peer, *sound(clip(1.0)))

        run(leave())
        wait_until(lambda: sum(served.counts()[n] - before[n] for n in ("cancelled", "completed")) == 1)
        wait_until(lambda: served.service.health()["state"] == "ready")


FORM = dict(rate=RATE, width=2, channels=1)
BAD: list[tuple[list[Any], str]] = [
    ([Transcribe(language="tlh")], "language: expected"),
    ([Transcribe(name="whisper")], "no model 'whisper'"),
    ([Event("transcribe", {"language": 5})], "transcribe: Expected `str"),
    ([Event("audio-start", {"rate": RATE})], "missing required field"),
    ([Event("audio-start", FORM | {"rate": "16k"})], "audio-start: Expected `int"),
    ([AudioStart(rate=0, width=2, channels=1)], "rate: expected 4000 to"),
    ([AudioStart(rate=RATE, width=3, channels=1)], "3 bytes a sample"),
    ([AudioStart(rate=RATE, width=2, channels=99)], "channels: expected"),
    ([AudioStop()], "no sound came"),
    ([AudioStart(**FORM), AudioStop()], "too short"),
    (sound(clip(0.002)), "too short"),
    ([*sound(clip(0.1), stop=False), AudioChunk(rate=8000, width=2, channels=1, audio=b"12")], "the format"),
    ([*sound(clip(0.5), stop=False), AudioChunk(audio=b"1", **FORM), AudioStop()], "no whole number"),
    (sound(np.zeros(31 * RATE, np.int16), chunk_bytes=10**6), "more than 30 s"),
    ([Event("transcript", {})], "missing required field"),
]


class TestRefusing:
    @pytest.mark.parametrize(("events", "problem"), BAD, ids=[problem for _, problem in BAD])
    def test_bad_events_get_an_error_and_the_end(
        self, served: Served, events: list[Any], problem: str
    ) -> None:
        error = expecting(served.uri, *events)
        assert problem in error.text and error.code in ("invalid_request", "model_not_found")
        assert run(heard(served.uri, clip(0.5)))[-1].type == "transcript-stop"

    @pytest.mark.parametrize(
        "raw",
        [
            b"POST / HTTP/1.1\r\n",
            b"[]\n",
            b'{"data": {}}\n',
            b'{"type": "x", "data_length": -1}\n',
            b'{"type": "x", "data_length": 99999999999}\n',
            b'{"type": "audio-chunk", "payload_length": 99999999}\n',
            b'{"type": "x", "data_length": 2}\n[]',
            b'{"type": "x", "data": ' + b"[" * 30_000 + b"\n",
            b"x" * (3 * MAX_HEADER_BYTES),
        ],
        ids=lambda raw: repr(raw[:40]),
    )
    def test_what_is_no_wyoming(self, served: Served, raw: bytes) -> None:
        async def throw() -> dict[str, Any]:
            path = served.uri.removeprefix("unix://")
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(raw)
            header = json.loads(await reader.readline())
            data = json.loads(await reader.readexactly(header["data_length"]))
            assert header["type"] == "error" and await reader.read() == b""
            writer.close()
            return data

        assert run(throw())["code"] == "invalid_request"

    def test_sound_that_stops_coming(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wyoming_speech, "IDLE_S", 0.3)
        assert expecting(served.uri, *sound(clip(0.5), stop=False)).code == "request_timeout"

    def test_sound_that_comes_too_slowly(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wyoming_speech, "LONGEST_S", 0.5)

        async def drip() -> Error:
            async with client(served.uri) as peer:
                for event in [AudioStart(**FORM), *[AudioChunk(audio=b"12", **FORM)] * 100]:
                    with contextlib.suppress(ConnectionError):
                        await send(peer, event)
                    await asyncio.sleep(0.01)
                return await failure(peer)

        assert run(drip()).code == "request_timeout"

    def test_idle_connections_are_closed(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wyoming, "IDLE_S", 0.3)

        async def idle(*events: Any) -> Event | None:
            async with client(served.uri) as peer:
                await send(peer, *events)
                if events:
                    await until(peer, "transcript-stop")
                return await peer.read_event()

        assert run(idle()) is None
        assert run(idle(*sound(clip(0.5)))) is None

    def test_too_many_connections(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wyoming, "MAX_CONNECTIONS", 2)

        async def crowd() -> None:
            async with client(served.uri) as first, client(served.uri) as second:
                for peer in (first, second):
                    await send(peer, Describe())
                    await until(peer, "info")
                async with client(served.uri) as third:
                    assert (await failure(third)).code == "busy"
                await send(first, Describe())
                await until(first, "info")

        run(crowd())

    def test_a_full_queue(self, tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
        """One speaks, one waits, the third is busy; then the two are answered."""
        with (
            hearing_service(hearing_bundle(tiny_bundle), queue_size=1) as service,
            serving(service, tmp_path) as server,
        ):

            async def together() -> None:
                async with client(server.uri) as first, client(server.uri) as second:
                    await send(first, *sound(clip(0.5), stop=False))
                    health = service.health
                    await asyncio.to_thread(wait_until, lambda: health()["state"] == "generating")
                    await send(second, *sound(clip(1.0), stop=False))
                    await asyncio.to_thread(wait_until, lambda: health()["queue_length"] == 1)
                    async with client(server.uri) as third:
                        await send(third, *sound(clip(0.5)))
                        assert (await failure(third)).code == "busy"
                    await send(second, AudioStop())
                    await send(first, AudioStop())
                    for peer, length in ((first, 0.5), (second, 1.0)):
                        events = await until(peer, "transcript-stop")
                        assert text_of(events) == transcript_of(service, wav(clip(length)))

            run(together())


class TestHandling:
    @pytest.mark.parametrize("transport", ["unix", "tcp"])
    def test_text_in_text_out(self, served: Served, transport: str) -> None:
        async def ask() -> list[Event]:
            async with client(served.uris[transport]) as peer:
                await send(peer, Transcript("Who are you?", {"device_id": "x"}, "en"))
                return await until(peer, "handled-stop", "not-handled", "error")

        events = run(ask())
        expected = said(served.service, ChatRequest([{"role": "user", "content": "Who are you?"}]))
        pieces = [event.data["text"] for event in events if event.type == "handled-chunk"]
        kinds = [event.type for event in events]
        assert kinds == ["handled-start", *["handled-chunk"] * len(pieces), "handled", "handled-stop"]
        handled = Handled.from_event(events[-2])
        assert "".join(pieces) == expected and handled.text == expected.strip()
        assert handled.context == {"device_id": "x"}

    def test_a_system_prompt_and_what_was_said_before(self, service: Service, tmp_path: Path) -> None:
        system = {"role": "system", "content": "Answer in few words."}

        async def ask(uri: str, text: str, conversation: str) -> str:
            async with client(uri) as peer:
                await send(peer, Transcript(text, {"conversation_id": conversation}))
                return (await until(peer, "handled", "error"))[-1].data["text"]

        def user(text: str) -> dict[str, str]:
            return {"role": "user", "content": text}

        with serving(service, tmp_path, system=system["content"]) as server:
            first = run(ask(server.uri, "Is it warm?", "c1"))
            assert first == said(service, ChatRequest([system, user("Is it warm?")])).strip()
            past = [user("Is it warm?"), {"role": "assistant", "content": first}]
            second = run(ask(server.uri, "And outside?", "c1"))
            assert second == said(service, ChatRequest([system, *past, user("And outside?")])).strip()
            alone = said(service, ChatRequest([system, user("And outside?")])).strip()
            assert run(ask(server.uri, "And outside?", "c2")) == alone
            long = "word " * 45  # several of these are more than the context
            answers = [run(ask(server.uri, f"{n} {long}", "c3")) for n in range(8)]
            assert all(answers)

    def test_nothing_to_handle(self, served: Served) -> None:
        async def ask(text: str) -> str:
            async with client(served.uri) as peer:
                await send(peer, Transcript(text))
                return (await until(peer, "handled", "not-handled", "error"))[-1].type

        assert run(ask(" ")) == "not-handled"
        error = expecting(served.uri, Transcript("word " * 2000))
        assert error.code == "context_length_exceeded"

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = Conversations()
        for number in range(conversations.MAX_CONVERSATIONS + 5):
            memory.add(f"c{number}", "question", "answer")
        assert memory.messages("c4") == [] and len(memory.messages("c5")) == 2
        for number in range(conversations.MAX_TURNS + 3):
            memory.add("c9", f"question {number}", "answer")
        kept = memory.messages("c9")
        assert len(kept) == 2 * conversations.MAX_TURNS and kept[0]["content"] == "question 3"
        for key, question in ((None, "a"), ("", "a"), ("k" * 200, "a"), ("long", "a" * 10_000)):
            memory.add(key, question, "b")
            assert memory.messages(key) == []
        monkeypatch.setattr(conversations, "FORGET_S", -1.0)
        assert memory.messages("c9") == []


class TestStopping:
    def test_newcomers_are_refused_and_answers_are_finished(
        self, tiny_bundle: Callable[..., Any], tmp_path: Path
    ) -> None:
        with (
            hearing_service(hearing_bundle(tiny_bundle)) as service,
            serving(service, tmp_path) as server,
        ):
            expected = transcript_of(service, wav())

            async def speak() -> None:
                async with client(server.uri) as peer, client(server.uri) as idle:
                    await send(idle, Describe())
                    await until(idle, "info")
                    await send(peer, *sound(clip(), stop=False))
                    await asyncio.to_thread(wait_until, lambda: service.health()["state"] == "generating")
                    draining = threading.Thread(target=service.drain, args=(20.0,))
                    draining.start()
                    await asyncio.to_thread(wait_until, lambda: service.health()["state"] == "draining")
                    async with client(server.uri) as late:
                        await send(late, Transcript("hello"))
                        assert (await failure(late)).code == "shutting_down"
                    await send(peer, AudioStop())
                    assert text_of(await until(peer, "transcript-stop")) == expected
                    await asyncio.to_thread(draining.join)
                    started = time.monotonic()
                    await asyncio.to_thread(server.server.close, 60.0)
                    assert time.monotonic() - started < 30
                    assert await idle.read_event() is None and await peer.read_event() is None

            run(speak())


class TestReading:
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=4))
    def test_any_bytes(self, raw: bytes, cuts: list[int]) -> None:
        async def read() -> None:
            reader = asyncio.StreamReader(limit=MAX_HEADER_BYTES)
            for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(raw)], strict=True):
                reader.feed_data(raw[start:end])
            reader.feed_eof()
            with contextlib.suppress(RequestError):
                while await read_event(reader) is not None:
                    pass

        run(read())

    def test_events_of_the_package_byte_by_byte(self) -> None:
        async def read() -> list[Event | None]:
            written = asyncio.StreamReader()

            class Writer:
                def write(self, data: bytes) -> None:
                    for byte in data:
                        written.feed_data(bytes([byte]))

                def writelines(self, pieces: Any) -> None:
                    for piece in pieces:
                        self.write(piece)

                async def drain(self) -> None:
                    pass

            chunk = AudioChunk(audio=b"\x00\x01\n", timestamp=7, **FORM).event()
            for event in (chunk, Transcript("é\n", {"a": [1]}).event(), Event("bare")):
                await async_write_event(event, Writer())  # type: ignore[arg-type]
            written.feed_eof()
            return [await read_event(written) for _ in range(4)]

        chunk, transcript, bare, end = run(read())
        assert chunk == AudioChunk(audio=b"\x00\x01\n", timestamp=7, **FORM).event()
        assert transcript.data == {"text": "é\n", "context": {"a": [1]}} and bare.type == "bare"
        assert end is None and wyoming_events.MAX_DATA_BYTES > 0
