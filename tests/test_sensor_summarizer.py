"""From a window to a report: parsing answers, retrying, splitting, merging, the computed summary; the log."""

from __future__ import annotations

import gzip
import json
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.examples.nano_model.windows import random_window
from gemma_edge.examples.sensor_summary import make_log
from gemma_edge.examples.sensor_summary.answer import AnswerError, parse_summary
from gemma_edge.examples.sensor_summary.facts import untrue
from gemma_edge.examples.sensor_summary.plain import plain_summary
from gemma_edge.examples.sensor_summary.prompt import Summary, summary_messages
from gemma_edge.examples.sensor_summary.replay import read_log
from gemma_edge.examples.sensor_summary.summarizer import AskError, Report, groups, summarize
from gemma_edge.examples.sensor_summary.window import Window, render_window
from gemma_edge.runtime.errors import ConfigError

GOOD = {"title": "t", "summary": "s", "severity": 0, "anomalies": [], "actions": []}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(GOOD),
        f"```json\n{json.dumps(GOOD, indent=2)}\n```",
        f"Of course! {json.dumps(GOOD)} I hope {{this}} helps.",
        f"{{not json}} {json.dumps(GOOD)}",
        f'{{"thought": "none"}}\n{json.dumps(GOOD)}',
        f"{json.dumps(GOOD)}{json.dumps(GOOD | {'title': 'second'})}",
        json.dumps(GOOD | {"title": " t\n", "summary": "s\u2028", "actions": [" ", "\t"]}),
    ],
)
def test_what_stands_around_the_object_is_passed_over(text: str) -> None:
    assert parse_summary(text) == Summary("t", "s", 0, (), ())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no JSON object"),
        ("All is well.", "no JSON object"),
        ('{"title": "t", "anomalies": [{"sensor": "x"}', "cannot be read"),
        ("{}", 'no "title"'),
        ("{" * 3000, "cannot be read"),
        ('{"a":' * 3000, "cannot be read"),
        (json.dumps(GOOD | {"severity": 3}), "severity"),
        (json.dumps(GOOD | {"severity": "1"}), "severity"),
        (json.dumps(GOOD | {"mood": "good"}), "mood"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "actions"}), "actions"),
        (json.dumps(GOOD | {"anomalies": [{"sensor": "x", "kind": "odd"}]}), "odd"),
        (json.dumps(GOOD | {"title": " "}), "must not be empty"),
        (json.dumps(GOOD | {"title": "t" * 201}), "title: 201, at most 200"),
        (json.dumps(GOOD | {"actions": ["a"] * 200}), "at most 128"),
        (json.dumps(GOOD | {"actions": ["a" * 700]}), "longest line"),
        ("x" * 40_000, "40000 characters"),
    ],
)
def test_what_is_wrong_with_an_answer_is_named(text: str, told: str) -> None:
    with pytest.raises(AnswerError, match=told):
        parse_summary(text)


nested = st.recursive(st.text(max_size=5), lambda inner: st.dictionaries(st.text(max_size=5), inner))


@given(st.text(max_size=200) | nested.map(json.dumps))
@settings(deadline=None)
def test_any_text_is_a_summary_or_an_answer_error(text: str) -> None:
    with suppress(AnswerError):
        parse_summary(text)


class Model:
    """Answers from a function of the window's text; remembers what it was asked."""

    def __init__(self, *answers: str | AskError) -> None:
        self.answers = list(answers)
        self.asked: list[list[dict[str, Any]]] = []
        self.temperatures: list[float] = []

    def __call__(
        self, messages: list[dict[str, Any]], *, temperature: float, seed: int | None
    ) -> tuple[str, str]:
        self.asked.append(messages)
        self.temperatures.append(temperature)
        answer = self.answers.pop(0)
        if isinstance(answer, AskError):
            raise answer
        return answer, "model-x"


def window_of(count: int, seed: int = 0) -> Window:
    """A random window of `count` sensors."""
    while True:
        window = random_window(random.Random(seed), max_sensors=30)
        seed += 1
        if len(window.sensors) >= count:
            return replace(window, sensors=window.sensors[:count])


def true_answer(window: Window, **changes: Any) -> str:
    return json.dumps(msgspec.to_builtins(plain_summary(window)) | changes)


def test_a_true_answer_needs_one_request() -> None:
    window = window_of(3)
    model = Model(true_answer(window, actions=["Have a look."]))
    report = summarize(window, model, 8)
    assert (report.generated_by, report.attempts, report.model, report.parts) == ("model", 1, "model-x", ())
    assert model.asked == [summary_messages(window)]


def test_the_second_request_names_what_was_wrong() -> None:
    window = window_of(3)
    model = Model("rubbish", true_answer(window))
    assert summarize(window, model, 8) == Report(plain_summary(window), "model", 2, "model-x")
    system, question = model.asked[1]
    assert "An earlier answer was refused: there is no JSON object in the answer." in system["content"]
    assert question["content"] == render_window(window)
    assert model.temperatures[0] == 0 < model.temperatures[1]


def test_there_is_no_third_request() -> None:
    window = window_of(3)
    model = Model(
        true_answer(window, severity=(plain_summary(window).severity + 1) % 3), "rubbish", "never asked"
    )
    assert summarize(window, model, 8) == Report(plain_summary(window), "computed", 2, None)
    assert model.answers == ["never asked"]


def test_without_an_answer_nothing_more_is_asked() -> None:
    window = window_of(9)
    model = Model(AskError("offline", "gone"))
    report = summarize(window, model, 3)
    assert report == Report(plain_summary(window), "computed", 0, None)
    assert len(model.asked) == 1, "the other parts would only wait as long"


def test_parts_that_the_model_wrote_are_kept() -> None:
    window = window_of(6)
    first, second = groups(window, 3)
    report = summarize(window, Model(true_answer(first), AskError("timeout", "slow")), 3)
    assert (report.generated_by, report.parts, report.attempts) == ("mixed", (3, 3), 1)
    assert report.summary.anomalies == plain_summary(first).anomalies + plain_summary(second).anomalies
    assert untrue(window, report.summary, parts=[first, second]) == []


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_merged_reports_are_true(seed: int, max_sensors: int) -> None:
    window = random_window(random.Random(seed), max_sensors=30)
    parts = groups(window, max_sensors)
    assert [s for part in parts for s in part.sensors] == list(window.sensors)
    sizes = [len(part.sensors) for part in parts]
    assert max(sizes) <= max_sensors and max(sizes) - min(sizes) <= 1
    report = summarize(window, Model(*map(true_answer, parts)), max_sensors)
    assert untrue(window, report.summary, parts=parts) == []
    assert report.generated_by == "model"
    assert report.summary.severity == plain_summary(window).severity


def test_a_window_too_long_for_the_context_is_halved() -> None:
    window = window_of(4)
    halves = groups(window, 2)
    too_long = AskError("context_length_exceeded", "too long")
    report = summarize(window, Model(too_long, *map(true_answer, halves)), 8)
    assert (report.generated_by, report.parts) == ("model", (2, 2))
    one = window_of(1)
    assert summarize(one, Model(too_long), 8) == Report(plain_summary(one), "computed", 0, None)


def test_the_log_is_what_its_script_makes(tmp_path: Path) -> None:
    committed = Path(make_log.__file__).with_name("greenhouse-day.jsonl.gz")
    assert committed.stat().st_size < 200_000
    make_log.write_log(tmp_path / "log.gz")
    assert gzip.decompress((tmp_path / "log.gz").read_bytes()) == gzip.decompress(committed.read_bytes())
    records = list(read_log(committed))
    assert len(records) == 1395 and len({record.topic for record in records}) == 9
    assert (records[-1].time - records[0].time).total_seconds() == 86_400


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"time": "2026-03-14T00:00:00+01:00", "topic": "a"}', "line 1: expected time, topic and payload"),
        (
            '{"time": "2026-03-14T00:00:00", "topic": "a", "payload": "1"}',
            "line 1: expected times with their offset",
        ),
        ("rubbish", "line 1"),
    ],
)
def test_a_bad_log_is_refused_by_line(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(content + "\n")
    with pytest.raises(ConfigError, match=told):
        list(read_log(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_log(tmp_path / "none.jsonl.gz"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"time": 1}' * 100)[:30])
    with pytest.raises(ConfigError):
        list(read_log(tmp_path / "cut.gz"))
