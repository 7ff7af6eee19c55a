"""The sensor-summary application on real brokers, against the real daemon protocol with prepared answers."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gemma_edge.examples.sensor_summary.app import App
from gemma_edge.examples.sensor_summary.config import ClockTopic, Config, Daemon, load_config
from gemma_edge.examples.sensor_summary.demo import HERE, check_report, windows_of
from gemma_edge.examples.sensor_summary.mqtt import Connection, Message
from gemma_edge.examples.sensor_summary.plain import plain_summary
from gemma_edge.examples.sensor_summary.prompt import summary_messages
from gemma_edge.examples.sensor_summary.replay import Record, read_log, replay
from gemma_edge.examples.sensor_summary.summarizer import groups
from gemma_edge.examples.sensor_summary.window import Window, render_window
from gemma_edge.runtime.service import ChatRequest
from gemma_edge.runtime.transports.mqtt_address import Topics

from .support.answering_daemon import MODEL_NAME, answering_daemon, wait_until
from .support.brokers import Mosquitto, amqtt_broker, mosquitto
from .support.scripted_daemon import small_tokenizer

LOG = HERE / "greenhouse-day.jsonl.gz"
TOPICS = Topics("gemma-edge", "test")
CLOCK = "gemma-edge/test/clock"
EVE = b"2026-03-13T23:59:59+01:00"  # a moment before the recorded day


def config_for(port: int, **daemon: Any) -> Config:
    """greenhouse.yaml on the test's broker and clock."""
    return msgspec.structs.replace(
        load_config(HERE / "greenhouse.yaml"),
        broker=f"mqtt://127.0.0.1:{port}",
        daemon=Daemon(**{"node": "test", "patience": "20s", "max_tokens": 4000, **daemon}),
        clock=ClockTopic(topic=CLOCK),
    )


@pytest.fixture(scope="module")
def expected() -> list[Window]:
    """The log's four windows."""
    return list(windows_of(config_for(1883), LOG).values())


def answer_for(window: Window, **changes: Any) -> str:
    """A true answer, with `changes`."""
    return json.dumps(msgspec.to_builtins(plain_summary(window)) | changes, ensure_ascii=False)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with mosquitto(tmp_path) as running:
        yield running


@contextmanager
def running(config: Config) -> Iterator[tuple[App, queue.Queue[dict[str, Any]]]]:
    """The application, and what an independent subscriber receives of its summaries."""
    stop, arrived = threading.Event(), queue.Queue[dict[str, Any]]()

    def watch(message: Message) -> None:
        arrived.put(json.loads(message.payload) | {"retained": message.retained})

    app = App(config, stop)
    thread = threading.Thread(target=app.run)
    with Connection(config.broker_address, ["gemma-edge/test/summary/+"], watch):
        thread.start()
        try:
            assert app.ready.wait(20)
            yield app, arrived
        finally:
            stop.set()
            thread.join(30)
            assert not thread.is_alive()


def publish_log(config: Config, hours: float = 24) -> None:
    """The first hours of the log, and the moment that ends them."""
    first = next(read_log(LOG)).time
    records = []
    for record in read_log(LOG):
        records.append(record)
        if (record.time - first).total_seconds() >= hours * 3600:
            break
    with Connection(config.broker_address, [], lambda _: None) as connection:
        assert replay(iter(records), connection, CLOCK, speed=0, stop=threading.Event()) == len(records)


def one_window(
    tmp_path: Path, broker: Mosquitto, answers: list[str], **daemon: Any
) -> tuple[dict[str, Any], Any]:
    """The report of the log's first window when the model gives `answers`, and the engine."""
    config = config_for(broker.port, **daemon)
    with answering_daemon(tmp_path, broker.port, TOPICS, answers) as serving, running(config) as (_, arrived):
        publish_log(config, hours=6)
        return arrived.get(timeout=30), serving.engine


def test_a_true_answer_is_published_retained(
    tmp_path: Path, broker: Mosquitto, expected: list[Window]
) -> None:
    report, engine = one_window(tmp_path, broker, [answer_for(expected[0], title="Cold night")])
    assert report["title"] == "Cold night"
    assert (report["generated_by"], report["model"], report["attempts"]) == ("model", MODEL_NAME, 1)
    assert (report["start"], report["end"]) == ("2026-03-14T00:00:00+01:00", "2026-03-14T06:00:00+01:00")
    assert (report["sensors"], report["severity"], report["site"]) == (8, 1, "greenhouse-north")
    assert {(a["sensor"], a["kind"]) for a in report["anomalies"]} == {
        ("bench-1/air_temperature", "below"),
        ("bench-1/humidity", "above"),
    }
    assert check_report(report, expected[0]) == []
    # The model saw exactly the window that the log file gives.
    assert render_window(expected[0]) in engine.prompts[0]
    assert engine.params[0].temperature == 0.0
    arrived: queue.Queue[Message] = queue.Queue()
    with Connection(
        config_for(broker.port).broker_address, ["gemma-edge/test/summary/greenhouse"], arrived.put
    ):
        later = arrived.get(timeout=10)
    assert later.retained and json.loads(later.payload)["title"] == "Cold night"


def test_a_fenced_answer_with_words_around_it_is_taken(
    tmp_path: Path, broker: Mosquitto, expected: list[Window]
) -> None:
    fenced = f"Here is the summary:\n```json\n{answer_for(expected[0])}\n```\nAnything else?"
    report, _ = one_window(tmp_path, broker, [fenced])
    assert (report["generated_by"], report["attempts"]) == ("model", 1)


def test_a_false_number_is_named_and_asked_for_again(
    tmp_path: Path, broker: Mosquitto, expected: list[Window]
) -> None:
    wrong = answer_for(expected[0], summary="bench-1/air_temperature fell to 3.7 °C.")
    report, engine = one_window(tmp_path, broker, [wrong, answer_for(expected[0])])
    assert (report["generated_by"], report["attempts"]) == ("model", 2)
    assert check_report(report, expected[0]) == []
    assert "3.7 °C is not in the data of bench-1/air_temperature" in engine.prompts[1]
    assert "An earlier answer was refused" in engine.prompts[1]
    assert render_window(expected[0]) in engine.prompts[1]
    assert engine.params[1].temperature > 0


@pytest.mark.parametrize("answer", ["There is a sensor in the attic.", '{"title": "x"', ""])
def test_after_two_refused_answers_the_summary_is_computed(
    tmp_path: Path, broker: Mosquitto, expected: list[Window], answer: str
) -> None:
    report, engine = one_window(tmp_path, broker, [answer])
    assert (report["generated_by"], report["model"], report["attempts"]) == ("computed", None, 2)
    assert len(engine.prompts) == 2
    assert report["summary"] == plain_summary(expected[0]).summary
    assert check_report(report, expected[0]) == []


def test_a_busy_daemon_is_asked_again(tmp_path: Path, broker: Mosquitto, expected: list[Window]) -> None:
    config = config_for(broker.port)
    answers = ["a long story", "another one", answer_for(expected[0])]
    with (
        answering_daemon(tmp_path, broker.port, TOPICS, answers, queue_size=1) as serving,
        running(config) as (_, arrived),
    ):
        serving.engine.gate.clear()
        story = ChatRequest(messages=[{"role": "user", "content": "tell me"}])
        jobs = [serving.service.submit(story)]
        wait_until(lambda: len(serving.engine.prompts) == 1)
        jobs.append(serving.service.submit(story))
        publish_log(config, hours=6)
        time.sleep(1.5)  # the application is told "busy" at least once
        assert arrived.empty()
        refused = serving.service.health()
        serving.engine.gate.set()
        report = arrived.get(timeout=30)
    assert (report["generated_by"], report["attempts"]) == ("model", 1), refused
    assert len(serving.engine.prompts) == 3


def test_an_absent_daemon_is_waited_for(tmp_path: Path, broker: Mosquitto, expected: list[Window]) -> None:
    config = config_for(broker.port)
    with running(config) as (_, arrived):
        publish_log(config, hours=6)
        time.sleep(1.0)
        assert arrived.empty()
        with answering_daemon(tmp_path, broker.port, TOPICS, [answer_for(expected[0])]):
            assert arrived.get(timeout=30)["generated_by"] == "model"


def test_when_patience_ends_the_summary_is_computed(broker: Mosquitto, expected: list[Window]) -> None:
    config = config_for(broker.port, patience="1s")
    with running(config) as (_, arrived):
        publish_log(config, hours=6)
        report = arrived.get(timeout=30)
    assert (report["generated_by"], report["attempts"]) == ("computed", 0)
    assert check_report(report, expected[0]) == []


def test_stopping_leaves_no_window_without_a_summary(broker: Mosquitto) -> None:
    config = config_for(broker.port, patience="10min")
    with running(config) as (app, arrived):
        publish_log(config, hours=12)
        wait_until(
            lambda: app._now_s is not None and app._now_s >= next(read_log(LOG)).time.timestamp() + 12 * 3600
        )
        began_s = time.monotonic()
        app.stop.set()
        ends = {arrived.get(timeout=60)["end"][11:16] for _ in range(2)}
    assert ends == {"06:00", "12:00"}
    assert time.monotonic() - began_s < 60  # patience is 600


def test_no_reading_is_lost_while_the_model_thinks(
    tmp_path: Path, broker: Mosquitto, expected: list[Window]
) -> None:
    config = config_for(broker.port)
    answers = [answer_for(window) for window in expected]
    with (
        answering_daemon(tmp_path, broker.port, TOPICS, answers) as serving,
        running(config) as (_, arrived),
    ):
        serving.engine.gate.clear()
        publish_log(config)  # the whole day goes by during the first answer
        serving.engine.gate.set()
        reports = [arrived.get(timeout=30) for _ in expected]
    assert [report["generated_by"] for report in reports] == ["model"] * 4
    for report, window, prompt in zip(reports, expected, serving.engine.prompts, strict=True):
        assert check_report(report, window) == []
        assert render_window(window) in prompt


def test_it_works_through_a_broker_that_speaks_mqtt_3_only(tmp_path: Path, expected: list[Window]) -> None:
    with amqtt_broker() as port:
        config = config_for(port)
        answers = [answer_for(window) for window in expected]
        with answering_daemon(tmp_path, port, TOPICS, answers), running(config) as (_, arrived):
            publish_log(config)
            reports = [arrived.get(timeout=60) for _ in expected]
    for report, window in zip(reports, expected, strict=True):
        assert report["generated_by"] == "model"
        assert check_report(report, window) == []


def test_many_sensors_are_asked_for_in_parts(
    tmp_path: Path, broker: Mosquitto, expected: list[Window]
) -> None:
    config = config_for(broker.port)
    summary = msgspec.structs.replace(config.summaries[0], max_sensors=4)
    config = msgspec.structs.replace(config, summaries=(summary,))
    parts = groups(expected[0], 4)
    answers = [answer_for(parts[0]), "no JSON", "no JSON"]
    with (
        answering_daemon(tmp_path, broker.port, TOPICS, answers) as serving,
        running(config) as (_, arrived),
    ):
        publish_log(config, hours=6)
        report = arrived.get(timeout=30)
    assert (report["generated_by"], report["attempts"], report["sensors"]) == ("mixed", 3, 8)
    assert check_report(report, expected[0]) == []
    assert [
        render_window(part) in prompt for part, prompt in zip(parts, serving.engine.prompts, strict=False)
    ] == [
        True,
        True,
    ]


def test_a_window_that_does_not_fit_is_halved(
    tmp_path: Path, broker: Mosquitto, expected: list[Window]
) -> None:
    config = config_for(broker.port, max_tokens=2000)
    parts = groups(expected[0], 4)
    answers = [answer_for(part) for part in parts]
    tokenizer = small_tokenizer(tmp_path)
    whole, half = (len(tokenizer.encode(str(summary_messages(w)))) for w in (expected[0], parts[0]))
    with (
        answering_daemon(
            tmp_path, broker.port, TOPICS, answers, context=2000 + (whole + half) // 2
        ) as serving,
        running(config) as (_, arrived),
    ):
        publish_log(config, hours=6)
        report = arrived.get(timeout=30)
    assert report["parts"] == [4, 4]
    assert len(serving.engine.prompts) == len(parts), "the whole window never reached the model"
    assert report["generated_by"] == "model"
    assert check_report(report, expected[0]) == []


COUNTED = """
broker: mqtt://127.0.0.1:{port}
daemon: {{node: test, patience: 20s, max_tokens: 4000}}
summaries:
  - name: bench
    site: house
    window: {{readings: 6}}
    sources: [{{topic: house/+/t, unit: °C, high: 30}}]
"""


def test_a_window_of_so_many_readings_by_the_real_clock(tmp_path: Path, broker: Mosquitto) -> None:
    """The command itself: every six readings make a window; SIGTERM ends it."""
    (tmp_path / "config.yaml").write_text(COUNTED.format(port=broker.port))
    config = load_config(tmp_path / "config.yaml")
    arrived: queue.Queue[Message] = queue.Queue()
    command = [sys.executable, "-m", "gemma_edge.examples.sensor_summary", str(tmp_path / "config.yaml")]
    with (
        answering_daemon(tmp_path, broker.port, TOPICS, ["no summary"]) as serving,
        Connection(config.broker_address, ["gemma-edge/test/summary/+"], arrived.put) as connection,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        assert any("connected to" in line for line in process.stderr)
        for value in range(20, 32):
            connection.publish(f"house/{'hall' if value % 2 else 'attic'}/t", str(value).encode(), wait_s=5)
        reports = [json.loads(arrived.get(timeout=30).payload) for _ in range(2)]
        process.terminate()
        assert process.wait(timeout=20) == 0
    assert [report["severity"] for report in reports] == [0, 2]
    for prompt, attic, hall in ((0, "min 20.0, max 24.0", "min 21.0, max 25.0"), (2, "min 26.0", "max 31.0")):
        assert re.search(rf"attic\W* \(t, °C\): 3 readings, .*{attic}", serving.engine.prompts[prompt])
        assert re.search(rf"hall\W* \(t, °C\): 3 readings, .*{hall}", serving.engine.prompts[prompt])
    assert reports[1]["anomalies"][0]["detail"].startswith("worst 31.0 °C, limit 30.0 °C, since")


def test_the_broker_may_go_and_come_back(tmp_path: Path, broker: Mosquitto, expected: list[Window]) -> None:
    config = config_for(broker.port, patience="60s")
    with running(config) as (app, arrived):
        broker.kill()
        time.sleep(0.5)
        broker.start()
        with (
            answering_daemon(tmp_path, broker.port, TOPICS, [answer_for(expected[0])]),
            Connection(config.broker_address, [], lambda _: None) as connection,
        ):
            # Both ends come back by themselves: the clock is heard again.
            wait_until(lambda: connection.publish(CLOCK, EVE, wait_s=5) and app._now_s is not None)
            # The subscriber's own connection may still be away.
            time.sleep(2.5)
            publish_log(config, hours=6)
            assert arrived.get(timeout=30)["generated_by"] == "model"


def test_odd_messages_do_no_harm(tmp_path: Path, broker: Mosquitto, expected: list[Window]) -> None:
    config = config_for(broker.port)
    with (
        answering_daemon(tmp_path, broker.port, TOPICS, [answer_for(expected[0])]),
        running(config) as (app, arrived),
    ):
        with Connection(config.broker_address, [], lambda _: None) as connection:
            connection.publish(CLOCK, b"not a time", wait_s=5)
            connection.publish(CLOCK, b"2026-03-13T23:59:00+01:00", wait_s=5)
            for topic, payload in (
                ("greenhouse/bench-1/air_temperature", b"\xff\xfe"),
                ("greenhouse/bench-1/air_temperature", b"NaN"),
                ("greenhouse/bench-1/climate", b"[1, 2"),
                ("greenhouse/bench-1/climate", b"[" * 5000),
                ("tele/tank/SENSOR", b'{"VL53L0X": {"Level": 1}}'),
                ("zigbee2mqtt/seedlings", b"null"),
                ("gemma-edge/test/response/chat", b"{"),
                ("gemma-edge/test/response/chat", b'{"transaction": "nobody"}'),
            ):
                connection.publish(topic, payload, wait_s=5)
        wait_until(lambda: app.collector.bad_payloads >= 6)
        publish_log(config, hours=6)
        assert arrived.get(timeout=30)["generated_by"] == "model"


def test_a_record_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"time": "2026-03-14T00:00:00+01:00", "topic": "a", "payload": "1"}\n{"time": 1}\n')
    with pytest.raises(Exception, match="line 2"):
        list(read_log(path))
    assert isinstance(next(read_log(path)), Record)
