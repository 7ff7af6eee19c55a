"""The fields of `/v1/audio/transcriptions` → a request, and its events → OpenAI's objects. No I/O, no clock.

HTTP and MQTT share it; docs/http.md lists the fields. A field that would change the result and cannot be
honoured is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec

from ..audio.files import open_audio
from ..service import ChatRequest, Done, Event, TextDelta
from ..transcribe import LANGUAGES, Transcript, language_code, transcription
from .openai_api import ApiError, ApiLimits, Refusals, check_model, read_fields

Format = Literal["json", "text", "verbose_json"]

_PLAIN = "leave it out: the transcript is plain text"
REFUSED: Refusals = {
    "chunking_strategy": ((), "leave it out: a sound is transcribed in one piece"),
    "include": (("", []), _PLAIN),
    "keywords": ((), "use `prompt`"),
    "known_speaker_names": ((), _PLAIN),
    "known_speaker_references": ((), _PLAIN),
    "languages": ((), "use `language`"),
    "timestamp_granularities": (("", []), _PLAIN),
}


class TranscriptionFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is read. None: not given."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: Format | None = None
    stream: bool | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


@dataclass(frozen=True)
class TranscriptionCall:
    """A decoded request for a transcript, and how it is wanted."""

    request: ChatRequest
    format: Format
    stream: bool
    language: str  # ISO 639-1
    duration_s: float  # of the sound, as its header says


def transcription_call(
    fields: Mapping[str, Any], sound: bytes, limits: ApiLimits, *, strict: bool = True
) -> TranscriptionCall:
    """Fields and a sound file to a request. Raises ApiError naming the field, AudioError for the sound.

    strict: False takes numbers and truth values as text too, as forms have them.
    """
    read = read_fields(fields, TranscriptionFields, REFUSED, (), strict=strict)
    check_model(read.model, limits)
    if not limits.hears:
        raise ApiError("this daemon's model hears nothing; serve a bundle with an audio encoder")
    if read.stream and read.response_format not in (None, "json"):
        raise ApiError("`stream` needs `response_format` json", "response_format")
    language = language_code(limits.language if read.language is None else read.language)
    with open_audio(sound) as file:
        duration_s = file.duration_s
    request = transcription(
        {"type": "audio", "file": sound},
        language=language,
        prompt=read.prompt,
        temperature=read.temperature or 0.0,
        timeout_s=min(read.timeout_s or limits.timeout_s, limits.timeout_s),
    )
    return TranscriptionCall(request, read.response_format or "json", bool(read.stream), language, duration_s)


@dataclass
class TranscriptReply:
    """Gathers the events of a transcript: `chunks` for a stream, `result()` for the whole once Done came."""

    call: TranscriptionCall
    transcript: Transcript = field(default_factory=Transcript)
    done: Done | None = None

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, TextDelta):
            new = self.transcript.add(event.text)
            return [{"type": "transcript.text.delta", "delta": new}] if new else []
        if isinstance(event, Done):
            self.done = event
            return [{"type": "transcript.text.done", "text": self.transcript.text, "usage": self._tokens()}]
        return []

    def result(self) -> dict[str, Any]:
        """The object for the formats json and verbose_json."""
        if self.call.format == "verbose_json":
            seconds = round(self.call.duration_s, 3)
            return {
                "task": "transcribe",
                "language": LANGUAGES[self.call.language].lower(),
                "duration": seconds,
                "text": self.transcript.text,
                "usage": {"type": "duration", "seconds": seconds},
            }
        return {"text": self.transcript.text, "usage": self._tokens()}

    def _tokens(self) -> dict[str, Any]:
        assert self.done is not None, "result() before Done"
        usage = self.done.usage
        return {
            "type": "tokens",
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
