"""The assistant's YAML: its schema and its checks. Knows no sound, no connection and no model.

Strict: an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from ...runtime.errors import ConfigError, RequestError
from ...runtime.strict import decode_yaml_file
from ...runtime.transcribe import language_code
from ...runtime.transports.mqtt_address import BrokerAddress
from ..broker import broker_of

PLACE = re.compile(r"\{(\w+)\}")  # a parameter in a topic or payload
Value = str | int | float | bool
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
Seconds = Annotated[float, msgspec.Meta(ge=0, le=60)]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of everything in the file."""


class Parameter(Struct, frozen=True, kw_only=True):
    """One argument of a tool: what the model is told, what is accepted, what stands for it on the wire."""

    type: Literal["string", "integer", "number", "boolean"] = "string"
    description: str = ""
    enum: tuple[Value, ...] = ()  # the only values that are accepted; the model is told
    wire: dict[str | bool | int, Value] = {}  # value -> what stands in topics and payloads for it
    minimum: float | None = None
    maximum: float | None = None
    default: Value | None = None  # None: the model must give it


class Publish(Struct, frozen=True, kw_only=True):
    """One message that a call publishes. `{name}` stands for a parameter."""

    topic: str
    payload: Any  # text, or a mapping or list that is sent as JSON
    retain: bool = False


class Read(Struct, frozen=True, kw_only=True):
    """The topic that a call reads: the last message on it is the result."""

    topic: str
    json: str | None = None  # path in a JSON payload: keys and list indexes, joined by points
    unit: str = ""
    max_age_s: Annotated[float, msgspec.Meta(gt=0)] | None = None  # older: the call fails


class Tool(Struct, frozen=True, kw_only=True):
    """What the model can call, and what happens then: messages are published, or a topic is read."""

    name: str
    description: str
    parameters: dict[str, Parameter] = {}
    publish: tuple[Publish, ...] = ()
    read: Read | None = None


class Listen(Struct, frozen=True, kw_only=True):
    """When speech begins and ends."""

    threshold: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.5  # probability that a frame is speech
    start_s: Seconds = 0.1  # so much speech begins a turn …
    interrupt_s: Seconds = 0.25  # … or stops an answer
    least_s: Seconds = 0.25  # a turn with less speech is dropped
    hangover_s: Seconds = 0.7  # so much silence ends it
    pre_roll_s: Seconds = 0.4  # sound from before it was known to be speech
    longest_s: Annotated[float, msgspec.Meta(ge=2, le=30)] = 20.0
    barge_in: bool = True  # listen while speaking; without, what the microphone hears then is dropped


class Speak(Struct, frozen=True, kw_only=True):
    """The assistant's voice."""

    piper_voice: str | None = None  # a voice's .onnx file, its .onnx.json beside it
    espeak_voice: str = "en-us"
    words_per_minute: Annotated[int, msgspec.Meta(ge=80, le=450)] = 165  # of espeak-ng


class Answer(Struct, frozen=True, kw_only=True):
    """How the model answers and what it remembers."""

    max_tokens: Annotated[int, msgspec.Meta(ge=8, le=4096)] = 160
    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] = 0.0
    tool_rounds: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4  # calls and results in a row, in one turn
    remember_turns: Annotated[int, msgspec.Meta(ge=0, le=200)] = 12  # at most; what fits in the context
    transcripts: bool = False  # write down what was heard after each answer, and remember that instead
    language: str = "en"  # of what is said, for transcripts


class Config(Struct, frozen=True, kw_only=True):
    """The whole file."""

    broker: str  # mqtt://[user:password@]host[:port], mqtts:// for TLS
    tools: tuple[Tool, ...]
    system: str = "You control a home. Call a tool when one fits."
    password_file: str | None = None  # its first line, instead of a password in the URL
    ca_file: str | None = None  # for mqtts; None: the system's certificates
    listen: Listen = msgspec.field(default_factory=Listen)
    speak: Speak = msgspec.field(default_factory=Speak)
    answer: Answer = msgspec.field(default_factory=Answer)

    @property
    def broker_address(self) -> BrokerAddress:
        """Raises ConfigError."""
        return broker_of(self.broker, self.password_file)


def load_config(path: Path) -> Config:
    """Read and check the file. Raises ConfigError naming the file, the place and what was expected."""
    config = decode_yaml_file(path, Config)
    for problem in problems(config):
        raise ConfigError(f"{path}: {problem}")
    return config


def problems(config: Config) -> Iterator[str]:
    """What the schema alone cannot see."""
    try:
        config.broker_address  # noqa: B018 - asked for its error
    except ConfigError as error:
        yield str(error)
    try:
        language_code(config.answer.language)
    except RequestError as error:
        yield f"answer.{error}"
    if config.ca_file is not None and not Path(config.ca_file).is_file():
        yield f"ca_file: {config.ca_file}: no such file"
    seen: set[str] = set()
    for index, tool in enumerate(config.tools):
        where = f"tools[{index}]"
        if not _NAME.fullmatch(tool.name):
            yield f"{where}.name: got {tool.name!r}, expected 1 to 64 letters, digits, '_', '-' or '.'"
        if tool.name in seen:
            yield f"{where}.name: {tool.name!r} is taken by an earlier tool"
        seen.add(tool.name)
        where += f" ({tool.name})"
        for name, parameter in tool.parameters.items():
            yield from _parameter_problems(f"{where}.parameters.{name}", name, parameter)
        yield from _action_problems(where, tool)


def _parameter_problems(where: str, name: str, parameter: Parameter) -> Iterator[str]:
    if not re.fullmatch(r"\w{1,64}", name):
        yield f"{where}: expected a name of letters, digits and '_'"
    is_number = parameter.type in ("integer", "number")
    if not is_number and (parameter.minimum is not None or parameter.maximum is not None):
        yield f"{where}: minimum and maximum are for the types integer and number"
    low, high = parameter.minimum, parameter.maximum
    if low is not None and high is not None and low > high:
        yield f"{where}: minimum {low:g} is above maximum {high:g}"
    if len(set(parameter.enum)) != len(parameter.enum):
        yield f"{where}.enum: a value is given twice"
    given = [("enum", value) for value in parameter.enum]
    given += [("wire", key) for key in parameter.wire]
    if parameter.default is not None:
        given.append(("default", parameter.default))
    for key, value in given:
        if parameter.type == "string" and isinstance(value, bool):
            yield f"{where}.{key}: YAML reads on, off, yes and no as {value}; put them in quotes"
        elif not fits_type(parameter.type, value):
            yield f"{where}.{key}: {value!r} is no {parameter.type}"
        elif key != "enum" and parameter.enum and value not in parameter.enum:
            yield f"{where}.{key}: {value!r} is not in enum"


def fits_type(type_: str, value: Any) -> bool:
    """Whether a value is of a parameter's type."""
    if type_ == "string":
        return isinstance(value, str)
    if type_ == "boolean":
        return isinstance(value, bool)
    return isinstance(value, int if type_ == "integer" else int | float) and not isinstance(value, bool)


def _action_problems(where: str, tool: Tool) -> Iterator[str]:
    if bool(tool.publish) == (tool.read is not None):
        yield f"{where}: expected either publish or read"
    templates: list[tuple[str, Any]] = []
    topics = [(f"publish[{i}].topic", publish.topic) for i, publish in enumerate(tool.publish)]
    templates += [(f"publish[{i}].payload", publish.payload) for i, publish in enumerate(tool.publish)]
    if tool.read is not None:
        topics.append(("read.topic", tool.read.topic))
    for key, topic in topics:
        if not topic or re.search(r"[+#\x00-\x1f]", topic) or topic.startswith("$"):
            yield f"{where}.{key}: got {topic!r}, expected a topic without wildcards and a leading '$'"
    for key, template in topics + templates:
        for name in places(template):
            if name not in tool.parameters:
                known = ", ".join(tool.parameters) or "none"
                yield f"{where}.{key}: {{{name}}} is no parameter of this tool; known: {known}"


def places(template: Any) -> Iterator[str]:
    """The parameters that a template names."""
    if isinstance(template, str):
        yield from PLACE.findall(template)
    elif isinstance(template, dict):
        for value in template.values():
            yield from places(value)
    elif isinstance(template, list):
        for value in template:
            yield from places(value)
