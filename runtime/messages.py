"""Checks OpenAI messages and tools and brings them to the shape that templates read; knows no template.

What comes from a client is untrusted: everything is checked here, once, and every length has a cap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from .errors import RequestError

MAX_MESSAGES = 512
MAX_TOOLS = 128
MAX_CHARACTERS = 2_000_000  # of all strings together
MAX_DEPTH = 32  # of nested arguments and schemas

_ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
# Names under which clients send a model's reasoning back, the one that templates read first.
_REASONING = ("reasoning_content", "thinking", "reasoning")

Message = dict[str, Any]


def normalise_messages(messages: Sequence[Message]) -> list[Message]:
    """Checked messages with plain contents, arguments as mappings and names on tool results.

    Raises RequestError("invalid_request") naming the message.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise _invalid("messages", "a list of at least one message", messages)
    if len(messages) > MAX_MESSAGES:
        raise RequestError("invalid_request", f"messages: {len(messages)}, at most {MAX_MESSAGES} are taken")
    _check_size(messages, "messages")
    result: list[Message] = []
    names: dict[str, str] = {}  # tool call id -> function name
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise _invalid(f"{where}.role", f"one of {', '.join(_ROLES)}", message)
        role = "system" if message["role"] == "developer" else message["role"]
        calls = _tool_calls(message.get("tool_calls"), f"{where}.tool_calls") if role == "assistant" else []
        content = _content(message.get("content"), where, optional=bool(calls))
        new: Message = {"role": role, "content": content}
        if calls:
            new["tool_calls"] = calls
            names.update((call["id"], call["function"]["name"]) for call in calls if "id" in call)
        if role == "assistant":
            reasoning = next((message[key] for key in _REASONING if isinstance(message.get(key), str)), None)
            if reasoning is not None:
                new["reasoning_content"] = new["thinking"] = reasoning
        if role == "tool":
            new |= _tool_result_names(message, names, where)
        result.append(new)
    return result


def normalise_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked tools, each with a description and parameters. Raises RequestError("invalid_request")."""
    if not isinstance(tools, list | tuple):
        raise _invalid("tools", "a list", tools)
    if len(tools) > MAX_TOOLS:
        raise RequestError("invalid_request", f"tools: {len(tools)}, at most {MAX_TOOLS} are taken")
    _check_size(tools, "tools")
    result = []
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise _invalid(where, '{"type": "function", "function": {…}}', tool)
        name = _function_name(function.get("name"), f"{where}.function.name")
        description = function.get("description") or ""
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(description, str) or not isinstance(parameters, dict):
            raise _invalid(f"{where}.function", "a string description and an object of parameters", function)
        new = dict(function, name=name, description=description, parameters=parameters)
        result.append({"type": "function", "function": new})
    return result


def fold_tool_results(messages: Sequence[Message]) -> list[Message]:
    """Move `tool` messages into `tool_responses` of the message that called, as some templates want it.

    A plain answer that follows the results continues the same model turn, so it becomes that message's
    content.
    """
    result: list[Message] = []
    for message in messages:
        last = result[-1] if result else None
        calling = last is not None and last["role"] == "assistant" and "tool_calls" in last
        if message["role"] == "tool":
            if last is None or not calling or last["content"]:
                last = {"role": "assistant", "content": "", "tool_calls": []}
                result.append(last)
            last.setdefault("tool_responses", []).append(
                {"name": message["name"], "response": _parsed_object(message["content"])}
            )
        elif (
            last is not None
            and "tool_responses" in last
            and not last["content"]
            and message["role"] == "assistant"
            and "tool_calls" not in message
        ):
            last["content"] = message["content"]
        else:
            result.append(dict(message))
    return result


def parse_tool_results(messages: Sequence[Message]) -> list[Message]:
    """Turn results that are JSON objects into mappings."""
    return [
        message | {"content": _parsed_object(message["content"])} if message["role"] == "tool" else message
        for message in messages
    ]


def _content(content: Any, where: str, *, optional: bool) -> str | list[dict[str, str]]:
    """A string; parts of text and audio if there is audio among them."""
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        raise _invalid(f"{where}.content", "a string or a list of parts", content)
    parts: list[dict[str, str]] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "audio":
            parts.append({"type": "audio"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise RequestError(
                "invalid_request",
                f"{where}.content[{index}]: expected a part of type 'text' or 'input_audio', "
                f"got {_short(kind or part)}",
            )
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise _invalid(where, "a list", calls)
    result = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise _invalid(f"{where}[{index}]", '{"function": {"name": …, "arguments": …}}', call)
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as cause:
                raise RequestError(
                    "invalid_request", f"{where}[{index}].function.arguments: not valid JSON ({cause})"
                ) from cause
            _check_size(arguments, f"{where}[{index}].function.arguments")
        if not isinstance(arguments, dict):
            raise _invalid(f"{where}[{index}].function.arguments", "a JSON object", arguments)
        name = _function_name(function.get("name"), f"{where}[{index}].function.name")
        new: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
        if isinstance(call.get("id"), str):
            new["id"] = call["id"]
        result.append(new)
    return result


def _tool_result_names(message: Message, names: dict[str, str], where: str) -> dict[str, str]:
    call_id, name = message.get("tool_call_id"), message.get("name")
    if not isinstance(name, str) and isinstance(call_id, str):
        name = names.get(call_id)
    if not isinstance(name, str):
        raise RequestError(
            "invalid_request",
            f"{where}: a tool message needs a tool_call_id that an earlier assistant message made, or a name",
        )
    found = {"name": _function_name(name, f"{where}.name")}
    if isinstance(call_id, str):
        found["tool_call_id"] = call_id
    return found


def _function_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _invalid(where, "1 to 128 letters, digits, '_', '-' or '.'", name)
    return name


def _parsed_object(text: str) -> dict[str, Any] | str:
    try:
        value = json.loads(text)
        _check_size(value, "a tool's result")
    except (ValueError, RecursionError, RequestError):
        return text
    return value if isinstance(value, dict) else text


def _check_size(value: Any, where: str) -> None:
    """Refuse what is too large, too deep or no JSON value."""
    characters = 0
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise RequestError("invalid_request", f"{where}: nested more than {MAX_DEPTH} deep")
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, dict):
            for key, inner in item.items():
                if not isinstance(key, str):
                    raise _invalid(where, "string keys", key)
                characters += len(key)
                waiting.append((inner, depth + 1))
        elif isinstance(item, list | tuple):
            characters += len(item)
            waiting.extend((inner, depth + 1) for inner in item)
        elif item is not None and not isinstance(item, bool | int | float):
            raise _invalid(where, "JSON values only", item)
        if characters > MAX_CHARACTERS:
            raise RequestError("invalid_request", f"{where}: more than {MAX_CHARACTERS} characters")


def _invalid(where: str, expected: str, got: Any) -> RequestError:
    return RequestError("invalid_request", f"{where}: expected {expected}, got {_short(got)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
