"""docs/{http,mqtt,wyoming}.md and the unit file name what the code does: parameters, codes, options."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import msgspec

from gemma_edge.runtime import serve
from gemma_edge.runtime.transports import openai_reply
from gemma_edge.runtime.transports.mqtt_address import Topics
from gemma_edge.runtime.transports.openai_api import IGNORED, REFUSED, Body
from gemma_edge.runtime.transports.openai_audio import REFUSED as REFUSED_AUDIO
from gemma_edge.runtime.transports.openai_audio import TranscriptionFields

ROOT = Path(__file__).parents[1]
HTTP = (ROOT / "docs/http.md").read_text(encoding="utf-8")
MQTT = (ROOT / "docs/mqtt.md").read_text(encoding="utf-8")
WYOMING = (ROOT / "docs/wyoming.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
GENAI = (ROOT / "docs/genai.md").read_text(encoding="utf-8")


def test_every_parameter_and_code_is_documented() -> None:
    names = {field.name for field in msgspec.structs.fields(Body)} | set(REFUSED) | IGNORED
    names |= {field.name for field in msgspec.structs.fields(TranscriptionFields)} | set(REFUSED_AUDIO)
    named = set(re.findall(r"`([a-z_]+)[`:]", HTTP))
    assert names <= named, names - named
    assert set(openai_reply._ERRORS) <= named, set(openai_reply._ERRORS) - named


def test_every_option_is_documented() -> None:
    parser = argparse.ArgumentParser()
    serve.add_serve_arguments(parser)
    options = {word for action in parser._actions for word in action.option_strings if word.startswith("--")}
    written = HTTP + MQTT + WYOMING + PERFORMANCE + GENAI
    missing = {option for option in options - {"--help"} if option not in written}
    assert not missing


def test_the_topics_are_those_of_the_documentation() -> None:
    topics = Topics("BASE", "NODE")
    audio = (topics.request_audio, topics.response_audio)
    for topic in (topics.request, topics.response, topics.availability, *audio):
        assert f"| `{topic}` |" in MQTT


def test_the_unit_file_starts_serve_with_valid_options() -> None:
    unit = (ROOT / "deploy/gemma-edge.service").read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert command
    _, name, *options = shlex.split(command[1])
    parser = argparse.ArgumentParser()
    serve.add_serve_arguments(parser)
    assert name == "serve" and serve.settings_from(parser.parse_args(options)).socket_mode == 0o660
