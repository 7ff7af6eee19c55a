"""Splits an answer into text, reasoning and tool calls as it streams; knows Gemma 4's markers and syntax.

    text … <|channel>thought\\n reasoning <channel|> text … <|tool_call>call:NAME{key:value,…}<tool_call|>

Markers are recognised as token ids, not in text: the caller feeds them apart (`marker`). A `<|tool_call>`
that the model spells in ordinary characters stays text, and no marker can leak into what the user sees.
Malformed output never raises: a tool call that cannot be read comes out as text, flagged.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

CHANNEL_OPEN, CHANNEL_CLOSE = "<|channel>", "<channel|>"
CALL_OPEN, CALL_CLOSE = "<|tool_call>", "<tool_call|>"
QUOTE = '<|"|>'
MARKERS = (CHANNEL_OPEN, CHANNEL_CLOSE, CALL_OPEN, CALL_CLOSE, QUOTE)

MAX_CALL_CHARACTERS = 65_536
MAX_DEPTH = 32
_MAX_CHANNEL_NAME = 32  # characters up to the line break


@dataclass(frozen=True)
class Text:
    """Visible text. malformed: it is a tool call that could not be read."""

    text: str
    malformed: bool = False


@dataclass(frozen=True)
class Reasoning:
    """Text of the thinking channel."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A whole tool call."""

    name: str
    arguments: dict[str, Any]


Part = Text | Reasoning | ToolCall


class ResponseParser:
    """The state is where we are: in text, at a channel's name, in a channel, or in a tool call.

    text --<|channel>--> name --line break--> channel --<channel|>--> text
    text, name, channel --<|tool_call>--> call --<tool_call|>--> text
    """

    def __init__(self) -> None:
        self._state = "text"
        self._name = ""  # of the channel, while it is being read
        self._call: list[str | None] = []  # text, and None for each QUOTE
        self._call_characters = 0

    def feed(self, text: str) -> list[Part]:
        """Ordinary text, cut anywhere."""
        if not text:
            return []
        if self._state == "text":
            return [Text(text)]
        if self._state == "channel":
            return [Reasoning(text)]
        if self._state == "name":
            return self._feed_name(text)
        self._call.append(text)
        self._call_characters += len(text)
        return self._give_up_call() if self._call_characters > MAX_CALL_CHARACTERS else []

    def marker(self, marker: str) -> list[Part]:
        """One of MARKERS, seen as a token. Others, and those that make no sense here, are dropped."""
        parts: list[Part] = []
        if marker == CHANNEL_OPEN:
            parts = self._leave()
            self._state, self._name = "name", ""
        elif marker == CHANNEL_CLOSE and self._state in ("name", "channel"):
            parts = self._leave()
        elif marker == CALL_OPEN:
            parts = self._leave()
            self._state, self._call, self._call_characters = "call", [], 0
        elif marker == CALL_CLOSE and self._state == "call":
            parts = self._leave()
        elif marker == QUOTE and self._state == "call":
            self._call.append(None)
            self._call_characters += 1
        return parts

    def finish(self) -> list[Part]:
        """The answer is over: what was held back. An unclosed tool call counts if it is whole."""
        return self._leave()

    def _leave(self) -> list[Part]:
        """Close whatever is open and go back to text."""
        state, self._state = self._state, "text"
        if state == "name" and self._name.strip() not in ("", "thought"):
            return [Reasoning(self._name)]
        if state != "call":
            return []
        try:
            return [parse_call(self._call)]
        except ValueError:
            return self._give_up_call()

    def _feed_name(self, text: str) -> list[Part]:
        """The channel's first line is its name, unless it is too long for one."""
        self._name += text
        head, newline, rest = self._name.partition("\n")
        if not newline and len(self._name) <= _MAX_CHANNEL_NAME:
            return []
        self._state = "channel"
        if not newline or len(head) > _MAX_CHANNEL_NAME:
            rest = self._name
        return [Reasoning(rest)] if rest else []

    def _give_up_call(self) -> list[Part]:
        self._state = "text"
        text = "".join('"' if piece is None else piece for piece in self._call)
        self._call = []
        return [Text(text, malformed=True)] if text else []


def parse_call(pieces: list[str | None]) -> ToolCall:
    """Read `call:NAME{…}`. `pieces` are text, and None where a QUOTE marker was. Raises ValueError."""
    reader = _Reader(pieces)
    reader.skip_space()
    name = reader.match(_CALL)
    if name is None:
        raise ValueError("no call:NAME")
    arguments = reader.value(0)
    reader.skip_space()
    if not isinstance(arguments, dict) or not reader.at_end():
        raise ValueError("no arguments, or something after them")
    return ToolCall(name[5:].strip(), arguments)


_CALL = re.compile(r"call:[A-Za-z0-9_.\-]{1,128}\s*(?=\{)")
_SPACES = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,63})(?:\.[0-9]{1,64})?(?:[eE][+-]?[0-9]{1,4})?(?![A-Za-z0-9_.])")
_WORD = re.compile(r"(?:true|false|null|True|False|None)(?![A-Za-z0-9_])")
_KEY = re.compile(r"[^\s{}\[\]:,\"\ue000]{1,128}")
_JSON_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"')
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_MARK = "\ue000"  # stands for the QUOTE marker in the joined text; the model's own U+E000 becomes U+FFFD


class _Reader:
    """Recursive descent over the argument syntax."""

    def __init__(self, pieces: list[str | None]) -> None:
        self._text = "".join(_MARK if piece is None else piece.replace(_MARK, "\ufffd") for piece in pieces)
        self._place = 0

    def at_end(self) -> bool:
        return self._place == len(self._text)

    def skip_space(self) -> None:
        self.match(_SPACES)

    def match(self, pattern: re.Pattern[str]) -> str | None:
        match = pattern.match(self._text, self._place)
        if match is None:
            return None
        self._place = match.end()
        return match[0]

    def value(self, depth: int) -> Any:
        """Any value at this place."""
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        self.skip_space()
        first = self._text[self._place : self._place + 1]
        if first == "{":
            return self._object(depth)
        if first == "[":
            return self._array(depth)
        if first in (_MARK, '"'):
            return self._string()
        word = self.match(_WORD)
        if word is not None:
            return _WORDS[word]
        number = self.match(_NUMBER)
        if number is None:
            raise ValueError(f"no value at {self._place}")
        value: int | float = float(number) if re.search(r"[.eE]", number) else int(number)
        if not math.isfinite(value):
            raise ValueError("number out of range")
        return value

    def _object(self, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for _ in self._items("}"):
            key = self._string() if self._text[self._place] in (_MARK, '"') else self.match(_KEY)
            self.skip_space()
            if key is None or not self._take(":"):
                raise ValueError(f"no key at {self._place}")
            result[key] = self.value(depth + 1)
        return result

    def _array(self, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in self._items("]")]

    def _items(self, close: str) -> Any:
        """Step over the opening bracket, then stop at each item, until past the closing one."""
        self._place += 1
        self.skip_space()
        if self._take(close):
            return
        while True:
            if self.at_end():
                raise ValueError("not closed")
            yield
            self.skip_space()
            if self._take(close):
                return
            if not self._take(","):
                raise ValueError(f"no comma at {self._place}")
            self.skip_space()

    def _string(self) -> str:
        if self._text[self._place] == '"':  # JSON's own quotes, which small models fall back to
            found = self.match(_JSON_STRING)
            if found is None:
                raise ValueError("string not closed")
            return json.loads(found)
        end = self._text.find(_MARK, self._place + 1)
        if end < 0:
            raise ValueError("string not closed")
        text = self._text[self._place + 1 : end]
        self._place = end + 1
        return text

    def _take(self, character: str) -> bool:
        if self._text.startswith(character, self._place):
            self._place += 1
            return True
        return False
