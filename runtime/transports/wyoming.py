"""The Wyoming protocol on given sockets, for Home Assistant and its kin (docs/wyoming.md). Knows no model.

asr:     transcribe, audio-start, audio-chunk …, audio-stop -> transcript-start, -chunk …, transcript, -stop
handle:  transcript -> handled-start, -chunk …, handled, -stop; or not-handled

An asyncio loop runs in a thread of its own. A connection has one request at a time: its reader goes on while
the answer is made, so that a peer that leaves or asks anew cancels it. An error ends the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from wyoming.asr import Transcribe, Transcript, TranscriptChunk, TranscriptStart, TranscriptStop
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.error import Error
from wyoming.event import Event, Eventable, async_write_event
from wyoming.handle import Handled, HandledChunk, HandledStart, HandledStop, NotHandled
from wyoming.info import (
    AsrModel,
    AsrProgram,
    Attribution,
    Describe,
    HandleModel,
    HandleProgram,
    Info,
)
from wyoming.ping import Ping, Pong

from ... import __version__
from ..errors import RequestError
from ..service import ChatRequest, Done, Job, Service, TextDelta
from ..transcribe import Transcript as Line
from ..transcribe import language_code, transcription
from .conversations import Conversations
from .job_events import events_of
from .openai_api import ApiLimits, check_model
from .openai_reply import failure
from .wyoming_events import (
    MAX_HEADER_BYTES,
    AudioFields,
    PingFields,
    TranscribeFields,
    TranscriptFields,
    fields_of,
    read_event,
)
from .wyoming_speech import Speech

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
IDLE_S = 300.0  # a connection without a request
SEND_TIMEOUT_S = 30.0  # for a peer to take one event
LINGER_S = 2.0  # what a peer still sends after an error is read away, so that the error reaches it
START_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Offer:
    """What is served, to whom, and how."""

    service: Service
    limits: ApiLimits
    languages: tuple[str, ...] = ("en",)  # of speech, for `info`
    system: str | None = None  # how to answer in conversations
    conversations: Conversations = field(default_factory=Conversations)

    def info(self) -> Info:
        model: dict[str, Any] = dict(
            name=self.limits.model,
            attribution=Attribution("gemma-edge", ""),
            installed=True,
            description=f"{self.limits.model} on this device",
            version=__version__,
        )
        program = model | dict(name="gemma-edge", description="Gemma on edge devices")
        asr = AsrProgram(
            models=[AsrModel(languages=list(self.languages), **model)],
            supports_transcript_streaming=True,
            **program,
        )
        handle = HandleProgram(
            models=[HandleModel(languages=[], **model)], supports_handled_streaming=True, **program
        )
        return Info(asr=[asr] if self.limits.hears else [], handle=[handle])


class WyomingServer:
    """Serves on bound sockets from `start()` until `close()`."""

    def __init__(self, offer: Offer, sockets: list[socket.socket]) -> None:
        self._offer = offer
        self._sockets = sockets
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._goodbye_s = 0.0
        self._started, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="wyoming", daemon=True)

    def start(self) -> None:
        """Listen. Raises RuntimeError if that does not work."""
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S) or self._ended.is_set():
            raise RuntimeError("the Wyoming server did not start; its error is in the log above")

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def close(self, timeout_s: float) -> None:
        """Take no more, and wait for the answers that are being sent."""
        self._goodbye_s = timeout_s
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(timeout_s + LINGER_S)

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._serve())
        except Exception:
            log.exception("the Wyoming server ended")
        finally:
            self._ended.set()
            self._started.set()

    async def _serve(self) -> None:
        servers = []
        for bound in self._sockets:
            start = asyncio.start_unix_server if bound.family == socket.AF_UNIX else asyncio.start_server
            servers.append(await start(self._connected, sock=bound, limit=MAX_HEADER_BYTES))
        self._started.set()
        await self._closing.wait()
        for server in servers:
            server.close()
        if busy := [task for task, connection in self._connections.items() if connection.busy]:
            for connection in self._connections.values():
                connection.last = True
            await asyncio.wait(busy, timeout=self._goodbye_s)
        open_tasks = list(self._connections)
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self._offer, reader, writer)
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= 2 * MAX_CONNECTIONS:
            writer.close()  # as many are being refused already
            return
        refusal = None
        if len(self._connections) >= MAX_CONNECTIONS:
            refusal = RequestError("busy", f"{MAX_CONNECTIONS} connections are open; close one")
        self._connections[task] = connection
        try:
            await connection.run(refusal)
        except asyncio.CancelledError:
            pass  # the server is closing
        finally:
            del self._connections[task]
            writer.close()


class Connection:
    """One peer, from its first event to its last."""

    def __init__(self, offer: Offer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._offer = offer
        self._reader, self._writer = reader, writer
        self._asked = TranscribeFields()  # of the speech that follows
        self._speech: Speech | None = None  # that is being spoken
        self._job: Job | None = None  # of the last request
        self._answer: asyncio.Task[None] | None = None  # to it
        self._reading: asyncio.Task[None] | None = None
        self._patience: asyncio.Timeout | None = None  # with the peer's silence
        self._failed: RequestError | None = None
        self.last = False  # whether the connection ends with the answer

    @property
    def busy(self) -> bool:
        return self._failed is not None or (self._answer is not None and not self._answer.done())

    async def run(self, refusal: RequestError | None = None) -> None:
        """Serve until the peer leaves or something fails. refusal: only say this."""
        self._failed = refusal
        try:
            if refusal is None:
                self._reading = asyncio.create_task(self._read())
                await asyncio.wait({self._reading})
                if not self._reading.cancelled():
                    self._failed = self._error_of(self._reading)
        finally:
            self._drop()
            if self._reading is not None:
                self._reading.cancel()
        if self._failed is not None:
            await self._say_and_linger(self._failed)

    async def _read(self) -> None:
        while True:
            speech = self._speech
            # A request that is being answered has its own time limit.
            idle_s = None if self.busy else IDLE_S
            try:
                async with asyncio.timeout(idle_s if speech is None else speech.idle_s()) as self._patience:
                    event = await read_event(self._reader)
            except TimeoutError as cause:
                if speech is None:
                    return
                raise RequestError(
                    "request_timeout",
                    "the sound stopped coming, or it came too slowly; end it with audio-stop",
                ) from cause
            if event is None:
                return
            await self._take(event)

    async def _take(self, event: Event) -> None:
        kind = event.type
        if Describe.is_type(kind):
            await self._write(self._offer.info())
        elif Ping.is_type(kind):
            await self._write(Pong(fields_of(event, PingFields).text))
        elif Transcribe.is_type(kind):
            self._drop()
            self._asked = fields_of(event, TranscribeFields)
            check_model(self._asked.name, self._offer.limits)
            language_code(self._asked.language or self._offer.limits.language)
        elif AudioStart.is_type(kind):
            self._drop()
            self._begin(fields_of(event, AudioFields))
        elif AudioChunk.is_type(kind):
            await self._hear(fields_of(event, AudioFields), event.payload or b"")
        elif AudioStop.is_type(kind):
            self._end()
        elif Transcript.is_type(kind):
            self._drop()
            await self._handle(fields_of(event, TranscriptFields))
        else:
            log.debug("an event of type %r is passed over", kind[:64])

    # --- asr

    def _begin(self, form: AudioFields) -> Speech:
        ears = self._offer.service.ears
        if ears is None:
            raise RequestError("invalid_request", "this daemon's model hears nothing; send text to `handle`")
        self._speech = Speech(form, max_s=ears.encoder.max_s)
        return self._speech

    async def _hear(self, form: AudioFields, audio: bytes) -> None:
        if self._speech is None:
            self._drop()
            self._begin(form)
        speech = self._speech
        assert speech is not None
        if speech.add(form, audio) and self._answer is None:  # it is prefilled from here on
            language = language_code(self._asked.language or self._offer.limits.language)
            request = transcription(
                {"type": "audio", "feed": speech.feed},
                language=language,
                timeout_s=self._offer.limits.timeout_s,
            )
            job = await self._submit(request)
            self._start(self._transcribe(job, language, self._asked.context))

    def _end(self) -> None:
        speech, self._speech = self._speech, None
        self._asked = TranscribeFields()
        if speech is None:
            raise RequestError("invalid_request", "audio-stop: no sound came before it")
        speech.end()
        if self._answer is None:
            raise RequestError(
                "invalid_request", "too short a sound to hear anything; expected at least 20 ms"
            )

    async def _transcribe(self, job: Job, language: str, context: dict[str, Any] | None) -> None:
        line = Line()
        await self._stream(job, line.add, TranscriptStart(context, language), TranscriptChunk)
        await self._write(Transcript(line.text, context, language))
        await self._write(TranscriptStop())

    # --- handle

    async def _handle(self, asked: TranscriptFields) -> None:
        if not asked.text.strip():
            await self._write(NotHandled(None, asked.context))
            return
        given = (asked.context or {}).get("conversation_id")
        key = given if isinstance(given, str) else None
        past = self._offer.conversations.messages(key)
        try:
            job = await self._submit(self._question(asked.text, past))
        except RequestError as error:
            if error.code != "context_length_exceeded" or not past:
                raise
            self._offer.conversations.forget(key)
            job = await self._submit(self._question(asked.text, []))
        self._start(self._tell(job, asked, key))

    def _question(self, text: str, past: list[dict[str, str]]) -> ChatRequest:
        system = [{"role": "system", "content": self._offer.system}] if self._offer.system else []
        messages = [*system, *past, {"role": "user", "content": text}]
        return ChatRequest(messages, timeout_s=self._offer.limits.timeout_s)

    async def _tell(self, job: Job, asked: TranscriptFields, key: str | None) -> None:
        told: list[str] = []

        def add(text: str) -> str:
            told.append(text)
            return text

        started = await self._stream(job, add, HandledStart(asked.context), HandledChunk, eager=False)
        text = "".join(told).strip()
        if not text:
            await self._write(NotHandled(None, asked.context))
            return
        self._offer.conversations.add(key, asked.text, text)
        await self._write(Handled(text, asked.context))
        if started:
            await self._write(HandledStop())

    # --- both

    async def _submit(self, request: ChatRequest) -> Job:
        self._job = await asyncio.to_thread(self._offer.service.submit, request)
        return self._job

    async def _stream(
        self,
        job: Job,
        add: Callable[[str], str],
        start: Eventable,
        chunk: Callable[[str], Eventable],
        *,
        eager: bool = True,
    ) -> bool:
        """Write the answer's pieces after `start`. eager: `start` comes even if nothing is said.

        add: takes what the model says, gives what is to be written. Whether `start` was written.
        Raises RequestError.
        """
        started = False
        async with contextlib.aclosing(events_of(job)) as events:
            async for event in events:
                if error := failure(event):
                    raise error
                new = add(event.text) if isinstance(event, TextDelta) else ""
                if not started and (new or (eager and isinstance(event, Done))):
                    started = True
                    await self._write(start)
                if new:
                    await self._write(chunk(new))
        return started

    def _start(self, answer: Coroutine[Any, Any, None]) -> None:
        self._answer = asyncio.create_task(answer)
        self._answer.add_done_callback(self._answered)

    def _answered(self, answer: asyncio.Task[None]) -> None:
        """An answer that fails, or that is the last one, ends the reading, and so the connection."""
        if answer.cancelled():
            return
        self._failed = self._error_of(answer)
        if (answer.exception() is not None or self.last) and self._reading is not None:
            self._reading.cancel()
        elif self._patience is not None:
            with contextlib.suppress(RuntimeError):  # an event has just come
                self._patience.reschedule(asyncio.get_running_loop().time() + IDLE_S)

    def _drop(self) -> None:
        """Forget the speech and cancel the answer, if there are any."""
        if self._answer is not None:
            self._answer.cancel()
            self._answer = None
        if self._job is not None:
            self._job.cancel()
            self._job = None
        if self._speech is not None:
            self._speech.drop()
            self._speech = None

    def _error_of(self, task: asyncio.Task[None]) -> RequestError | None:
        cause = task.exception()
        if cause is None or isinstance(cause, RequestError):
            return cause
        if isinstance(cause, ConnectionError | TimeoutError):
            log.info("a peer went away, or takes no answer: its request is cancelled")
            return None
        log.error("a Wyoming request failed", exc_info=cause)
        return RequestError("internal_error", "an error inside the daemon; its log has the details")

    async def _write(self, event: Eventable) -> None:
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await async_write_event(event.event(), self._writer)

    async def _say_and_linger(self, error: RequestError) -> None:
        """Say what went wrong, and no more; read what still comes, or a reset would take the error away."""
        log.info("a Wyoming request is refused: %s", error)
        with contextlib.suppress(ConnectionError, TimeoutError):
            await self._write(Error(str(error), error.code))
            self._writer.write_eof()
            async with asyncio.timeout(LINGER_S):
                while await self._reader.read(1 << 16):
                    pass
