"""Payloads of MQTT requests → what is asked for, and how its events become replies. No network, no clock.

On `request/chat` a payload is a chat completion or a text; on `request/audio` it is a sound file, whose
parameters are the message's user properties, or JSON that names one in the sound folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..service import ChatRequest, Event
from .openai_api import (
    ApiError,
    ApiLimits,
    ChatCall,
    chat_call,
    parse_object,
    take_transaction,
    text_object,
)
from .openai_audio import TranscriptionCall, TranscriptReply, transcription_call
from .openai_reply import ChunkStream, Completion, ReplyHead
from .sound_folder import SoundFolder

Transaction = str | int | None


@dataclass(frozen=True)
class Replies:
    """How the events of one answer are published."""

    stream: bool
    chunks: Callable[[Event], list[dict[str, Any]]]  # the messages of a stream that an event makes
    whole: Callable[[], dict[str, Any]]  # after the last event, if it is no stream


@dataclass(frozen=True)
class Fields:
    """A payload, taken apart as far as it takes to know whom to answer."""

    transaction: Transaction
    data: dict[str, Any]
    sound: bytes | None = None  # on `request/audio`; None: `path` in `data` says where it is
    strict: bool = True  # False: numbers are written as text, in user properties


def chat_fields(payload: bytes, limits: ApiLimits) -> Fields:
    """A payload on `request/chat`. Raises ApiError."""
    is_json = payload.lstrip()[:1] == b"{"
    data = parse_object(payload, limits) if is_json else text_object(payload)
    return Fields(take_transaction(data), data)


def audio_fields(payload: bytes, properties: Sequence[tuple[str, str]], limits: ApiLimits) -> Fields:
    """A payload on `request/audio`. Raises ApiError."""
    data: dict[str, Any] = {}
    for name, value in properties:
        if data.setdefault(name, value) != value:
            raise ApiError(f"the user property `{name[:64]}` is given twice", name[:64])
    if payload.lstrip()[:1] == b"{":  # no sound file begins so
        if data:
            raise ApiError("send parameters in the JSON, not as user properties", next(iter(data))[:64])
        data = parse_object(payload)
        return Fields(take_transaction(data), data)
    if not payload:
        raise ApiError("the payload is empty; send a sound file, or JSON with the `path` of one")
    if len(payload) > limits.max_body_bytes:
        raise limits.too_large(f"{len(payload)} bytes")
    return Fields(take_transaction(data), data, payload, strict=False)


def chat_request(fields: Fields, limits: ApiLimits, head: ReplyHead) -> tuple[ChatRequest, Replies]:
    """What is asked for on `request/chat`. Raises ApiError."""
    return _chat(chat_call(fields.data, limits), head)


def audio_request(
    fields: Fields, limits: ApiLimits, head: ReplyHead, folder: SoundFolder | None
) -> tuple[ChatRequest, Replies]:
    """What is asked for on `request/audio`: a transcript, or the answer to a `question` about the sound.

    Reads the file that `path` names. Raises RequestError.
    """
    if not limits.hears:
        raise ApiError("this daemon's model hears nothing; serve a bundle with an audio encoder")
    data = dict(fields.data)
    sound = fields.sound
    if sound is None:
        sound = _from_folder(data.pop("path", None), folder, limits)
    if "question" not in data:
        return _transcript(transcription_call(data, sound, limits, strict=fields.strict))
    question = data.pop("question")
    if not isinstance(question, str):
        raise ApiError("`question` must be a text, which may be empty", "question")
    if "messages" in data:
        raise ApiError("messages: send whole conversations to request/chat", "messages")
    words = [{"type": "text", "text": question}] if question.strip() else []
    content = [*words, {"type": "audio", "file": sound}]
    messages = [{"role": "user", "content": content}]
    return _chat(chat_call(data | {"messages": messages}, limits, strict=fields.strict), head)


def _from_folder(path: object, folder: SoundFolder | None, limits: ApiLimits) -> bytes:
    if folder is None:
        raise ApiError("path: this daemon reads no files; start it with --audio-folder", "path")
    if not isinstance(path, str):
        raise ApiError('path: expected the path of a sound file, as in {"path": "x.wav"}', "path")
    return folder.read(path, max_bytes=limits.max_body_bytes)


def _chat(call: ChatCall, head: ReplyHead) -> tuple[ChatRequest, Replies]:
    if call.stream:
        return call.request, Replies(True, ChunkStream(head, call.include_usage).chunks, dict)
    completion = Completion(head)
    return call.request, Replies(False, completion.add, completion.result)


def _transcript(call: TranscriptionCall) -> tuple[ChatRequest, Replies]:
    if call.format == "text":
        raise ApiError("`response_format`: replies are JSON; use json or verbose_json", "response_format")
    reply = TranscriptReply(call)
    return call.request, Replies(call.stream, reply.chunks, reply.result)


def user_properties(properties: object) -> Sequence[tuple[str, str]]:
    """Those of a message; MQTT 3.1.1 has none."""
    found: Sequence[tuple[str, str]] = getattr(properties, "UserProperty", ())
    return found
