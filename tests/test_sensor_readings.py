"""From messages to readings: topics, payload shapes, states, times, and the collector's bounds."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.examples.sensor_summary import collector as collector_module
from gemma_edge.examples.sensor_summary.collector import Collector
from gemma_edge.examples.sensor_summary.config import (
    Config,
    CountWindow,
    JsonValue,
    Override,
    SensorSettings,
    Source,
    SummaryConfig,
    TimeFrom,
)
from gemma_edge.examples.sensor_summary.payload import Measured, PayloadError, parse_time, read
from gemma_edge.examples.sensor_summary.statistics import Reading
from gemma_edge.examples.sensor_summary.topics import clean_name, matches

MADRID = ZoneInfo("Europe/Madrid")
NOW_S = 1_773_500_000.0


def reading(source: Source, topic: str, payload: object, **properties: str) -> list[Measured]:
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return read(source, topic, raw, arrival_s=NOW_S, properties=properties, zone=MADRID)


def values(found: list[Measured]) -> dict[str, float]:
    return {item.name: item.value for item in found}


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True), ("a/b", "a/b/c", False), ("a/+", "a/b", True), ("a/+", "a", False),
        ("a/+", "a/b/c", False), ("a/#", "a/b/c", True), ("a/#", "a", True), ("#", "a/b", True),
        ("#", "$SYS/a", False), ("+/a", "$SYS/a", False), ("+/+", "/a", True), ("a/+/c", "a//c", True),
        ("$SYS/#", "$SYS/a", True),
    ],
)  # fmt: skip
def test_filters(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


@given(st.text(max_size=100))
@settings(deadline=None)
def test_names_are_safe_in_the_text(name: str) -> None:
    clean = clean_name(name)
    assert 0 < len(clean) <= 64
    assert not set(clean) & set(' ,()"\n\t') and any(c.isalpha() for c in clean)
    assert clean_name(clean) == clean


def test_a_plain_number_and_its_name() -> None:
    source = Source(topic="house/+/+", payload="number")
    assert values(reading(source, "house/hall/temp", b" 21.5\n")) == {"hall/temp": 21.5}
    named = Source(topic="house/#", name="{1}/{-1}")
    assert values(reading(named, "house/hall/x/temp", b"-3")) == {"hall/temp": -3.0}
    assert values(reading(Source(topic="house/hall"), "house/hall", b"1e3")) == {"house/hall": 1000.0}
    assert values(reading(Source(topic="+"), "12", b"1")) == {"sensor-12": 1.0}


@pytest.mark.parametrize(
    "payload", [b"", b"nan", b"inf", b"-1e13", b"21,5", b"21 C", b"\xff", b"null", b"ON"]
)
def test_what_is_no_number(payload: bytes) -> None:
    with pytest.raises(PayloadError):
        reading(Source(topic="a"), "a", payload)


def test_one_value_of_json() -> None:
    source = Source(topic="a", payload=JsonValue(json="air.t.0"), name="t")
    assert values(reading(source, "a", {"air": {"t": [4.5, 5]}})) == {"t": 4.5}
    assert values(reading(source, "a", {"air": {"t": ["4.5"]}})) == {"t": 4.5}
    for bad in ({"air": 1}, {"air": {"t": []}}, [1], "x", {"air": {"t": [True]}}, {"air": {"t": [{}]}}):
        with pytest.raises(PayloadError):
            reading(source, "a", bad)


def test_zigbee2mqtt() -> None:
    fields = {"temperature": SensorSettings(unit="°C"), "battery": SensorSettings(unit="%")}
    source = Source(topic="zigbee2mqtt/#", payload="zigbee2mqtt", fields=fields)
    body = {"temperature": 21.37, "battery": 90, "linkquality": 3}
    found = values(reading(source, "zigbee2mqtt/hall/window left", body))
    assert found == {"hall/window_left/temperature": 21.37, "hall/window_left/battery": 90.0}
    assert values(reading(source, "zigbee2mqtt/hall", {"battery": None, "temperature": 1})) == {
        "hall/temperature": 1.0
    }
    assert reading(source, "zigbee2mqtt/hall", {"linkquality": 3}) == []
    for topic in ("bridge/state", "bridge/devices", "hall/availability", "hall/set", "hall/get"):
        assert reading(source, f"zigbee2mqtt/{topic}", {"temperature": 1}) == []


def test_tasmota() -> None:
    source = Source(
        topic="tele/+/SENSOR",
        payload="tasmota",
        fields={
            "AM2301.Temperature": SensorSettings(),
            "AM2301.Humidity": SensorSettings(name="{device}/rh"),
        },
        time_from=TimeFrom(field="Time"),
    )
    body = {"Time": "2026-03-14T13:00:00", "AM2301": {"Temperature": 21.5, "Humidity": 40}, "TempUnit": "C"}
    found = reading(source, "tele/shed/SENSOR", body)
    assert values(found) == {"shed/am2301_temperature": 21.5, "shed/rh": 40.0}
    assert {item.time_s for item in found} == {datetime(2026, 3, 14, 12, tzinfo=UTC).timestamp()}


def test_a_key_with_points_in_it_is_found() -> None:
    source = Source(topic="a", payload="json", fields={"DS.18.Temperature": SensorSettings(name="t")})
    assert values(reading(source, "a", {"DS.18": {"Temperature": 3}})) == {"t": 3.0}


@pytest.mark.parametrize(
    ("states", "payload", "expected"),
    [
        ("default", b"ON", 1.0), ("default", b"closed", 0.0), ("default", b"0.5", 0.5),
        ({True: 1, False: 0}, b"OFF", 0.0),  # what YAML makes of {ON: 1, OFF: 0}
        ({"ajar": 0.5}, b"Ajar", 0.5),
    ],
)  # fmt: skip
def test_states(states: object, payload: bytes, expected: float) -> None:
    source = Source(topic="a", states=states)  # type: ignore[arg-type]
    assert values(reading(source, "a", payload)) == {"a": expected}


def test_states_in_json_and_their_hint() -> None:
    source = Source(topic="a", payload="json", fields={"open": SensorSettings(name="o", states="default")})
    assert values(reading(source, "a", {"open": True})) == {"o": 1.0}
    with pytest.raises(PayloadError, match="set states: default"):
        reading(Source(topic="a", payload=JsonValue(json="open")), "a", {"open": True})
    with pytest.raises(PayloadError):
        reading(Source(topic="a", states={"open": 1}), "a", b"shut")


@pytest.mark.parametrize(
    "value",
    [
        "2026-03-14T13:00:00+01:00", "2026-03-14T12:00:00Z", "2026-03-14 13:00:00", 1_773_489_600,
        1_773_489_600_000, "1773489600", 1_773_489_600.0,
    ],
)  # fmt: skip
def test_times(value: object) -> None:
    assert parse_time(value, MADRID) == 1_773_489_600.0


@pytest.mark.parametrize("value", ["", "noon", None, True, [], float("nan"), "1" * 500])
def test_what_is_no_time(value: object) -> None:
    with pytest.raises(PayloadError):
        parse_time(value, MADRID)


def test_the_time_may_be_a_user_property() -> None:
    source = Source(topic="a", time_from=TimeFrom(user_property="timestamp"))
    assert reading(source, "a", b"1", timestamp="1773489600")[0].time_s == 1_773_489_600.0
    with pytest.raises(PayloadError, match="timestamp"):
        reading(source, "a", b"1")


def make(*sources: Source, **summary: object) -> Collector:
    settings = {"name": "s", "site": "x", **summary}
    return Collector(Config(broker="mqtt://h", summaries=(SummaryConfig(sources=sources, **settings),)))  # type: ignore[arg-type]


def test_windows_hold_what_is_in_them_and_the_reading_before() -> None:
    collector = make(Source(topic="+"))
    for second in (10, 30, 20, 40, 50):  # out of order
        collector.add("t", str(second).encode(), now_s=second)
    snapshot = collector.snapshot(0, end_s=50, start_s=20)
    (sensor,) = snapshot.sensors
    assert sensor.readings == (Reading(20, 20), Reading(30, 30), Reading(40, 40))
    assert sensor.before == Reading(10, 10)
    # The next window begins where this one ended.
    (sensor,) = collector.snapshot(0, end_s=80, start_s=50).sensors
    assert sensor.readings == (Reading(50, 50),) and sensor.before == Reading(40, 40)


def test_overlapping_windows_keep_their_readings() -> None:
    collector = make(Source(topic="+"))
    for second in range(100):
        collector.add("t", b"1", now_s=second)
    assert len(collector.snapshot(0, 50, 0).sensors[0].readings) == 50
    assert len(collector.snapshot(0, 60, 10).sensors[0].readings) == 50


def test_the_last_so_many_readings_of_all_sensors() -> None:
    collector = make(Source(topic="+"), window=CountWindow(readings=4))
    for second in range(10):
        collector.add("a" if second % 2 else "b", str(second).encode(), now_s=second)
    assert collector.new_readings(0) == (10, 9)
    snapshot = collector.snapshot(0, end_s=9.5, start_s=None)
    assert sorted(r.value for s in snapshot.sensors for r in s.readings) == [6, 7, 8, 9]
    assert (snapshot.start_s, collector.new_readings(0)[0]) == (6, 0)


def test_too_many_readings_drop_the_oldest_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    collector = make(Source(topic="+"), max_readings=100)
    with caplog.at_level(logging.WARNING):
        for second in range(130):
            collector.add("t", b"1", now_s=second)
    snapshot = collector.snapshot(0, 1000, 0)
    kept = [r.time_s for r in snapshot.sensors[0].readings]
    assert kept == list(range(130 - len(kept), 130)) and len(kept) <= 100
    assert snapshot.dropped == 130 - len(kept)
    assert sum("the oldest are dropped" in record.message for record in caplog.records) == 1
    assert collector.snapshot(0, 1000, 0).dropped == 0


def test_too_many_sensors_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector_module, "MAX_SENSORS", 3)
    collector = make(Source(topic="#"))
    for index in range(6):
        collector.add(f"t{index}", b"1", now_s=1)
    assert [s.spec.name for s in collector.snapshot(0, 2, 0).sensors] == ["t0", "t1", "t2"]


def test_bad_payloads_are_counted_and_logged_once_per_topic(caplog: pytest.LogCaptureFixture) -> None:
    collector = make(Source(topic="+"))
    with caplog.at_level(logging.WARNING):
        for topic in ("a", "a", "b", "a"):
            assert collector.add(topic, b"rubbish", now_s=1) == 0
    assert collector.bad_payloads == 4
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["a", "b"]


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_no_payload_raises(payload: bytes) -> None:
    fields = {"a": SensorSettings(), "b.c": SensorSettings(states="default")}
    collector = make(
        Source(topic="x", payload="zigbee2mqtt", fields=fields, time_from=TimeFrom(field="t")),
        Source(topic="x", payload=JsonValue(json="a.0")),
        Source(topic="x"),
    )
    collector.add("x", payload, now_s=1)
    collector.snapshot(0, 2, 0)


def test_expected_sensors_are_missed_from_the_start() -> None:
    collector = make(
        Source(topic="one/t"),
        Source(topic="two/+", expect=("two/a",)),
        Source(topic="bell", on_change=True),
    )
    found = {s.spec.name: len(s.readings) for s in collector.snapshot(0, 10, 0).sensors}
    assert found == {"one/t": 0, "a": 0}, "a sensor that reports changes only is not missed"


def test_retained_values_are_of_unknown_age() -> None:
    collector = make(
        Source(topic="t"),
        Source(topic="door", on_change=True, states="default"),
        Source(topic="j", payload=JsonValue(json="v"), time_from=TimeFrom(field="t")),
    )
    assert collector.add("t", b"1", now_s=5, retained=True) == 0
    assert collector.add("door", b"open", now_s=5, retained=True) == 1
    assert collector.add("j", b'{"v": 1, "t": 4}', now_s=5, retained=True) == 1


def test_a_time_ahead_of_the_clock_is_a_bad_payload() -> None:
    collector = make(Source(topic="j", payload=JsonValue(json="v"), time_from=TimeFrom(field="t")))
    assert collector.add("j", b'{"v": 1, "t": 200}', now_s=100) == 1
    assert collector.add("j", b'{"v": 1, "t": 900}', now_s=100) == 0
    assert collector.bad_payloads == 1


def test_a_copy_is_taken_once_and_an_ignored_sensor_never() -> None:
    collector = make(Source(topic="+"), overrides={"b": Override(ignore=True)})
    assert [collector.add(topic, b"1", now_s=5) for topic in ("a", "a", "b")] == [1, 0, 0]
