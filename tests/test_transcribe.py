"""The instruction for a transcript, its languages, and how a transcript grows."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.transcribe import (
    LANGUAGES,
    MAX_PROMPT_CHARS,
    Transcript,
    instruction,
    language_code,
    transcription,
)


def test_the_instruction_is_googles() -> None:
    assert instruction("en") == (
        "Transcribe the following speech segment in English into English text. "
        "Only output the transcription, with no newlines."
    )
    assert "in German into German text" in instruction("de-AT")
    assert instruction("en", " kitchen,\n  lamp ").endswith("\nContext: kitchen, lamp")
    assert instruction("en", " ") == instruction("en")


@pytest.mark.parametrize("given", ["en", "EN", "en-US", "en_gb", "English", " english "])
def test_languages_by_code_tag_and_name(given: str) -> None:
    assert language_code(given) == "en"


def test_unknown_languages_and_long_hints_are_refused() -> None:
    with pytest.raises(RequestError, match="did you mean 'german'"):
        language_code("Germn")
    with pytest.raises(RequestError, match="ISO 639-1"):
        language_code("x" * 1000)
    with pytest.raises(RequestError, match="prompt: "):
        instruction("en", "x" * (MAX_PROMPT_CHARS + 1))
    assert all(len(code) == 2 and name[0].isupper() for code, name in LANGUAGES.items())


def test_the_request_is_greedy_and_bounded() -> None:
    request = transcription({"type": "audio", "file": b"x"}, language="en")
    assert request.params.temperature == 0.0 and request.max_tokens is None and request.stop_after
    assert [part["type"] for part in request.messages[0]["content"]] == ["text", "audio"]


@given(st.text(alphabet=" \n\tab.é", max_size=60), st.lists(st.integers(0, 60)))
def test_any_cut_gives_the_same_line(text: str, cuts: list[int]) -> None:
    transcript = Transcript()
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    deltas = [transcript.add(piece) for piece in pieces]
    assert transcript.text == "".join(deltas) == " ".join(text.split())
