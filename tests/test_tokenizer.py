"""Our tokenizer against Hugging Face's on the same vocabulary, and streaming decoding."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.tokenizer import ControlFinder, StreamDecoder, Tokenizer

from .support.tokenizer_files import tokenizer_pair

WORDS = (
    'temperature sensor kitchen light the turn é °C 21.5 -7 % {} ["a":1] <turn|> <|turn> <|tool_call> '
    "<eos <unk> <0x41> 😀 👨‍👩‍👧 日本語 ü עברית ▁ ▁▁ | <"
).split(" ")
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from([*WORDS, " ", "  ", "\n", "\n\n", "\t", "\r\n", "\x00", "\u200d"]), max_size=25
    ).map("".join),
)
NAMES = ("tiny", "nano")


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=400)
@given(text=TEXTS)
@example(text="")
@example(text=" ")
@example(text=" a  b   c\n")
@example(text="<turn|")
@example(text="<<turn|>>")
@example(text="<|turn><|turn>")
def test_ids_are_hugging_face_ids(name, text):
    theirs, ours = tokenizer_pair(name)
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    assert (
        ours.decode(ids, skip_special=False)
        == theirs.decode(ids, skip_special_tokens=False)
        == text.replace("▁", " ")
    )


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_no_control_token_comes_out_of_plain_text(name, text):
    ours = tokenizer_pair(name)[1]
    ids = ours.encode(text, allow_special=False)
    assert not any(ours.is_control(token) for token in ids)
    assert ours.decode(ids) == text.replace("▁", " ")


@pytest.mark.parametrize("name", NAMES)
def test_every_token_is_what_hugging_face_calls_it(name):
    theirs, ours = tokenizer_pair(name)
    assert ours.vocab_size == theirs.get_vocab_size()
    assert [ours.piece(i) for i in range(ours.vocab_size)] == [
        theirs.id_to_token(i) for i in range(ours.vocab_size)
    ]
    special = {token.content: i for i, token in theirs.get_added_tokens_decoder().items() if token.special}
    assert ours.controls == special


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 511), max_size=40))
def test_a_stream_adds_up_and_is_never_broken(ids):
    ours = tokenizer_pair("tiny")[1]
    stream, text = StreamDecoder(ours), ""
    for token in ids:
        piece = stream.push(token)
        piece.encode("utf-8")  # no surrogates
        text += piece
    assert text + stream.flush() == ours.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=20))
def test_characters_in_bytes_come_out_whole(text):
    """No replacement character, ever, when the bytes are right."""
    ours = tokenizer_pair("tiny")[1]
    stream, text = StreamDecoder(ours), text.replace("\ufffd", "").replace("▁", "")
    shown = ""
    for token in ours.encode(text, allow_special=False):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown + stream.flush() == text


def test_an_emoji_appears_with_its_last_byte():
    ours = tokenizer_pair("tiny")[1]
    ids = ours.encode("😀!")
    stream = StreamDecoder(ours)
    assert [stream.push(token) for token in ids] == ["", "", "", "😀", "!"]


def test_half_a_character_becomes_a_replacement_character():
    ours = tokenizer_pair("tiny")[1]
    first, *_ = ours.encode("😀")
    assert ours.decode([first, *ours.encode("a")]) == "\ufffda"
    assert ours.decode([first]) == "\ufffd"
    assert ours.decode([first, ours.controls["<turn|>"]]) == "\ufffd"


def test_lone_surrogates_do_not_break_encoding():
    ours = tokenizer_pair("tiny")[1]
    assert ours.decode(ours.encode("a\ud800b")) == "a?b"


def test_the_longest_control_token_wins():
    finder = ControlFinder(["<a", "<ab>", "<a>", "[x]"])
    text = "<<ab><a>[x]<a"
    assert [text[start:end] for start, end in finder.spans(text)] == ["<ab>", "<a>", "[x]", "<a"]
    assert list(ControlFinder([]).spans(text)) == []


def test_a_broken_model_file_is_a_bundle_error(tmp_path):
    with pytest.raises(BundleError):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(BundleError):
        Tokenizer(tmp_path / "bad.model")
