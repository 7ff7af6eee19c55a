"""Strict decoding: every mistake in a YAML or JSON file is an error that names the file and the key."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import BundleError, ConfigError
from gemma_edge.runtime.strict import decode_json_file, decode_yaml_file


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    duration_s: float
    topics: tuple[str, ...] = ()


class App(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    window: Window
    extra: dict[str, Window] = {}


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "app.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_yaml_becomes_the_struct(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nwindow: {duration_s: 3, topics: [x, y]}\n")
    assert decode_yaml_file(path, App) == App("a", Window(3.0, ("x", "y")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nwindow: {duration: 3}\n", ["`duration`", "did you mean `duration_s`?", "$.window"]),
        ("nmae: a\nwindow: {duration_s: 3}\n", ["did you mean `name`?"]),
        (
            "name: a\nqwrtz: 1\nwindow: {duration_s: 3}\n",
            ["known keys: duration_s, extra, name, topics, window"],
        ),
        ("name: a\nwindow: {duration_s: 3}\nextra: {b: {topic: [x], duration_s: 1}}\n", ["`topics`"]),
        ("name: a\n", ["missing required field `window`"]),
        ("name: 5\nwindow: {duration_s: 3}\n", ["Expected `str`, got `int`", "$.name"]),
        ("name: a\nwindow: {duration_s: 3\n", ["not valid YAML"]),
        ("name: a\nname: b\nwindow: {duration_s: 3}\n", ["'name' is given twice", "line 2"]),
        ("name: a\nwindow: {duration_s: 3, duration_s: 4}\n", ["'duration_s' is given twice"]),
        ("name: 2026-13-45\nwindow: {duration_s: 3}\n", ["not valid YAML"]),
        ("", ["Expected `object`, got `null`"]),
        (b"name: \xff\xfe", ["not UTF-8 text (byte 6)"]),
        ("[" * 20000, ["not valid YAML"]),
        ("!!python/object/apply:os.system [echo]", ["not valid YAML"]),
    ],
)
def test_a_mistake_names_the_file_and_the_key(tmp_path: Path, text: str | bytes, expected: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        decode_yaml_file(path, App)
    for part in [str(path), *expected]:
        assert part in str(caught.value)


def test_merge_keys_are_not_duplicates(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nextra: {x: &w {duration_s: 1}}\nwindow: {<<: *w, duration_s: 2}\n")
    assert decode_yaml_file(path, App).window.duration_s == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        decode_yaml_file(tmp_path / "none.yaml", App)


def test_json_and_the_error_class_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"name": "a", "window": {"duration_s": 1}}')
    assert decode_json_file(path, App).name == "a"
    path.write_text('{"name": "a", "windw": {"duration_s": 1}}')
    with pytest.raises(BundleError, match="did you mean `window`"):
        decode_json_file(path, App, BundleError)
    path.write_text("{")
    with pytest.raises(BundleError, match="not valid JSON"):
        decode_json_file(path, App, BundleError)
    with pytest.raises(BundleError, match="cannot be read"):
        decode_json_file(tmp_path / "none.json", App, BundleError)


@given(st.binary(max_size=200))
def test_no_content_raises_anything_but_config_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content)
        with contextlib.suppress(ConfigError):
            decode_yaml_file(path, App)
