"""From one window to what is published about it: asks the model, checks, retries once, else computes.

Knows the order of these steps; not MQTT (the asker is a function) and not how truth is checked (`facts`).

    window -> groups of at most max_sensors -> for each: ask, parse, check; on failure once more with the
    problems named; then the computed summary -> the groups' true reports merged into one
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from .answer import AnswerError, parse_summary
from .facts import untrue
from .plain import plain_summary, plain_title
from .prompt import Anomaly, Summary, summary_messages
from .window import Window

log = logging.getLogger(__name__)

Author = Literal["model", "computed", "mixed"]
ATTEMPTS = 2
RETRY_TEMPERATURE = 0.5
MAX_NAMED_PROBLEMS, MAX_PROBLEM_CHARS = 6, 200


class AskError(Exception):
    """The daemon gave no answer. `code` is its own word, or `offline`, `timeout`, `stopped`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Ask(Protocol):
    """Sends chat messages, returns (text, model name). Waits out a busy or absent daemon; raises AskError."""

    def __call__(
        self, messages: list[dict[str, Any]], *, temperature: float, seed: int | None
    ) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Report:
    """A summary and where it came from."""

    summary: Summary
    generated_by: Author
    attempts: int  # requests that the model answered
    model: str | None  # None: no answer of a model was used
    parts: tuple[int, ...] = ()  # numbers of sensors, when it was put together from several reports


def summarize(window: Window, ask: Ask, max_sensors: int) -> Report:
    """A true report about `window`, always."""
    pending, parts, given_up = groups(window, max_sensors), [], False
    while pending:
        group = pending.pop(0)
        try:
            parts.append((group, computed(group) if given_up else _summarize_group(group, ask)))
        except AskError as error:
            if error.code == "context_length_exceeded" and len(group.sensors) > 1:
                log.info(
                    "%d sensors do not fit into the model's context, half as many are tried",
                    len(group.sensors),
                )
                pending[:0] = groups(group, (len(group.sensors) + 1) // 2)
                continue
            log.warning("no answer from the model (%s: %s), the summary is computed", error.code, error)
            parts.append((group, computed(group)))
            given_up = True  # the other groups would only wait as long
    if len(parts) == 1:
        return parts[0][1]
    if all(report.generated_by == "computed" for _, report in parts):
        return computed(window, sum(report.attempts for _, report in parts))
    return merge(window, parts)


def computed(window: Window, attempts: int = 0) -> Report:
    """The report without a model."""
    return Report(plain_summary(window), "computed", attempts, None)


def groups(window: Window, max_sensors: int) -> list[Window]:
    """The window in as few parts of at most `max_sensors` as possible, about equal, sensors in order."""
    count = max(1, -(-len(window.sensors) // max_sensors))
    size, larger = divmod(len(window.sensors), count)
    found, at = [], 0
    for index in range(count):
        end = at + size + (index < larger)
        found.append(replace(window, sensors=window.sensors[at:end]))
        at = end
    return found


def merge(window: Window, parts: list[tuple[Window, Report]]) -> Report:
    """One report from the groups': texts in order, each with its sensors, highest severity, counted title."""
    texts: list[str] = []
    anomalies: list[Anomaly] = []
    actions: list[str] = []
    for group, report in parts:
        first, last = group.sensors[0].name, group.sensors[-1].name
        texts.append(f"[{first}{f' to {last}' if last != first else ''}] {report.summary.summary}")
        anomalies += report.summary.anomalies
        actions += report.summary.actions
    authors = {report.generated_by for _, report in parts}
    return Report(
        Summary(
            plain_title(window),
            " ".join(texts),
            max(report.summary.severity for _, report in parts),
            tuple(anomalies),
            tuple(dict.fromkeys(actions)),
        ),
        authors.pop() if len(authors) == 1 else "mixed",
        sum(report.attempts for _, report in parts),
        next((report.model for _, report in parts if report.model), None),
        tuple(len(group.sensors) for group, _ in parts),
    )


def _summarize_group(window: Window, ask: Ask) -> Report:
    messages = summary_messages(window)
    for attempt in range(1, ATTEMPTS + 1):
        text, model = ask(messages, temperature=0.0 if attempt == 1 else RETRY_TEMPERATURE, seed=attempt)
        problems = _problems(window, text)
        if isinstance(problems, Summary):
            return Report(problems, "model", attempt, model)
        log.warning(
            "answer %d of %d is refused: %s", attempt, ATTEMPTS, "; ".join(problems[:MAX_NAMED_PROBLEMS])
        )
        messages = retry_messages(window, problems)
    return computed(window, ATTEMPTS)


def _problems(window: Window, text: str) -> Summary | list[str]:
    """The summary in `text`, or what is wrong with it."""
    try:
        summary = parse_summary(text)
    except AnswerError as error:
        return [str(error)]
    return untrue(window, summary) or summary


def retry_messages(window: Window, problems: list[str]) -> list[dict[str, Any]]:
    """The same question, with what was wrong with the refused answer named in the system message.

    One turn, as the first time: small models answer that better than a second turn about their own mistake.
    """
    system, question = summary_messages(window)
    named = "; ".join(problem[:MAX_PROBLEM_CHARS] for problem in problems[:MAX_NAMED_PROBLEMS])
    return [system | {"content": f"{system['content']} An earlier answer was refused: {named}."}, question]
