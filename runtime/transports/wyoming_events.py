"""Reads Wyoming's events off a stream, with a cap on every length, and checks their fields. Knows no meaning.

The `wyoming` package writes events and knows their types. Its reader is not used: it takes any length, and
what it cannot read looks like the end of the stream.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, TypeVar

import msgspec
from wyoming.event import Event

from ..errors import RequestError

MAX_HEADER_BYTES = 64 * 1024  # one line of JSON
MAX_DATA_BYTES = 256 * 1024  # more JSON
MAX_PAYLOAD_BYTES = 4 * 1024 * 1024  # sound: a chunk usually has 2 KiB

Length = Annotated[int, msgspec.Meta(ge=0)]


class Header(msgspec.Struct, frozen=True):
    type: Annotated[str, msgspec.Meta(max_length=128)]
    data: dict[str, Any] | None = None
    data_length: Length | None = None
    payload_length: Length | None = None


class TranscribeFields(msgspec.Struct, frozen=True):
    name: str | None = None
    language: str | None = None
    context: dict[str, Any] | None = None


class AudioFields(msgspec.Struct, frozen=True):
    rate: int  # Hz
    width: int  # bytes of a sample
    channels: int


class TranscriptFields(msgspec.Struct, frozen=True):
    text: str
    language: str | None = None
    context: dict[str, Any] | None = None


class PingFields(msgspec.Struct, frozen=True):
    text: str | None = None


Fields = TypeVar("Fields", bound=msgspec.Struct)


async def read_event(reader: asyncio.StreamReader) -> Event | None:
    """The next event; None when the peer has left, also in the middle of one. Raises RequestError.

    reader: its `limit` should be MAX_HEADER_BYTES.
    """
    try:
        line = await reader.readuntil(b"\n")
        header = _decoded(line, Header, "the line that begins an event")
        data = dict(header.data or {})
        if header.data_length:
            _check_length("data_length", header.data_length, MAX_DATA_BYTES)
            raw = await reader.readexactly(header.data_length)
            data |= _decoded(raw, dict[str, Any], f"the data of {header.type!r}")
        payload = None
        if header.payload_length:
            _check_length("payload_length", header.payload_length, MAX_PAYLOAD_BYTES)
            payload = await reader.readexactly(header.payload_length)
    except asyncio.LimitOverrunError as cause:
        raise _invalid(f"an event begins with a line of more than {MAX_HEADER_BYTES} bytes") from cause
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Event(header.type, data, payload)


def fields_of(event: Event, kind: type[Fields]) -> Fields:
    """The fields of an event that are used, others left alone. Raises RequestError."""
    try:
        return msgspec.convert(event.data, kind)
    except (msgspec.ValidationError, RecursionError) as cause:
        raise _invalid(f"{event.type}: {cause}") from cause


def _decoded(raw: bytes, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (ValueError, RecursionError) as cause:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise _invalid(f"{what} is not as Wyoming has it: {cause}") from cause


def _check_length(name: str, length: int, most: int) -> None:
    if length > most:
        raise _invalid(f"{name}: {length} bytes, at most {most} are read; send smaller pieces")


def _invalid(message: str) -> RequestError:
    return RequestError("invalid_request", message)
