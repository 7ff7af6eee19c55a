"""The response parser: markers as tokens, any chunking, malformed calls; and stop strings."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.response import (
    MARKERS,
    MAX_CALL_CHARACTERS,
    Part,
    Reasoning,
    ResponseParser,
    Text,
    ToolCall,
    parse_call,
)
from gemma_edge.runtime.stops import StopFinder, check_stops

OPEN, CLOSE, CALL, CALLED, QUOTE = MARKERS


def split(text: str) -> list[tuple[bool, str]]:
    """(is marker, text) pairs of a string in which markers are spelled."""
    items: list[tuple[bool, str]] = []
    while text:
        places = {marker: place for marker in MARKERS if (place := text.find(marker)) >= 0}
        first = min(places, key=lambda marker: places[marker], default=None)
        if first is None:
            items.append((False, text))
            break
        if places[first]:
            items.append((False, text[: places[first]]))
        items.append((True, first))
        text = text[places[first] + len(first) :]
    return items


def parse(items: list[tuple[bool, str]], cuts: list[int] = ()) -> list[Part]:
    """Parse, with each text cut into pieces of these lengths in turn, and join neighbours of one kind."""
    parser, parts, turn = ResponseParser(), [], 0
    for marker, text in items:
        if marker:
            parts += parser.marker(text)
            continue
        while text:
            length = cuts[turn % len(cuts)] if cuts else len(text)
            turn += 1
            parts += parser.feed(text[:length])
            text = text[length:]
    return joined(parts + parser.finish())


def joined(parts: list[Part]) -> list[Part]:
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Text) and isinstance(last, Text) and part.malformed == last.malformed:
            result[-1] = Text(last.text + part.text, part.malformed)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            result[-1] = Reasoning(last.text + part.text)
        else:
            result.append(part)
    return result


def test_text_reasoning_and_calls():
    text = (
        "<|channel>thought\nThe lamp\nis on.<channel|>Sure.<|tool_call>call:set_light"
        '{on:false,room:<|"|>kit{c},hen<|"|>}<tool_call|> Done.'
    )
    assert parse(split(text)) == [
        Reasoning("The lamp\nis on."),
        Text("Sure."),
        ToolCall("set_light", {"on": False, "room": "kit{c},hen"}),
        Text(" Done."),
    ]


def test_argument_syntax():
    text = (
        'call:f{a:1,b:-2.5e3,c:true,d:null,e:[1,[],{x:<|"|>ü "q" }<|"|>}],<|"|>key, too<|"|>:<|"|><|"|>, '
        'spaced : "json\\n" ,z:{}}'
    )
    call = parse_call([None if marker else part for marker, part in split(text)])
    assert call == ToolCall(
        "f",
        {
            "a": 1,
            "b": -2500.0,
            "c": True,
            "d": None,
            "e": [1, [], {"x": 'ü "q" }'}],
            "key, too": "",
            "spaced": "json\n",
            "z": {},
        },
    )
    assert isinstance(call.arguments["a"], int)


@pytest.mark.parametrize(
    "text",
    [
        "call:f",
        "call:{}",
        "f{a:1}",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:b}",
        "call:f{a:1",
        "call:f{a:1]",
        "call:f{a:1,}",
        "call:f{a:1}x",
        'call:f{a:<|"|>open}',
        'call:f{a:"open}',
        "call:f{a:01}",
        "call:f{a:1e999}",
        "call:f{a:1.2.3}",
        "call:f{" + "a:[" * 40 + "}",
        "call:f{a:" + "9" * 5000 + "}",
        'call:f{a:"\\q"}',
    ],
)
def test_a_malformed_call_becomes_flagged_text(text):
    for end in ("<tool_call|>", ""):
        parts = parse(split(f"<|tool_call>{text}{end}"))
        assert parts == [Text(text.replace(QUOTE, '"'), malformed=True)]


def test_an_unclosed_but_whole_call_counts():
    assert parse(split("<|tool_call>call:f{}")) == [ToolCall("f", {})]


def test_a_second_call_may_open_before_the_first_is_closed():
    assert parse(split("<|tool_call>call:f{}<|tool_call>call:g{}<tool_call|>")) == [
        ToolCall("f", {}),
        ToolCall("g", {}),
    ]


def test_markers_out_of_place_vanish():
    assert parse(split('a<channel|>b<tool_call|>c<|"|>d')) == [Text("abcd")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|channel>thought\n<channel|>Hi", [Text("Hi")]),
        ("<|channel>thought<channel|>Hi", [Text("Hi")]),
        ("<|channel>thought\nlong", [Reasoning("long")]),
        ("<|channel>no name<channel|>Hi", [Reasoning("no name"), Text("Hi")]),
        ("<|channel>" + "n" * 40 + "\nx<channel|>", [Reasoning("n" * 40 + "\nx")]),
    ],
)
def test_channels(text, expected):
    assert parse(split(text)) == expected


def test_an_endless_call_is_given_up():
    parser = ResponseParser()
    parser.marker(CALL)
    parts: list[Part] = []
    for _ in range(MAX_CALL_CHARACTERS // 1000 + 10):
        parts += parser.feed("x" * 1000)
    assert isinstance(parts[0], Text) and parts[0].malformed
    assert parts[1] == Text("x" * 1000)


def test_markers_spelled_in_text_stay_text():
    parser = ResponseParser()
    assert parser.feed("<|tool_call>call:f{}<tool_call|>") == [Text("<|tool_call>call:f{}<tool_call|>")]


PIECES = st.one_of(
    st.tuples(st.just(True), st.sampled_from(MARKERS)),
    st.tuples(
        st.just(False), st.sampled_from(["thought\n", "call:f{", "}", "a:1", ",", ":", "[", "]", '"', "\n"])
    ),
    st.tuples(st.just(False), st.text(max_size=45)),
)


@given(items=st.lists(PIECES, max_size=25), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=9))
def test_chunking_changes_nothing_and_nothing_raises(items, cuts):
    assert parse(items, cuts) == parse(items)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(-1e9, 1e9).map(float)
    | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), inner, max_size=3)
    ),
    max_leaves=8,
)


def written(value: Any) -> list[str | None]:
    """A value in Gemma's syntax, None for the quote marker."""
    if isinstance(value, str):
        return [None, value, None]
    if isinstance(value, bool) or value is None:
        return [{True: "true", False: "false", None: "null"}[value]]
    if isinstance(value, int | float):
        return [repr(value)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    pieces: list[str | None] = [opening]
    for index, item in enumerate(value):
        pieces.append("," if index else "")
        if isinstance(value, dict):
            pieces += [item, ":", *written(value[item])]
        else:
            pieces += written(item)
    return [*pieces, closing]


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4))
def test_written_arguments_are_read_back(arguments):
    assert parse_call(["call:tool_1", *written(arguments)]) == ToolCall("tool_1", arguments)


@given(
    text=st.text(alphabet="ab<|>", max_size=40),
    stops=st.lists(st.text(alphabet="ab<|>", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=9),
)
def test_stop_strings_cut_the_text_and_never_leak(text, stops, cuts):
    finder, shown, rest, turn = StopFinder(stops), "", text, 0
    while rest and not finder.found:
        length = cuts[turn % len(cuts)]
        turn += 1
        shown += finder.push(rest[:length])
        rest = rest[length:]
        assert not any(stop in shown for stop in stops)
    shown += finder.flush()
    # The stop that is complete first wins; of those complete at one place, the one that began first.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert finder.found == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


@pytest.mark.parametrize("stops", [("",), ("x" * 257,), ("a",) * 17, (3,)])
def test_bad_stop_strings_are_refused(stops):
    with pytest.raises(RequestError):
        check_stops(stops)
