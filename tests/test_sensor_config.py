"""The application's YAML: what is accepted, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_edge.examples.sensor_summary.__main__ import main
from gemma_edge.examples.sensor_summary.config import (
    Config,
    Source,
    duration_s,
    load_config,
    minute_of_day,
    sensor_spec,
)
from gemma_edge.examples.sensor_summary.demo import HERE
from gemma_edge.runtime.errors import ConfigError

GOOD: dict[str, Any] = {
    "broker": "mqtt://localhost",
    "summaries": [{"name": "s", "site": "house", "sources": [{"topic": "a/+/t"}]}],
}


def write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """GOOD with changes; keys of the first summary with `s_`, of its first source with `o_` before them."""
    source = GOOD["summaries"][0]["sources"][0] | {k[2:]: v for k, v in changes.items() if k.startswith("o_")}
    summary = GOOD["summaries"][0] | {"sources": [source]}
    summary |= {k[2:]: v for k, v in changes.items() if k.startswith("s_")}
    return GOOD | {"summaries": [summary]} | {k: v for k, v in changes.items() if k[1:2] != "_"}


def test_the_example_is_valid_and_uses_every_key(tmp_path: Path) -> None:
    config = load_config(HERE / "greenhouse.yaml")
    assert config.summaries[0].window_s == 6 * 3600
    text = (HERE / "greenhouse.yaml").read_text()
    missing = [name for name in _keys(Config) if f"{name}:" not in text]
    assert not missing, "greenhouse.yaml is the reference of all keys"


def _keys(type_: Any) -> set[str]:
    from gemma_edge.runtime.strict import _field_names

    return _field_names(type_, set())


def test_defaults_are_enough(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert config.daemon.base == "gemma-edge" and config.summaries[0].max_sensors == 8
    assert config.zone is None and config.broker_address.port == 1883


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"brokr": 1}, "did you mean `broker`"),
        ({"o_tpic": 1}, "tpic"),
        ({"o_payload": "xml"}, "payload"),
        ({"o_payload": {"jsn": "a"}}, "jsn"),
        ({"broker": "http://x"}, "broker: expected mqtt"),
        ({"broker": "mqtt://host:port"}, "broker: expected mqtt"),
        ({"daemon": {"node": "a b"}}, "daemon.node: 'a b'"),
        ({"daemon": {"base": "a/+"}}, "daemon.base: 'a/+'"),
        ({"daemon": {"timeout": "soon"}}, "daemon.timeout: 'soon' is no duration"),
        ({"time_zone": "Europe/Atlantis"}, "time_zone: 'Europe/Atlantis' is unknown"),
        ({"password_file": "/no/such/file"}, "password_file: /no/such/file cannot be read"),
        ({"ca_file": "/no/such/file"}, "ca_file"),
        ({"clock": {"topic": "a/#"}}, "clock.topic"),
        ({"summaries": []}, "length >= 1"),
        ({"summaries": GOOD["summaries"] * 2}, "summaries[1].name: 's' is taken"),
        ({"s_name": "a/b"}, "summaries[0].name"),
        ({"s_site": " "}, "summaries[0].site"),
        ({"s_window": "6 hours"}, "summaries[0].window: '6 hours' is no duration"),
        ({"s_window": "1s"}, "expected 60s to 31d"),
        ({"s_window": {"readings": 1}}, "readings"),
        ({"s_schedule": {}}, "expected either every or at"),
        ({"s_schedule": {"every": "1h", "at": ["06:00"]}}, "expected either every or at"),
        ({"s_schedule": {"every": "1s"}}, "expected 10s to 31d"),
        ({"s_schedule": {"at": ["25:00"]}}, "'25:00' is no time of day"),
        ({"s_max_sensors": 0}, "max_sensors"),
        ({"s_overrides": {"x": {"hihg": 1}}}, "did you mean `high`"),
        ({"s_overrides": {"x": {"max_silence": "x"}}}, "overrides.x.max_silence"),
        ({"o_topic": "a/b#"}, "'#' must be the whole last level"),
        ({"o_topic": "a+/b"}, "'+' must be a whole level"),
        ({"o_topic": ""}, "must not be empty"),
        ({"o_fields": {"t": {}}}, "only for the payloads json"),
        ({"o_payload": "zigbee2mqtt"}, "expected at least one"),
        ({"o_payload": "json", "o_fields": {"t": {"low": 2, "high": 1}}}, "fields.t: low 2.0 is not below"),
        ({"o_low": 0.5, "o_decimals": 0}, "low: 0.5 has more digits than decimals: 0 shows"),
        ({"o_name": "{x}"}, "{x} in '{x}'"),
        ({"o_max_silence": "1 fortnight"}, "sources[0].max_silence"),
        ({"o_expect": ["b/c"]}, "'b/c' is not a topic"),
        ({"o_time_from": {}}, "expected either field or user_property"),
        ({"o_time_from": {"field": "t"}}, "a plain number has no fields"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, changed(**changes)))
    assert told in str(caught.value)
    assert str(tmp_path / "config.yaml") in str(caught.value)


def test_no_password_is_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, changed(broker="mqtt://user:s3cret@host/path")))
    assert "s3cret" not in str(caught.value)


def test_the_password_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("s3cret\n")
    config = load_config(write(tmp_path, changed(broker="mqtt://u@h:1", password_file=str(tmp_path / "pw"))))
    assert config.broker_address.password == "s3cret"


def test_times_of_day_however_yaml_reads_them(tmp_path: Path) -> None:
    text = yaml.safe_dump(changed()) + "  schedule: {at: [06:00, 18:00, '00:00', 7:30]}\n"
    at = load_config(write(tmp_path, text)).summaries[0].schedule.at  # type: ignore[union-attr]
    assert [minute_of_day(time) for time in at] == [360, 1080, 0, 450]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15min", 900), ("1h30min", 5400), ("1.5h", 5400), ("1d 6h", 108_000)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "min", "5 m", "-5min", "5min later", "1e3s"])
def test_other_texts_are_no_durations(text: str) -> None:
    with pytest.raises(ConfigError):
        duration_s(text)


def test_overrides_replace_single_settings(tmp_path: Path) -> None:
    data = changed(
        o_low=1, o_high=9, o_max_silence="1h", s_overrides={"k/t": {"high": 7, "low": None, "unit": "bar"}}
    )
    summary = load_config(write(tmp_path, data)).summaries[0]
    spec = sensor_spec("k/t", summary.sources[0], "", summary.overrides["k/t"])
    assert (spec.low, spec.high, spec.unit, spec.max_silence_s, spec.quantity) == (None, 7, "bar", 3600, "t")
    spec = sensor_spec("j/soil_moisture", Source(topic="a/#"), "", None)
    assert (spec.low, spec.high, spec.quantity) == (None, None, "soil moisture")


def test_the_command_checks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(HERE / "greenhouse.yaml"), "--check"]) == 0
    assert "all well" in capsys.readouterr().out
    assert main([str(write(tmp_path, {"broker": 1})), "--check"]) == 1
    assert "sensor-summary:" in capsys.readouterr().err
