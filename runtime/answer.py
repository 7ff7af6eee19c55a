"""One answer: token ids in, events out; joins the detokenizer, the response parser and the stop strings."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from .response import MARKERS, Part, Reasoning, ResponseParser, Text, ToolCall
from .stops import StopFinder
from .tokenizer import StreamDecoder, Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextDelta:
    """More visible text."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the model's thinking."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A whole tool call; `arguments_json` is a JSON object."""

    index: int
    id: str
    name: str
    arguments_json: str


Delta = TextDelta | ReasoningDelta | ToolCallDelta


class Answer:
    """State of one answer. stopped: a stop string was found, no more will come. calls: tool calls so far."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._markers = {tokenizer.controls[name]: name for name in MARKERS if name in tokenizer.controls}
        self._decoder = StreamDecoder(tokenizer)
        self._parser = ResponseParser()
        self._stops = StopFinder(stops)
        self.calls = 0

    @property
    def stopped(self) -> bool:
        return self._stops.found

    def push(self, token: int) -> list[Delta]:
        """The events that one token brings. Control tokens that are no markers bring none."""
        parts = self._parser.feed(self._decoder.push(token))
        marker = self._markers.get(token)
        if marker is not None:
            parts += self._parser.marker(marker)
        return self._deltas(parts)

    def finish(self) -> list[Delta]:
        """What was held back, now that the model has ended."""
        deltas = self._deltas(self._parser.feed(self._decoder.flush()) + self._parser.finish())
        held = self._stops.flush()
        return [*deltas, TextDelta(held)] if held else deltas

    def _deltas(self, parts: list[Part]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in parts:
            if self.stopped:
                break
            if isinstance(part, Text):
                if part.malformed:
                    log.warning("malformed tool call, passed on as text: %.200r", part.text)
                shown = self._stops.push(part.text)
                if shown:
                    deltas.append(TextDelta(shown))
            elif isinstance(part, Reasoning):
                deltas.append(ReasoningDelta(part.text))
            elif isinstance(part, ToolCall):
                held = self._stops.flush()  # text before a call is over
                if held:
                    deltas.append(TextDelta(held))
                arguments = json.dumps(part.arguments, ensure_ascii=False, separators=(",", ":"))
                call_id = f"call_{uuid.uuid4().hex[:24]}"
                deltas.append(ToolCallDelta(self.calls, call_id, part.name, arguments))
                self.calls += 1
        return deltas
