"""tokenizer.table has the ids of tokenizer.json: on tokenizers made Gemma's way, on any text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gemma_edge.export import token_table
from gemma_edge.export.token_table import TokenizerError, write_token_table
from gemma_edge.runtime.bpe import TokenTable
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.tokenizer import Tokenizer

from .support.tiny_checkpoint import SPECIAL_TOKENS, train_tokenizer

NANO = Path(__file__).parents[1] / "models" / "nano" / "tokenizer.json"
MULTILINGUAL = (
    "Ünïcödé naïve café; 3.14159e-10 €; 日本語 テスト 한국어 русский текст ελληνικά עברית العربية हिन्दी ไทย "
    "👩‍👩‍👧‍👦🏳️‍🌈 \t tabs\u00a0nbsp\u200b zero \ufeff bom \r\n dos ﬁ ligature Å A\u030a"
)


@pytest.fixture(scope="module", params=["tiny", "nano", "newline runs", "words go on"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(tokenizers.Tokenizer, Tokenizer) of one tokenizer.json"""
    folder = tmp_path_factory.mktemp("tokenizer")
    source = folder / "tokenizer.json"
    if request.param == "nano":
        source = NANO
    else:
        train_tokenizer(700).save(str(source))
    if request.param == "newline runs":
        add_newline_runs(source)
    if request.param == "words go on":
        add_words_that_go_on(source)
    write_token_table(source, folder / "tokenizer.table")
    return tokenizers.Tokenizer.from_file(str(source)), Tokenizer(folder / "tokenizer.table")


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


def add_words_that_go_on(path: Path) -> None:
    """Pieces with a space inside, as Gemma has one (`>▁</`): no word ends there."""
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    for left, right in (("e", "▁"), ("e▁", "t"), ("▁", "e▁")):
        vocab.setdefault(left + right, max(vocab.values()) + 1)
        data["model"]["merges"].insert(3, [left, right])
    path.write_text(json.dumps(data))


def same(pair, text: str) -> None:
    reference, ours = pair
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80))
@example(text=MULTILINGUAL)
@example(text="")
@example(text=" " * 17)
@example(text="a" * 300)
@example(text="\n\n\n\n\n \n\n <table></table>")
@example(text="\x00\x01\x7f")
@example(text="▁▁ ▁a▁ ▁▁▁the e the e  e e t")
@example(text="<bos><turn|><|turn><table><|turn>\n\n<unk")
def test_any_text(pair, text: str):
    same(pair, text)


def test_texts_made_of_the_vocabulary(pair):
    pieces = list(pair[0].get_vocab())
    pick = random.Random(1)
    for number in range(500):
        text = "".join(pick.choices(pieces, k=20))
        same(pair, text.replace("▁", " ") if number % 4 else text)


def test_special_tokens_are_controls_with_their_ids(pair):
    reference, ours = pair
    special = {
        content for content in reference.get_vocab() if content in SPECIAL_TOKENS or content.startswith("<|")
    }
    assert special >= {"<bos>", "<turn|>", "<|tool_call>", "<unk>"}
    for content in special:
        assert ours.controls[content] == reference.token_to_id(content)
    newline = reference.token_to_id("<0x0A>")
    assert ours.byte(newline) == 10 and ours.byte(newline + 1) == 11 and ours.byte(0) is None
    assert ours.vocab_size == len(reference.get_vocab())
    for token in (-1, ours.vocab_size):
        with pytest.raises(IndexError):
            ours.piece(token)


MERGES = st.lists(
    st.tuples(st.text("ab▁", min_size=1, max_size=4), st.text("ab▁", min_size=1, max_size=4)), max_size=14
)


@settings(max_examples=300, deadline=None)
@given(merges=MERGES, texts=st.lists(st.text("ab ▁c", max_size=30), min_size=4, max_size=4))
@example(
    merges=[("ab", "b"), ("a", "bb"), ("b", "b"), ("a", "b")], texts=["abb" * 5, "aabbb", "bbab", "babb bb"]
)
def test_any_merges_in_any_order(tmp_path_factory: pytest.TempPathFactory, merges, texts):
    """Ranks that make no sense, pieces made in several ways, merges given twice."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    known = []
    for char in "ab▁":
        vocab[char] = len(vocab)
    for left, right in sorted(merges, key=lambda pair: len(pair[0] + pair[1])):
        if left in vocab and right in vocab:
            vocab.setdefault(left + right, len(vocab))
            known.append((left, right))
    known.sort(key=merges.index)
    model = tokenizers.models.BPE(vocab, known, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    reference = tokenizers.Tokenizer(model)
    reference.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    path = tmp_path_factory.mktemp("merges") / "tokenizer.table"
    path.write_bytes(token_table._table(json.loads(reference.to_str()), path))
    ours = TokenTable(path)
    for text in texts:
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_words_are_remembered_but_not_for_ever(pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gemma_edge.runtime.bpe.CACHED_WORDS", 5)
    for number in range(40):
        same(pair, f" the kitchen {number} the {'x' * number} kitchen")
    assert len(pair[1]._pieces._words) <= 5


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
        (lambda data: data["added_tokens"][4].update(normalized=True), "<mask>"),
        (lambda data: data["model"]["vocab"].pop("<0x41>"), "255 of 256 byte tokens"),
        (lambda data: data["model"]["merges"].append(["zz", "zz"]), "merge of 'zz' and 'zz'"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, change, named: str):
    with pytest.raises(TokenizerError, match=named):
        write_token_table(with_changes(tmp_path, change), tmp_path / "tokenizer.table")


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whatever the conversion takes for granted, the check sees it."""
    monkeypatch.setattr(token_table, "_before_spaces", lambda vocab: set())
    train_tokenizer(600).save(str(tmp_path / "tokenizer.json"))
    add_words_that_go_on(tmp_path / "tokenizer.json")
    with pytest.raises(TokenizerError, match="gives other ids"):
        write_token_table(tmp_path / "tokenizer.json", tmp_path / "tokenizer.table")


def test_damaged_files(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        write_token_table(tmp_path / "tokenizer.json", tmp_path / "tokenizer.table")


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda data: b"",
    lambda data: b"x" + data[1:],
    lambda data: data[:-1],
    lambda data: data[:40],
    lambda data: data[:20] + b"{" + data[21:],
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tables(tmp_path: Path, damage: Callable[[bytes], bytes]):
    table = tmp_path / "tokenizer.table"
    write_token_table(NANO, table)
    table.write_bytes(damage(table.read_bytes()))
    with pytest.raises(BundleError, match="not a whole token table"):
        Tokenizer(table)
