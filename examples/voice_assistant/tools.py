"""Tools: what the model is told of them, the check of a call, and the messages it makes. No connection.

    call --check--> values --render--> messages | topic to read

A call comes from a model that may have misheard: a name or value that the home does not know is an error,
in words that the model can tell the user.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from .config import PLACE, Parameter, Tool, Value

MAX_TEXT = 500  # characters of an argument
MAX_TOPIC_BYTES = 512
_NOT_IN_TOPICS = re.compile(r"[^\w.-]+")


class CallError(Exception):
    """A call that cannot be carried out; the message goes to the model."""


@dataclass(frozen=True)
class Outgoing:
    """One MQTT message to publish."""

    topic: str
    payload: bytes
    retain: bool

    def __str__(self) -> str:
        return f"{self.topic} {self.payload.decode()}"


@dataclass(frozen=True)
class Reading:
    """A topic whose last message is wanted."""

    topic: str
    json: str | None
    unit: str
    max_age_s: float | None


def declaration(tool: Tool) -> dict[str, Any]:
    """The tool in OpenAI's shape."""
    properties = {name: _schema(parameter) for name, parameter in tool.parameters.items()}
    required = [name for name, parameter in tool.parameters.items() if parameter.default is None]
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def find_tool(tools: Sequence[Tool], name: str) -> Tool:
    """Raises CallError."""
    for tool in tools:
        if tool.name == name:
            return tool
    known = ", ".join(tool.name for tool in tools) or "none"
    raise CallError(f"there is no tool {name[:64]!r}; known: {known}")


def check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> dict[str, Value]:
    """A value for each parameter. Raises CallError for a missing, unknown or bad one."""
    unknown = [name for name in arguments if name not in tool.parameters]
    if unknown:
        known = ", ".join(tool.parameters) or "none"
        raise CallError(f"{tool.name} has no parameter {unknown[0][:64]!r}; known: {known}")
    values: dict[str, Value] = {}
    for name, parameter in tool.parameters.items():
        given = arguments.get(name)
        if given is None:
            if parameter.default is None:
                raise CallError(f"{name} is missing")
            given = parameter.default
        values[name] = _checked(name, parameter, given)
    return values


def messages(tool: Tool, values: Mapping[str, Value]) -> list[Outgoing]:
    """What a call with these values publishes. Raises CallError."""
    wire = _wire(tool, values)
    return [
        Outgoing(_topic(publish.topic, wire), _payload(publish.payload, wire), publish.retain)
        for publish in tool.publish
    ]


def reading(tool: Tool, values: Mapping[str, Value]) -> Reading | None:
    """What a call with these values reads. Raises CallError."""
    read = tool.read
    if read is None:
        return None
    return Reading(_topic(read.topic, _wire(tool, values)), read.json, read.unit, read.max_age_s)


def read_filters(tools: Sequence[Tool]) -> list[str]:
    """The MQTT filters that select every topic that the tools may read."""
    filters: list[str] = []
    for tool in tools:
        if tool.read is None:
            continue
        topics = [tool.read.topic]
        for name in dict.fromkeys(PLACE.findall(tool.read.topic)):
            parameter = tool.parameters[name]
            spellings = [_text(value) for value in parameter.wire.values()]
            if parameter.enum:
                spellings += [_level(_text(value)) for value in parameter.enum if value not in parameter.wire]
            else:
                spellings.append(f"{{{name}}}")  # any one level
            topics = [topic.replace(f"{{{name}}}", text) for topic in topics for text in spellings]
        filters += [
            "/".join("+" if PLACE.search(level) else level for level in topic.split("/")) for topic in topics
        ]
    return list(dict.fromkeys(filters))


def value_of(payload: bytes, reading: Reading) -> str:
    """What a message says, with its unit. Raises CallError."""
    text = payload.decode(errors="replace").strip()
    if reading.json is not None:
        try:
            found = msgspec.json.decode(payload)
            for key in reading.json.split("."):
                found = found[int(key)] if isinstance(found, list) else found[key]
        except (msgspec.DecodeError, RecursionError, LookupError, TypeError, ValueError):
            raise CallError(f"its last message has no {reading.json}") from None
        text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    if not text or len(text) > MAX_TEXT:
        raise CallError("its last message cannot be read")
    return f"{text} {reading.unit}".strip()


def _schema(parameter: Parameter) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": parameter.type}
    if parameter.description:
        schema["description"] = parameter.description
    if parameter.enum:
        schema["enum"] = list(parameter.enum)
    for key in ("minimum", "maximum"):
        if getattr(parameter, key) is not None:
            schema[key] = getattr(parameter, key)
    return schema


def _checked(name: str, parameter: Parameter, given: Any) -> Value:
    value = _of_type(name, parameter, given)
    if parameter.enum:
        return _one_of(name, parameter, value)
    if isinstance(value, str):
        if not value.strip() or len(value) > MAX_TEXT:
            raise CallError(f"{name}: expected 1 to {MAX_TEXT} characters")
        return _spelled(value, parameter.wire) or value.strip()
    low, high = parameter.minimum, parameter.maximum
    if (low is not None and value < low) or (high is not None and value > high):
        limits = [f"at least {low:g}"] if low is not None else []
        limits += [f"at most {high:g}"] if high is not None else []
        raise CallError(f"{name}: {value:g} is out of range; {' and '.join(limits)}")
    return value


def _of_type(name: str, parameter: Parameter, given: Any) -> Value:
    """A value of the parameter's type: models write "21" for 21 and "true" for true. Raises CallError."""
    kind = parameter.type
    if kind == "string" and isinstance(given, str | int | float | bool):
        return given if isinstance(given, str) else json.dumps(given)
    text = str(given).strip().lower()
    if kind == "boolean" and text in ("true", "false"):
        return text == "true"
    if kind in ("integer", "number") and not isinstance(given, bool):
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if number.is_integer():
            return int(number)
        if kind == "number" and abs(number) < float("inf"):
            return number
    raise CallError(f"{name}: expected {'an' if kind == 'integer' else 'a'} {kind}, got {str(given)[:64]!r}")


def _one_of(name: str, parameter: Parameter, value: Value) -> Value:
    if not isinstance(value, str):
        if value in parameter.enum:
            return value
    elif found := _spelled(value, [one for one in parameter.enum if isinstance(one, str)]):
        return found
    known = [str(one) for one in parameter.enum]
    near = difflib.get_close_matches(str(value).lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise CallError(f"{name}: there is no {str(value)[:64]!r}; {hint}")


def _spelled(value: str, known: Any) -> str | None:
    """The one of `known` that `value` is, whatever its case and spaces, or that alone is in it as words."""
    spelled = {_plain(one): one for one in known if isinstance(one, str)}
    wanted = _plain(value)
    if wanted in spelled:
        return spelled[wanted]
    inside = [one for plain, one in spelled.items() if f" {plain} " in f" {wanted} "]
    return inside[0] if len(inside) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").split())


def _wire(tool: Tool, values: Mapping[str, Value]) -> dict[str, tuple[Value, bool]]:
    """name -> what stands for it on the wire, and whether the file said so."""
    wire = {}
    for name, value in values.items():
        known = tool.parameters[name].wire
        wire[name] = (known[value], True) if value in known else (value, False)  # type: ignore[index]
    return wire


def _topic(template: str, wire: Mapping[str, tuple[Value, bool]]) -> str:
    def level(match: re.Match[str]) -> str:
        value, is_given = wire[match[1]]
        text = _text(value) if is_given else _level(_text(value))
        if not text:
            raise CallError(f"{match[1]} names nothing")
        return text

    topic = PLACE.sub(level, template)
    if re.search(r"[+#\x00-\x1f]", topic) or len(topic.encode()) > MAX_TOPIC_BYTES:
        raise CallError("that makes no topic")
    return topic


def _level(text: str) -> str:
    """A value as one level of a topic: never more, whatever the model says."""
    return _NOT_IN_TOPICS.sub("_", text.lower()).strip("_")


def _payload(template: Any, wire: Mapping[str, tuple[Value, bool]]) -> bytes:
    if isinstance(template, str):
        return PLACE.sub(lambda match: _text(wire[match[1]][0]), template).encode()
    return json.dumps(_filled(template, wire), ensure_ascii=False, separators=(",", ":")).encode()


def _filled(template: Any, wire: Mapping[str, tuple[Value, bool]]) -> Any:
    """A JSON payload: "{level}" alone keeps the value's type."""
    if isinstance(template, dict):
        return {key: _filled(value, wire) for key, value in template.items()}
    if isinstance(template, list):
        return [_filled(value, wire) for value in template]
    if not isinstance(template, str):
        return template
    alone = PLACE.fullmatch(template)
    if alone:
        return wire[alone[1]][0]
    return PLACE.sub(lambda match: _text(wire[match[1]][0]), template)


def _text(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)
