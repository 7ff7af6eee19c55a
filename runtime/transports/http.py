"""OpenAI-compatible HTTP on given sockets, with Starlette and uvicorn. Knows the API's objects, no model.

uvicorn runs in its own thread. Each accepted request has one short-lived thread that carries the job's events
over to the event loop; the service's queue bounds how many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..errors import RequestError
from ..service import ChatRequest, Done, Event, Failed, Job, Service
from .http_body import Bodies, read_form
from .job_events import carry
from .openai_api import MAX_BODY_BYTES, ApiError, ApiLimits, ChatCall, chat_call, parse_object, unknown_model
from .openai_audio import TranscriptionCall, TranscriptReply, transcription_call
from .openai_reply import ChunkStream, Completion, ReplyHead, error_object, error_status, failure

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
SEND_TIMEOUT_S = 60.0  # for a client to take one chunk
RETRY_AFTER_S = {"busy": 2, "shutting_down": 10}


class HttpServer:
    """Serves `service` on bound sockets from `start()` until `close()`."""

    def __init__(
        self, service: Service, limits: ApiLimits, sockets: list[socket.socket], *, allow_remote: bool = False
    ) -> None:
        config = uvicorn.Config(
            Api(service, limits, allow_remote=allow_remote).application(),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._sockets = sockets
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._ended = threading.Event()

    def start(self, timeout_s: float = 10.0) -> None:
        """Listen. Raises RuntimeError if uvicorn does not come up."""
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not self._server.started:
            if self._ended.is_set() or time.monotonic() > deadline:
                raise RuntimeError("the HTTP server did not start; its error is in the log above")
            time.sleep(0.01)

    @property
    def running(self) -> bool:
        return not self._ended.is_set()

    def close(self, timeout_s: float) -> None:
        """Stop listening and wait for the answers that are being sent."""
        self._server.should_exit = True
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._server.run(self._sockets)
        finally:
            self._ended.set()


class Api:
    """The routes."""

    def __init__(self, service: Service, limits: ApiLimits, *, allow_remote: bool) -> None:
        self._service = service
        self._limits = limits
        self._allow_remote = allow_remote
        self._bodies = Bodies(limits)
        self._created = int(time.time())

    def application(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/audio/transcriptions", self._transcribe, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/v1/models/{model:path}", self._model, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
            ],
            exception_handlers={
                RequestError: _on_request_error,
                HTTPException: _on_http_error,
                Exception: _on_bug,
            },
        )

    async def _chat(self, request: Request) -> Response:
        self._guard(request)
        async with self._bodies.reading(request) as raw:
            if len(raw) <= MAX_BODY_BYTES:
                data = parse_object(raw, self._limits)
            else:  # in a thread, so that other requests get their turn
                data = await asyncio.to_thread(parse_object, raw, self._limits)
        call = chat_call(data, self._limits)
        return await self._answer(request, call.request, call.stream, self._chat_reply(call))

    async def _transcribe(self, request: Request) -> Response:
        self._guard(request, form=True)
        async with self._bodies.reading(request) as raw:
            fields, sound = await read_form(request.headers, raw)
        call = await asyncio.to_thread(transcription_call, fields, sound, self._limits, strict=False)
        return await self._answer(request, call.request, call.stream, _transcript_reply(call))

    async def _answer(self, request: Request, wanted: ChatRequest, stream: bool, reply: Reply) -> Response:
        """Submit the request and answer with its events, or with the error that comes before the first."""
        job = await asyncio.to_thread(self._service.submit, wanted)  # it renders and tokenizes
        log.debug("%s accepted over HTTP", reply.name)
        events = _follow(job, request.receive)
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(events.aclose)
            try:
                first = await anext(events)  # an error before the first event still gets its status
                if error := failure(first):
                    raise error
                if stream:
                    stack.pop_all()  # the response closes the events now
                    return EventStream(reply, first, events)
                reply.chunks(first)
                async for event in events:
                    if error := failure(event):
                        raise error
                    reply.chunks(event)
                return reply.whole()
            except ClientDisconnect:
                log.info("%s: the client went away, the request is cancelled", reply.name)
        return Response(status_code=499)  # nobody reads it

    def _chat_reply(self, call: ChatCall) -> Reply:
        head = ReplyHead(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), self._limits.model)
        if call.stream:
            return Reply(head.id, ChunkStream(head, call.include_usage).chunks, Response, b"[DONE]")
        completion = Completion(head)
        return Reply(head.id, completion.add, lambda: _json(completion.result()))

    async def _models(self, request: Request) -> Response:
        self._guard(request)
        return _json({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        self._guard(request)
        name = request.path_params["model"]
        if name != self._limits.model:
            raise unknown_model(name, self._limits)
        return _json(self._model_object())

    async def _health(self, request: Request) -> Response:
        self._guard(request)
        health = self._service.health()
        return _json(health, 200 if health["state"] in ("ready", "generating") else 503)

    def _model_object(self) -> dict[str, object]:
        return {
            "id": self._limits.model,
            "object": "model",
            "created": self._created,
            "owned_by": "gemma-edge",
        }

    def _guard(self, request: Request, *, form: bool = False) -> None:
        """Over TCP, keep web pages out: no foreign Host (DNS rebinding), no body they may send unasked.

        form: the body is one that any page may send; but browsers say so when a page sends it.
        """
        if request.client is None:  # a unix socket: its file mode decides
            return
        if not self._allow_remote and not _is_loopback(request.url.hostname or ""):
            raise ApiError(
                "this address is served to local names only; use http://127.0.0.1", code="forbidden"
            )
        if form:
            if "origin" in request.headers or "sec-fetch-site" in request.headers:
                raise ApiError("web pages may not send forms to this address", code="forbidden")
            return
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            raise ApiError(
                "over TCP send the header `Content-Type: application/json`", code="unsupported_media_type"
            )


@dataclass(frozen=True)
class Reply:
    """How the events of one answer are written."""

    name: str  # for the log
    chunks: Callable[[Event], list[dict[str, Any]]]  # the objects of a stream that an event makes
    whole: Callable[[], Response]  # after the last event, if it is no stream
    end: bytes | None = None  # what a stream ends with


def _transcript_reply(call: TranscriptionCall) -> Reply:
    reply = TranscriptReply(call)

    def whole() -> Response:
        if call.format == "text":
            return Response(f"{reply.transcript.text}\n", media_type="text/plain")
        return _json(reply.result())

    return Reply(f"transcript-{secrets.token_hex(12)}", reply.chunks, whole)


class EventStream(Response):
    """Server-sent events: one `data:` line a chunk, then the reply's `end`; an error ends it early."""

    def __init__(self, reply: Reply, first: Event, rest: AsyncGenerator[Event]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._reply = reply
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def data(payload: bytes) -> None:
            body = b"data: " + payload + b"\n\n"
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": body, "more_body": True})

        async def event_out(event: Event) -> bool:
            if error := failure(event):
                await data(msgspec.json.encode(error_object(error)))
                return False
            for chunk in self._reply.chunks(event):
                await data(msgspec.json.encode(chunk))
            return not isinstance(event, Done)

        async with contextlib.aclosing(self._rest):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                going = await event_out(self._first)
                last = self._first
                while going:
                    last = await anext(self._rest)
                    going = await event_out(last)
                if isinstance(last, Done) and not failure(last) and self._reply.end is not None:
                    await data(self._reply.end)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            except (ClientDisconnect, TimeoutError):
                log.info("%s: the client went away, the request is cancelled", self._reply.name)


async def _follow(job: Job, receive: Receive) -> AsyncGenerator[Event]:
    """The job's events; at its end the job is cancelled. Raises ClientDisconnect if the client goes away."""
    arrived: asyncio.Queue[Event | None] = asyncio.Queue()  # at most a job's tokens; None: the client is gone
    carry(job, arrived)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        arrived.put_nowait(None)

    watcher = asyncio.create_task(watch())
    try:
        while True:
            event = await arrived.get()
            if event is None:
                raise ClientDisconnect
            yield event
            if isinstance(event, Done | Failed):
                return
    finally:
        watcher.cancel()
        job.cancel()


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _json(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def _error(error: RequestError) -> Response:
    wait_s = RETRY_AFTER_S.get(error.code)
    return _json(error_object(error), error_status(error), {"retry-after": str(wait_s)} if wait_s else None)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return _error(
        ApiError(
            f"{request.method} {request.url.path}: {error.detail}; docs/http.md lists the paths", code=code
        )
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    return _error(RequestError("internal_error", "an error inside the daemon; its log has the details"))
