"""Strict decoding of YAML and JSON into msgspec structs: an unknown key is an error naming the nearest."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from .errors import ConfigError

T = TypeVar("T")

_UNKNOWN = re.compile(r"unknown field `([^`]*)`")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float | bool) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str | int | float | bool):
                seen.add(key)
        return super().construct_mapping(node, deep)


def decode_yaml_file(path: Path, type_: type[T], error: type[Exception] = ConfigError) -> T:
    """Read `path` as YAML and convert it to `type_`. Raises `error`, naming the file and the key."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror})") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path}: not UTF-8 text (byte {cause.start})") from cause
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as cause:  # ValueError: an impossible date
        raise error(f"{path}: not valid YAML: {cause}") from cause
    return convert(data, type_, str(path), error)


def decode_json_file(path: Path, type_: type[T], error: type[Exception] = ConfigError) -> T:
    """Read `path` as JSON and convert it to `type_`. Raises `error`, naming the file and the key."""
    try:
        data = msgspec.json.decode(path.read_bytes())
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror})") from cause
    except msgspec.DecodeError as cause:
        raise error(f"{path}: not valid JSON: {cause}") from cause
    return convert(data, type_, str(path), error)


def convert(data: Any, type_: type[T], where: str, error: type[Exception] = ConfigError) -> T:
    """Convert plain data to `type_`. `where` names the source of `data` in messages."""
    try:
        return msgspec.convert(data, type_, str_keys=True)
    except msgspec.ValidationError as cause:
        raise error(f"{where}: {cause}{_suggestion(str(cause), type_)}") from cause


def _suggestion(message: str, type_: Any) -> str:
    match = _UNKNOWN.search(message)
    if not match:
        return ""
    known = sorted(_field_names(type_, set()))
    near = difflib.get_close_matches(match[1], known, n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(known)}"


def _field_names(type_: Any, seen: set[Any]) -> set[str]:
    """The names of the fields of every struct reachable from `type_`."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        if type_ in seen:
            return set()
        seen.add(type_)
        names: set[str] = set()
        for field in msgspec.structs.fields(type_):
            names.add(field.encode_name)
            names |= _field_names(field.type, seen)
        return names
    names = set()
    for argument in getattr(type_, "__args__", ()):
        names |= _field_names(argument, seen)
    return names
