"""The voice assistant's home: its file, the check of a call, what is published and read, a lost broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.examples.sensor_summary.demo import own_broker
from gemma_edge.examples.voice_assistant import home as module
from gemma_edge.examples.voice_assistant import tools
from gemma_edge.examples.voice_assistant.config import Config, load_config
from gemma_edge.examples.voice_assistant.home import Home
from gemma_edge.examples.voice_assistant.tools import CallError
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.messages import normalise_tools

from .support.brokers import mosquitto
from .support.mqtt_peer import peer

EXAMPLE = Path(module.__file__).parent / "home.yaml"
TOOLS = """
broker: mqtt://localhost
tools:
  - name: dim
    description: Dim a light.
    parameters:
      room: {enum: [kitchen, living room], wire: {living room: salon/main}}
      level: {type: integer, minimum: 0, maximum: 100}
      fade: {type: number, default: 1.5}
    publish:
      - {topic: "home/{room}/set", payload: {to: "{level}", over: "{fade} s", tags: ["{room}", 1, null]}}
      - {topic: log/dim, payload: "{room} at {level}"}
  - name: say
    description: Say something.
    parameters: {place: {}, words: {}}
    publish: [{topic: "home/{place}/say", payload: "{words}", retain: true}]
  - name: read
    description: Read a sensor.
    parameters: {sensor: {enum: [tank level, attic], wire: {tank level: tank/level}}}
    read: {topic: "s/{sensor}/now", json: "value.0", unit: "%", max_age_s: 60}
  - name: any
    description: Read anything.
    parameters: {place: {}}
    read: {topic: "any/{place}"}
"""


def load(folder: Path, text: str = TOOLS) -> Config:
    path = folder / "home.yaml"
    path.write_text(text)
    return load_config(path)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load(tmp_path)


class TestFile:
    def test_the_example_is_valid_and_shows_every_default(self):
        config = load_config(EXAMPLE)
        shown = EXAMPLE.read_text()
        for part in (config.listen, config.answer):
            assert part == type(part)(), f"home.yaml shows other values than the defaults of {type(part)}"
            for name in part.__struct_fields__:
                assert f"  {name}: " in shown
        assert len(config.tools) == 4

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (("broker:", "brocker:"), "unknown field `brocker`; did you mean `broker`?"),
            (("mqtt://localhost", "http://localhost"), "broker: expected mqtt://"),
            (("enum: [kitchen, living room]", "enum: [on, off]"), "put them in quotes"),
            (("wire: {living room", "wire: {loving room"), "wire: 'loving room' is not in enum"),
            (("minimum: 0", "minimum: 101"), "minimum 101 is above maximum 100"),
            (("fade: {type: number, default: 1.5}", "fade: {type: number, default: x}"), "'x' is no number"),
            (("{level}", "{lever}"), "{lever} is no parameter of this tool; known: room, level, fade"),
            (("log/dim", "log/#"), "publish[1].topic: got 'log/#', expected a topic without wildcards"),
            (("- name: say", "- name: dim"), "tools[1].name: 'dim' is taken"),
            (("- name: say", "- name: 'say it'"), "tools[1].name: got 'say it'"),
            (("{place: {}, words: {}}", "{place: {minimum: 3}, words: {}}"), "minimum and maximum are for"),
            (('    read: {topic: "any/{place}"}\n', ""), "expected either publish or read"),
            (("max_age_s: 60", "max_age_s: 0"), "max_age_s"),
        ],
    )
    def test_mistakes_are_told(self, tmp_path: Path, change: tuple[str, str], expected: str):
        assert change[0] in TOOLS
        with pytest.raises(ConfigError) as error:
            load(tmp_path, TOOLS.replace(*change))
        assert expected in str(error.value)

    def test_limits(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="hangover_s"):
            load(tmp_path, TOOLS + "listen: {hangover_s: 61}\n")
        with pytest.raises(ConfigError, match=r"answer\.language: expected an ISO 639-1 code"):
            load(tmp_path, TOOLS + "answer: {language: xx}\n")
        with pytest.raises(ConfigError, match="ca_file: nowhere: no such file"):
            load(tmp_path, TOOLS + "ca_file: nowhere\n")
        with pytest.raises(ConfigError, match="password_file: nowhere cannot be read"):
            load(tmp_path, TOOLS + "password_file: nowhere\n")
        (tmp_path / "secret").write_text("hush\n")
        config = load(
            tmp_path, TOOLS.replace("mqtt://", "mqtt://me@") + f"password_file: {tmp_path}/secret\n"
        )
        assert config.broker_address.password == "hush"


class TestCalls:
    def test_the_model_is_told_of_the_parameters(self, config: Config):
        declared = normalise_tools([tools.declaration(tool) for tool in config.tools])
        dim = declared[0]["function"]["parameters"]
        assert dim["required"] == ["room", "level"]
        assert dim["properties"]["room"] == {"type": "string", "enum": ["kitchen", "living room"]}
        assert dim["properties"]["level"] == {"type": "integer", "minimum": 0.0, "maximum": 100.0}

    def test_messages_are_made_of_the_arguments(self, config: Config):
        sent = publish(config, "dim", room="Living  Room", level="40")
        assert sent == [
            ("home/salon/main/set", b'{"to":40,"over":"1.5 s","tags":["salon/main",1,null]}', False),
            ("log/dim", b"salon/main at 40", False),
        ]
        assert publish(config, "dim", room="the kitchen", level=7.0, fade=0.25)[0][:2] == (
            "home/kitchen/set",
            b'{"to":7,"over":"0.25 s","tags":["kitchen",1,null]}',
        )

    @pytest.mark.parametrize("place", ["hall/lock/set", "a/../b", "# + /x", "Grüne  Stube", "hall\n"])
    def test_a_value_is_one_level_whatever_the_model_says(self, config: Config, place: str):
        [(topic, payload, retain)] = publish(config, "say", place=place, words='say "{place}" {words}')
        assert topic.count("/") == 2 and not set("#+ \n") & set(topic)
        assert payload == b'say "{place}" {words}' and retain, "arguments are not templates"

    @pytest.mark.parametrize(
        ("name", "arguments", "expected"),
        [
            ("explode", {}, "there is no tool 'explode'; known: dim, say, read, any"),
            ("dim", {"level": 3}, "room is missing"),
            ("dim", {"room": "attic", "level": 3}, "room: there is no 'attic'; known: kitchen, living room"),
            ("dim", {"room": "kitchn", "level": 3}, "did you mean 'kitchen'?"),
            ("dim", {"room": "kitchen and living room", "level": 3}, "there is no"),
            ("dim", {"room": ["kitchen"], "level": 3}, "room: expected a string"),
            (
                "dim",
                {"room": "kitchen", "level": 101},
                "level: 101 is out of range; at least 0 and at most 100",
            ),
            ("dim", {"room": "kitchen", "level": "bright"}, "level: expected an integer, got 'bright'"),
            ("dim", {"room": "kitchen", "level": 1.5}, "level: expected an integer"),
            ("dim", {"room": "kitchen", "level": True}, "level: expected an integer"),
            ("dim", {"room": "kitchen", "level": 3, "fade": float("inf")}, "fade: expected a number"),
            ("dim", {"room": "kitchen", "level": 3, "colour": "red"}, "dim has no parameter 'colour'"),
            ("say", {"place": "hall", "words": " "}, "words: expected 1 to 500 characters"),
            ("say", {"place": "///", "words": "x"}, "place names nothing"),
        ],
    )
    def test_bad_calls_get_an_error_for_the_model(
        self, config: Config, name: str, arguments: dict[str, Any], expected: str
    ):
        outcome = Home(config).call(name, arguments)
        assert not outcome.ok and expected in outcome.result["error"]

    def test_readings(self, config: Config):
        assert tools.read_filters(config.tools) == ["s/tank/level/now", "s/attic/now", "any/+"]
        tool = tools.find_tool(config.tools, "read")
        reading = tools.reading(tool, tools.check_arguments(tool, {"sensor": "tank level"}))
        assert reading is not None and reading.topic == "s/tank/level/now"
        assert tools.value_of(b'{"value": [3.5, 1]}', reading) == "3.5 %"
        assert tools.value_of(b'{"value": {"0": "low"}}', reading) == "low %"
        for payload in (b"3.5", b"{}", b'{"value": []}', b"\xff", b'{"value": ["' + b"x" * 900 + b'"]}'):
            with pytest.raises(CallError):
                tools.value_of(payload, reading)


def publish(config: Config, name: str, **arguments: Any) -> list[tuple[str, bytes, bool]]:
    tool = tools.find_tool(config.tools, name)
    sent = tools.messages(tool, tools.check_arguments(tool, arguments))
    return [(message.topic, message.payload, message.retain) for message in sent]


class TestBroker:
    @pytest.fixture
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(module, "FIRST_DELAY_S", 0.1)
        monkeypatch.setattr(module, "LONGEST_DELAY_S", 0.2)
        yield

    def test_readings_come_and_go(self, tmp_path: Path, quick: None):
        with mosquitto(tmp_path) as broker, peer(broker.port) as world:
            world.send('{"value": [42]}', topic="s/attic/now", retain=True)
            config = load(tmp_path, TOOLS.replace("localhost", f"127.0.0.1:{broker.port}"))
            with Home(config) as home:
                assert home.wait_online(10)
                assert wait_for(lambda: home.call("read", {"sensor": "attic"}).result == {"value": "42 %"})
                assert home.call("read", {"sensor": "tank level"}).result == {"error": "no value"}
                world.send("warm", topic="any/green_house", retain=True)
                assert wait_for(
                    lambda: home.call("any", {"place": "green house"}).result == {"value": "warm"}
                )
                world.send(b"", topic="any/green_house", retain=True)
                assert wait_for(lambda: not home.call("any", {"place": "green house"}).ok)

    def test_a_stale_reading_is_none(self, config: Config, monkeypatch: pytest.MonkeyPatch):
        home = Home(config)
        home._link._readings["s/attic/now"] = (b'{"value": [1]}', time.monotonic() - 200)
        assert home.call("read", {"sensor": "attic"}).result == {"error": "its last value is 3 minutes old"}

    def test_a_broker_that_goes_and_comes_back(self, tmp_path: Path, quick: None):
        """What could not be delivered fails at once, and never arrives later."""
        with mosquitto(tmp_path) as broker:
            config = load(tmp_path, TOOLS.replace("localhost", f"127.0.0.1:{broker.port}"))
            with Home(config) as home:
                assert home.wait_online(10)
                assert home.call("say", {"place": "hall", "words": "one"}).result == {"status": "ok"}
                broker.kill()
                started = time.monotonic()
                outcome = home.call("say", {"place": "hall", "words": "two"})
                assert outcome.result == {"error": "unreachable"}
                assert time.monotonic() - started < module.CONFIRM_S + 10
                broker.start()
                with peer(broker.port, "home/#") as world:
                    assert home.wait_online(10)
                    assert home.call("say", {"place": "hall", "words": "three"}).ok
                    assert [bytes(m.payload) for m in world.wait(1)] == [b"three"]
                    world.stays_at(1, 0.4)

    def test_a_broker_that_knows_only_311(self, tmp_path: Path):
        with own_broker(threading.Event()) as url:
            config = load(tmp_path, TOOLS.replace("mqtt://localhost", url))
            with Home(config) as home, peer(config.broker_address.port, "home/#", v5=False) as world:
                assert home.wait_online(10)
                assert home.call("say", {"place": "hall", "words": "hi"}).ok
                assert bytes(world.wait(1)[0].payload) == b"hi"

    def test_without_a_broker_calls_fail_and_it_can_be_left(self, tmp_path: Path):
        config = load(tmp_path, TOOLS.replace("localhost", "127.0.0.1:1"))
        with Home(config) as home:
            assert not home.wait_online(0.1)
            assert home.call("say", {"place": "hall", "words": "x"}).result == {"error": "unreachable"}
            assert home.call("any", {"place": "hall"}).result == {"error": "unreachable"}
        assert "home-mqtt" not in {thread.name for thread in threading.enumerate()}


def wait_for(holds: Any, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
