"""A body of `/v1/chat/completions` → a `ChatRequest`, or an error that says what is wrong. No I/O, no clock.

HTTP and MQTT share it (docs/http.md lists every parameter). A parameter that would change the result and
cannot be honoured is refused by name; one that would not is ignored; one that nobody knows is an error. The
service checks what is inside messages and tools.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from ..errors import RequestError
from ..sampler import SamplingParams
from ..service import ChatRequest

MAX_BODY_BYTES = 1024 * 1024  # of a body without its sounds
MAX_SOUND_BODY_BYTES = 16 * 1024 * 1024  # of a body with sounds: 30 s of 48 kHz, stereo, float32, in base64
MAX_TRANSACTION_CHARS = 256

# Parameters that cannot be honoured -> (the values that ask for nothing, what to do instead).
# null always asks for nothing.
Refusals = Mapping[str, tuple[Sequence[Any], str]]
REFUSED: Refusals = {
    "audio": ((), "this daemon answers in text"),
    "frequency_penalty": ((0, 0.0), "use `repetition_penalty`"),
    "function_call": (("none",), "use `tools` and `tool_choice`"),
    "functions": (([],), "use `tools`"),
    "logit_bias": (({},), "leave it out"),
    "logprobs": ((False,), "leave it out"),
    "modalities": ((["text"],), 'only ["text"] is possible'),
    "n": ((1,), "send one request per answer"),
    "parallel_tool_calls": ((True,), "leave it out: the model decides how many tools it calls"),
    "presence_penalty": ((0, 0.0), "use `repetition_penalty`"),
    "reasoning_effort": ((), "use `enable_thinking`: true or false"),
    "response_format": (({"type": "text"},), "describe the format in the prompt and check the answer"),
    "top_logprobs": ((0,), "leave it out"),
    "verbosity": (("medium",), "say in the prompt how long the answer should be"),
    "web_search_options": ((), "leave it out"),
}

# Parameters that cannot change the answer: accepted and not looked at.
IGNORED = frozenset(
    "metadata prediction prompt_cache_key prompt_cache_options prompt_cache_retention safety_identifier "
    "service_tier store user".split()
)

# What may be long in a body: the base64 of an `input_audio` part.
_SOUND_DATA = re.compile(rb'"data"\s*:\s*"[A-Za-z0-9+/=:;,._\\-]{1024,}"')
_MSGSPEC_PATH = re.compile(r" - at `\$\.?(.*?)`$")


class ApiError(RequestError):
    """A RequestError that knows which parameter is to blame."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(code, message)
        self.param = param


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # there is none to include


class TemplateOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    enable_thinking: bool | None = None


Count = Annotated[int, msgspec.Meta(ge=1)]


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is read of a request body. None: not given."""

    messages: list[dict[str, Any]]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    stop: str | list[str] | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


@dataclass(frozen=True)
class ApiLimits:
    """What the daemon grants."""

    model: str  # the name it serves
    max_tokens: int | None = None  # most new tokens that a request may ask for; None: what the context holds
    timeout_s: float = 600.0  # longest time from arrival to the end of the answer
    hears: bool = False  # whether it takes sounds
    language: str = "en"  # of speech whose language is not told

    @property
    def max_body_bytes(self) -> int:
        return MAX_SOUND_BODY_BYTES if self.hears else MAX_BODY_BYTES

    def too_large(self, what: str) -> ApiError:
        """The error for a body of more than `max_body_bytes`."""
        deaf = "" if self.hears else "; this model hears nothing, so only text is taken"
        return ApiError(f"{what}, at most {self.max_body_bytes} are read{deaf}", code="payload_too_large")


@dataclass(frozen=True)
class ChatCall:
    """A decoded body: the request, and how its answer is wanted."""

    request: ChatRequest
    stream: bool = False
    include_usage: bool = False


TEXT_ONLY = ApiLimits(model="")


def parse_object(raw: bytes, limits: ApiLimits = TEXT_ONLY) -> dict[str, Any]:
    """JSON bytes to a dict. Raises ApiError on anything else, of any bytes."""
    if len(raw) > limits.max_body_bytes:
        raise limits.too_large(f"{len(raw)} bytes")
    if len(raw) > MAX_BODY_BYTES:  # then by its sounds, not by a million small objects
        text_bytes = len(raw) - sum(len(match[0]) for match in _SOUND_DATA.finditer(raw))
        if text_bytes > MAX_BODY_BYTES:
            message = f"{text_bytes} bytes besides the sounds' base64, at most {MAX_BODY_BYTES} are read"
            raise ApiError(message, code="payload_too_large")
    try:
        data = msgspec.json.decode(raw)
    except (ValueError, RecursionError) as cause:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        raise ApiError(f"the body is not valid JSON in UTF-8: {cause}") from cause
    if not isinstance(data, dict):
        raise ApiError(f"the body must be a JSON object, got {type(data).__name__}")
    return data


def text_object(raw: bytes) -> dict[str, Any]:
    """The request that a payload of plain text stands for: one user message. Raises ApiError."""
    if len(raw) > MAX_BODY_BYTES:
        raise ApiError(f"{len(raw)} bytes, at most {MAX_BODY_BYTES} are read", code="payload_too_large")
    try:
        text = raw.decode("utf-8").strip()
    except UnicodeDecodeError as cause:
        raise ApiError(f"the payload is neither a JSON object nor UTF-8 text: {cause}") from cause
    if not text:
        raise ApiError("the payload is empty; send a text, or the JSON body of a chat completion")
    return {"messages": [{"role": "user", "content": text}]}


def take_transaction(data: dict[str, Any]) -> str | int | None:
    """Remove `transaction` from a body and return it. Raises ApiError if it is no short string or integer."""
    value = data.pop("transaction", None)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63):
        return value
    if isinstance(value, str) and len(value) <= MAX_TRANSACTION_CHARS:
        return value
    raise ApiError(
        f"`transaction` must be an integer or a string of at most {MAX_TRANSACTION_CHARS} characters",
        "transaction",
    )


def chat_call(data: dict[str, Any], limits: ApiLimits, *, strict: bool = True) -> ChatCall:
    """A decoded body to a request. Raises ApiError naming the parameter. strict: see `read_fields`."""
    body = read_fields(data, Body, REFUSED, IGNORED, strict=strict)
    check_model(body.model, limits)
    if body.stream_options is not None and not body.stream:
        raise ApiError("`stream_options` needs `stream`: true", "stream_options")
    request = ChatRequest(
        messages=body.messages,
        tools=_tools(body),
        enable_thinking=_thinking(body),
        params=_sampling(body),
        max_tokens=_max_tokens(body, limits),
        stop=[body.stop] if isinstance(body.stop, str) else body.stop or (),
        timeout_s=min(body.timeout_s or limits.timeout_s, limits.timeout_s),
    )
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return ChatCall(request, stream=bool(body.stream), include_usage=usage)


def check_model(name: str | None, limits: ApiLimits) -> None:
    """A request need not name the model, but not another. Raises ApiError."""
    if name is not None and name != limits.model:
        raise unknown_model(name, limits)


def unknown_model(name: str, limits: ApiLimits) -> ApiError:
    """The error for a model that is not the one served."""
    message = f"no model {name[:100]!r} here; this daemon serves {limits.model!r}"
    return ApiError(message, "model", "model_not_found")


Fields = TypeVar("Fields", bound=msgspec.Struct)


def read_fields(
    data: Mapping[str, Any],
    kind: type[Fields],
    refused: Refusals,
    ignored: Collection[str],
    *,
    strict: bool = True,
) -> Fields:
    """Sort parameters into read, refused, ignored and unknown; check the types of those that are read.

    strict: False takes numbers and truth values as text too, as forms have them. Raises ApiError.
    """
    known = {field.name for field in msgspec.structs.fields(kind)}
    read: dict[str, Any] = {}
    for key, value in data.items():
        if key in known:
            read[key] = value
        elif key in refused:
            neutral, advice = refused[key]
            if value is not None and not any(_same(value, item) for item in neutral):
                raise ApiError(f"`{key}` is not supported with this value; {advice}", key)
        elif key not in ignored:
            near = difflib.get_close_matches(key[:64], [*known, *refused, *ignored], n=1, cutoff=0.6)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ApiError(f"unknown parameter `{key[:64]}`{hint}", key[:64])
    try:
        return msgspec.convert(read, kind, strict=strict)
    except (msgspec.ValidationError, RecursionError) as cause:
        text = str(cause)
        at = _MSGSPEC_PATH.search(text)
        param = at[1] if at else None
        raise ApiError(f"{param}: {text[: at.start()]}" if at and param else text, param) from cause


def _same(value: Any, neutral: Any) -> bool:
    """Equal and of one kind: `true` does not pass for 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _tools(body: Body) -> list[dict[str, Any]]:
    if body.tool_choice not in (None, "none", "auto"):
        raise ApiError('`tool_choice` can be "none" or "auto": a tool call cannot be forced', "tool_choice")
    tools = body.tools or []
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if isinstance(function, dict) and function.get("strict"):
            where = f"tools[{number}].function.strict"
            raise ApiError(f"{where}: arguments are not forced to fit the schema; check them", where)
    return [] if body.tool_choice == "none" else tools


def _thinking(body: Body) -> bool:
    nested = body.chat_template_kwargs.enable_thinking if body.chat_template_kwargs else None
    if body.enable_thinking is not None and nested is not None and body.enable_thinking != nested:
        raise ApiError(
            "`enable_thinking` and `chat_template_kwargs.enable_thinking` disagree", "enable_thinking"
        )
    return bool(nested if body.enable_thinking is None else body.enable_thinking)


def _sampling(body: Body) -> SamplingParams:
    """The parameters that were given; the engine's defaults (greedy) for the rest."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        given["seed"] = body.seed & 0xFFFF_FFFF_FFFF_FFFF
    return SamplingParams(**given)


def _max_tokens(body: Body, limits: ApiLimits) -> int | None:
    given = {value for value in (body.max_tokens, body.max_completion_tokens) if value is not None}
    if len(given) > 1:
        raise ApiError("`max_tokens` and `max_completion_tokens` disagree; send one of them", "max_tokens")
    wanted = given.pop() if given else None
    if wanted is not None and limits.max_tokens is not None and wanted > limits.max_tokens:
        raise ApiError(
            f"max_tokens is {wanted}; this daemon grants at most {limits.max_tokens}", "max_tokens"
        )
    return wanted
