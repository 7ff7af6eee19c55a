"""The service's events → the objects of the OpenAI API: a completion, its chunks, an error. No I/O, no clock.

HTTP and MQTT share it. Whoever calls gives the id and the time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from ..service import Done, Event, Failed, ReasoningDelta, TextDelta, ToolCallDelta

# RequestError.code -> (HTTP status, OpenAI's error type)
_ERRORS = {
    "invalid_request": (400, "invalid_request_error"),
    "context_length_exceeded": (400, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "payload_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "forbidden": (403, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "busy": (429, "rate_limit_error"),
    "cancelled": (503, "server_error"),
    "shutting_down": (503, "server_error"),
    "timeout": (504, "server_error"),
}

# What the service finds wrong begins with the parameter's name: "messages[0].content: expected …"
_PARAMS = (
    "messages tools stop max_tokens timeout_s temperature top_k top_p min_p repetition_penalty seed "
    "language prompt"
)
_PARAM = re.compile(rf"((?:{'|'.join(_PARAMS.split())})\b[\w.\[\]]*): ")


def error_object(error: RequestError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`."""
    message = str(error)
    kind = _ERRORS.get(error.code, (500, "server_error"))[1]
    param = getattr(error, "param", None)
    if param is None and kind == "invalid_request_error" and (named := _PARAM.match(message)):
        param = named[1]
    return {"error": {"message": message, "type": kind, "param": param, "code": error.code}}


def error_status(error: RequestError) -> int:
    """The HTTP status of an error."""
    return _ERRORS.get(error.code, (500, ""))[0]


def failure(event: Event) -> RequestError | None:
    """The error that an event stands for, if it does: a failure, or an end without an answer."""
    if isinstance(event, Failed):
        return RequestError(event.code, event.message)
    if isinstance(event, Done) and event.finish_reason == "cancelled":
        return RequestError(
            "cancelled", "the request was cancelled before its answer was complete; send it again"
        )
    return None


@dataclass(frozen=True)
class ReplyHead:
    """What every object of one answer carries."""

    id: str  # "chatcmpl-…"
    created: int  # Unix time, s
    model: str

    def wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


@dataclass
class Completion:
    """Gathers the events of one answer; `result()` is the `chat.completion` once Done came."""

    head: ReplyHead
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    done: Done | None = None

    def add(self, event: Event) -> list[dict[str, Any]]:
        """Takes an event; makes no chunk of it."""
        if isinstance(event, TextDelta):
            self.text.append(event.text)
        elif isinstance(event, ReasoningDelta):
            self.reasoning.append(event.text)
        elif isinstance(event, ToolCallDelta):
            self.calls[event.index] = _call(event)
        elif isinstance(event, Done):
            self.done = event
        return []

    def result(self) -> dict[str, Any]:
        assert self.done is not None, "result() before Done"
        content = "".join(self.text)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self.calls and not content else content,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = [self.calls[index] for index in sorted(self.calls)]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self.done.finish_reason}
        return self.head.wrap("chat.completion", [choice]) | _totals(self.done)


@dataclass
class ChunkStream:
    """Turns events into `chat.completion.chunk` objects, in order; the first one names the role."""

    head: ReplyHead
    include_usage: bool = False
    started: bool = False

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        if isinstance(event, TextDelta):
            return [self._chunk({"content": event.text})]
        if isinstance(event, ReasoningDelta):
            return [self._chunk({"reasoning_content": event.text})]
        if isinstance(event, ToolCallDelta):
            return [self._chunk({"tool_calls": [{"index": event.index} | _call(event)]})]
        if isinstance(event, Done):
            last = self._chunk({}, event.finish_reason)
            if not self.include_usage:
                return [last]
            return [last, self.head.wrap("chat.completion.chunk", []) | _totals(event)]
        return []

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        if not self.started:
            self.started = True
            delta = {"role": "assistant", "content": ""} | delta
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self.head.wrap("chat.completion.chunk", [choice])
        return chunk | {"usage": None} if self.include_usage else chunk


def _totals(done: Done) -> dict[str, Any]:
    """OpenAI's token counts, and beside them what the answer took (an extension that llama.cpp has too)."""
    usage, stats = done.usage, done.stats
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    if stats is None:
        return {"usage": counts}
    timings = {
        "prefill_s": round(stats.prefill_s, 4),
        "ttft_s": round(stats.ttft_s, 4),
        "decode_s": round(stats.decode_s, 4),
        "decode_tokens_per_s": round(stats.decode_tokens_per_s, 2),
        "reused_tokens": stats.reused_tokens,
        "drafted_tokens": stats.drafted,
        "accepted_tokens": stats.accepted,
    }
    return {"usage": counts, "timings": timings}


def _call(event: ToolCallDelta) -> dict[str, Any]:
    return {
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": event.arguments_json},
    }
