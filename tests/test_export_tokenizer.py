"""tokenizer.model has the ids of tokenizer.json: on tokenizers made Gemma's way, on any text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemma_edge.export.sentencepiece_model import TokenizerError, write_sentencepiece_model

from .support.tiny_checkpoint import SPECIAL_TOKENS, train_tokenizer

NANO = Path(__file__).parents[1] / "models" / "nano" / "tokenizer.json"
MULTILINGUAL = (
    "Ünïcödé naïve café; 3.14159e-10 €; 日本語 テスト 한국어 русский текст ελληνικά עברית العربية हिन्दी ไทย "
    "👩‍👩‍👧‍👦🏳️‍🌈 \t tabs\u00a0nbsp\u200b zero \ufeff bom \r\n dos ﬁ ligature Å A\u030a"
)


@pytest.fixture(scope="module", params=["tiny", "nano", "newline runs"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(tokenizers.Tokenizer, SentencePieceProcessor) of one tokenizer.json"""
    folder = tmp_path_factory.mktemp("tokenizer")
    source = folder / "tokenizer.json"
    if request.param == "nano":
        source = NANO
    else:
        train_tokenizer(700).save(str(source))
    if request.param == "newline runs":
        add_newline_runs(source)
    write_sentencepiece_model(source, folder / "tokenizer.model")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return tokenizers.Tokenizer.from_file(str(source)), model


def add_newline_runs(path: Path) -> None:
    """Added tokens that are not special, as Gemma has for runs of newlines and of escaped spaces."""
    data = json.loads(path.read_text())
    for content in ("\n\n", "\n\n\n", "▁▁", "<table>"):
        index = max(data["model"]["vocab"].values()) + 1
        if content not in data["model"]["vocab"]:
            data["model"]["vocab"][content] = index
        token = dict(id=data["model"]["vocab"][content], content=content, special=False, normalized=False)
        data["added_tokens"].append(token | dict(single_word=False, lstrip=False, rstrip=False))
    if ["▁", "▁"] not in data["model"]["merges"]:
        data["model"]["merges"].append(["▁", "▁"])
    path.write_text(json.dumps(data))


def same(pair, text: str) -> None:
    reference, model = pair
    assert model.EncodeAsIds(text) == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80).filter(lambda text: "▁" not in text))
@example(text=MULTILINGUAL)
@example(text="")
@example(text=" " * 17)
@example(text="a" * 300)
@example(text="\n\n\n\n\n \n\n <table></table>")
@example(text="\x00\x01\x7f")
def test_any_text(pair, text: str):
    if not any(token in text for token in SPECIAL_TOKENS):
        same(pair, text)


def test_texts_made_of_the_vocabulary(pair):
    pieces = [
        piece for piece in pair[0].get_vocab() if piece not in SPECIAL_TOKENS and not piece.startswith("<")
    ]
    pick = random.Random(1)
    for _ in range(500):
        same(pair, "".join(pick.choices(pieces, k=20)).replace("▁", " "))


def test_special_tokens_are_control_pieces_with_their_ids(pair):
    reference, model = pair
    special = {
        content for content in reference.get_vocab() if content in SPECIAL_TOKENS or content.startswith("<|")
    } - {"<unk>"}
    assert special >= {"<bos>", "<turn|>", "<|tool_call>"}
    for content in special:
        index = model.PieceToId(content)
        assert index == reference.token_to_id(content) and model.IsControl(index)
    assert model.IsUnknown(reference.token_to_id("<unk>"))
    assert model.IsByte(reference.token_to_id("<0x0A>"))
    assert model.GetPieceSize() == len(reference.get_vocab())


def with_changes(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    source = tmp_path / "tokenizer.json"
    train_tokenizer(600).save(str(source))
    data = json.loads(source.read_text())
    change(data)
    source.write_text(json.dumps(data))
    return source


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: data["model"].update(type="Unigram"), "BPE"),
        (lambda data: data.update(normalizer=None), "normalizer"),
        (lambda data: data.update(normalizer=dict(type="NFC")), "normalizer"),
        (lambda data: data.update(pre_tokenizer=dict(type="ByteLevel")), "pre_tokenizer"),
        (lambda data: data["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda data: data["model"].update(continuing_subword_prefix="##"), "affixes"),
        (lambda data: data["added_tokens"][4].update(lstrip=True), "<mask>"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, change, named: str):
    with pytest.raises(TokenizerError, match=named):
        write_sentencepiece_model(with_changes(tmp_path, change), tmp_path / "tokenizer.model")


def test_a_difference_is_found(tmp_path: Path):
    """A piece that no merge makes could still be joined by SentencePiece: the check sees it."""

    def forget_merges(data: dict[str, Any]) -> None:
        data["model"]["merges"] = data["model"]["merges"][::2]

    with pytest.raises(TokenizerError, match="gives other ids"):
        write_sentencepiece_model(with_changes(tmp_path, forget_merges), tmp_path / "tokenizer.model")


def test_damaged_files(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        write_sentencepiece_model(tmp_path / "tokenizer.json", tmp_path / "tokenizer.model")
