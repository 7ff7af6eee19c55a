"""Reads bodies of HTTP requests within their caps, and forms with a sound file. Knows no API object."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from .openai_api import MAX_BODY_BYTES, MAX_SOUND_BODY_BYTES, ApiError, ApiLimits

MAX_HELD_BYTES = 4 * MAX_SOUND_BODY_BYTES  # of all bodies that are being read
BODY_TIMEOUT_S = 30.0  # to send a body
MAX_FIELDS = 32
MAX_FIELD_BYTES = 64 * 1024
FEED_BYTES = 64 * 1024  # a form is parsed in pieces of this size, so that other requests get their turn


class Bodies:
    """All bodies of a server. They are read by one event loop."""

    def __init__(self, limits: ApiLimits) -> None:
        self._limits = limits
        self._held_bytes = 0

    @contextlib.asynccontextmanager
    async def reading(self, request: Request) -> AsyncIterator[bytes]:
        """A body, counted as held until the block ends. Raises ApiError."""
        body = bytearray()
        try:
            await self._read(request, body)
            yield bytes(body)
        finally:
            self._held_bytes -= len(body)

    async def _read(self, request: Request, body: bytearray) -> None:
        """A body that is somewhat too large is read to its end: many clients look for an answer only then."""
        cap = self._limits.max_body_bytes
        most_bytes = max(2 * cap, 8 * MAX_BODY_BYTES)
        too_large = self._limits.too_large(f"the body is larger than {cap} bytes")
        declared = request.headers.get("content-length", "0")
        if len(declared) > 12 or (declared.isdigit() and int(declared) > most_bytes):
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for part in request.stream():
                    size += len(part)
                    if size <= cap:
                        self._hold(len(part))
                        body += part
                    elif size > most_bytes:
                        raise too_large
        except TimeoutError as cause:
            message = f"the body did not arrive in {BODY_TIMEOUT_S:.0f} s"
            raise ApiError(message, code="request_timeout") from cause
        if size > cap:
            raise too_large

    def _hold(self, size_bytes: int) -> None:
        if self._held_bytes + size_bytes > MAX_HELD_BYTES:
            raise ApiError("too many large requests are arriving at once; try again later", code="busy")
        self._held_bytes += size_bytes


async def read_form(headers: Headers, raw: bytes) -> tuple[dict[str, str], bytes]:
    """The fields of a multipart form, and the bytes of its `file`. Raises ApiError."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise ApiError("expected a form: `Content-Type: multipart/form-data`", code="unsupported_media_type")
    parser = _Form(headers, _pieces(raw), max_files=1, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    try:
        form = await parser.parse()
    except MultiPartException as cause:
        raise ApiError(f"the form cannot be read: {cause.message}") from cause
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError("expected a sound file in the field `file`", "file")
        fields: dict[str, str] = {}
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                continue
            if fields.setdefault(name, value) != value:
                raise ApiError(f"`{name[:64]}` is given twice with different values", name[:64])
        return fields, await file.read()
    finally:
        await form.close()


class _Form(MultiPartParser):
    spool_max_size = MAX_SOUND_BODY_BYTES  # a file stays in memory: its body is there already


async def _pieces(raw: bytes) -> AsyncGenerator[bytes]:
    for start in range(0, len(raw), FEED_BYTES):
        yield raw[start : start + FEED_BYTES]
        await asyncio.sleep(0)
