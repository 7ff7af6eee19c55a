"""From the text a model wrote to a Summary: tolerant of what stands around the JSON, strict about the JSON
itself.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from .prompt import Summary

MAX_ANSWER_CHARS = 32_000
MAX_TITLE, MAX_SUMMARY, MAX_LINE, MAX_ITEMS = 200, 4000, 600, 128
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


class AnswerError(Exception):
    """The text holds no summary, or one that is not well made; the message is fit to be told to the model."""


def parse_summary(text: str) -> Summary:
    """The one summary in `text`. Code fences and words around it are passed over. Raises AnswerError."""
    if len(text) > MAX_ANSWER_CHARS:
        raise AnswerError(f"the answer has {len(text)} characters, at most {MAX_ANSWER_CHARS} are read")
    data = _first_object(text)
    try:
        summary = msgspec.convert(data, Summary)
    except msgspec.ValidationError as error:
        raise AnswerError(f"the JSON object is not as described: {error}") from None
    return _checked(summary)


def _first_object(text: str) -> dict[str, Any]:
    """The first JSON object that can be read whole; objects inside it are not looked for."""
    decoder = json.JSONDecoder()
    position, problem = text.find("{"), ""
    while position >= 0:
        try:
            data, _ = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            problem = problem or f"the JSON object cannot be read: {error}"
        else:
            if "title" in data:
                return data
            problem = problem or 'the JSON object has no "title"'
        position = text.find("{", position + 1)
    raise AnswerError(problem or "there is no JSON object in the answer")


def _checked(summary: Summary) -> Summary:
    """The same summary on single lines; refused when a part is empty or too long."""
    title, body = _one_line(summary.title), _one_line(summary.summary)
    if not title or not body:
        raise AnswerError("title and summary must not be empty")
    anomalies = tuple(
        msgspec.structs.replace(anomaly, detail=_one_line(anomaly.detail)) for anomaly in summary.anomalies
    )
    actions = tuple(action for action in map(_one_line, summary.actions) if action)
    for what, count, most in (
        ("title", len(title), MAX_TITLE),
        ("summary", len(body), MAX_SUMMARY),
        (
            "longest line",
            max((len(line) for line in (*actions, *(a.detail for a in anomalies))), default=0),
            MAX_LINE,
        ),
        ("number of anomalies or actions", max(len(anomalies), len(actions)), MAX_ITEMS),
    ):
        if count > most:
            raise AnswerError(f"{what}: {count}, at most {most}")
    return Summary(title, body, summary.severity, anomalies, actions)


def _one_line(text: str) -> str:
    return _CONTROL.sub(" ", text).strip()
