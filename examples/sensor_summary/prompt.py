"""The messages that ask a model for a summary of one window, and the shape of the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from .window import Window, render_window

SUMMARY_SYSTEM = (
    "You summarize sensor data. Use only the names and numbers given, names in single quotes. "
    "Answer with one JSON object: "
    '{"title": short text, "summary": a few sentences, "severity": 0 normal, 1 attention, 2 urgent, '
    '"anomalies": [{"sensor": name, "kind": "above"|"below"|"silent", "detail": text}], "actions": [text]}. '
    "ABOVE, BELOW and SILENT mark anomalies; one that still goes on beyond a limit (since) is urgent."
)


class Anomaly(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing that was wrong with one sensor."""

    sensor: str
    kind: Literal["above", "below", "silent"]
    detail: str = ""


class Summary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model is asked for."""

    title: str
    summary: str
    severity: Annotated[int, msgspec.Meta(ge=0, le=2)]
    anomalies: tuple[Anomaly, ...]
    actions: tuple[str, ...]


def summary_messages(window: Window) -> list[dict[str, Any]]:
    """The chat messages for one window."""
    return [
        {"role": "system", "content": SUMMARY_SYSTEM},
        {"role": "user", "content": render_window(window)},
    ]
