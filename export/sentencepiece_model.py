"""Writes tokenizer.json's BPE as a SentencePiece model, which the device loads with a tenth of the memory.

The ids are the same: a merge of rank r becomes the piece's score -r, and SentencePiece, like `tokenizers`,
always joins the best-ranked neighbours first, leftmost on a tie. What a piece is is told by its type:

    CONTROL       special added tokens, `<bos>`, `<|turn>`, …: the reader splits them off the text itself
    USER_DEFINED  other added tokens, runs of newlines, say: SentencePiece keeps them whole, longest first
    BYTE          `<0x0A>`: the fallback for characters outside the vocabulary
    NORMAL        everything else
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runtime.errors import GemmaEdgeError

SPACE = "▁"
CHECKED_TEXTS = 400
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_FIXED_TEXTS = (
    "The temperature in the greenhouse is 21.5 °C, humidity 60 %.",
    "  two spaces,\ttab\n\nand newlines   \n",
    '{"a": [1, 2.5, -3e7], "b": null}\ndef f(x):\n    return x ** 2\n',
    "naïve café Ελληνικά русский 日本語 한국어 العربية हिन्दी 👩‍👩‍👧 \u200b\u00a0\u0001",
)


class TokenizerError(GemmaEdgeError):
    """tokenizer.json is of a kind that cannot be written as a SentencePiece model with the same ids."""


def write_sentencepiece_model(tokenizer_json: Path, out: Path) -> None:
    """Convert `tokenizer_json` and check the result against it. Raises TokenizerError."""
    try:
        data = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    except OSError as cause:
        raise TokenizerError(
            f"{tokenizer_json}: cannot be read ({cause.strerror}); the checkpoint needs it"
        ) from cause
    except ValueError as cause:
        raise TokenizerError(f"{tokenizer_json}: not valid JSON: {cause}") from cause
    _refuse_other_kinds(data, tokenizer_json)
    out.write_bytes(_model(data, tokenizer_json).SerializeToString(deterministic=True))
    _check(tokenizer_json, out, data)


def _refuse_other_kinds(data: dict[str, Any], path: Path) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise TokenizerError(f"{path}: {what}; only Gemma's kind of BPE tokenizer is supported")

    model = data.get("model") or {}
    require(model.get("type") == "BPE" and bool(model.get("byte_fallback")), "not a BPE with byte_fallback")
    require(not model.get("ignore_merges") and not model.get("dropout"), "ignore_merges or dropout is set")
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    require(not any(affixes), f"subword affixes {affixes}")
    normalizer = data.get("normalizer") or {}
    escapes = normalizer.get("pattern") == {"String": " "} and normalizer.get("content") == SPACE
    require(normalizer.get("type") == "Replace" and escapes, f"normalizer {normalizer}")
    # After the normalizer there is no space left to split at, so this splitter does nothing.
    splitter = data.get("pre_tokenizer")
    inert = splitter is None or (
        splitter.get("type") == "Split" and splitter.get("pattern") == {"String": " "}
    )
    require(inert, f"pre_tokenizer {splitter}")
    for token in data.get("added_tokens", []):
        trimmed = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        require(not trimmed, f"added token {token['content']!r} strips its surroundings")


def _model(data: dict[str, Any], path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2 as protocol

    kinds = protocol.ModelProto.SentencePiece
    bpe = data["model"]
    added = {token["content"]: token for token in data.get("added_tokens", [])}
    ids = {int(index): piece for piece, index in bpe["vocab"].items()}
    ids |= {int(token["id"]): content for content, token in added.items()}
    merged = _ranks(bpe["merges"])
    unknown = bpe.get("unk_token") or "<unk>"
    model = protocol.ModelProto()
    for index in range(max(ids) + 1):
        piece = ids.get(index)
        score, kind = 0.0, kinds.NORMAL
        if piece is None:  # a hole in the numbering
            piece, kind = f"<hole{index}>", kinds.UNUSED
        elif piece == unknown:
            kind = kinds.UNKNOWN
        elif _BYTE.fullmatch(piece):
            kind = kinds.BYTE
        elif piece in added and added[piece]["special"]:
            kind = kinds.CONTROL
        elif piece in added and not _is_spaces(piece):
            kind = kinds.USER_DEFINED
        elif piece in merged:
            score = -float(merged[piece])
        model.pieces.add(piece=piece, score=score, type=kind)
    if unknown not in ids.values():
        raise TokenizerError(f"{path}: its vocabulary has no {unknown}")
    _settings(model, {piece: index for index, piece in ids.items()}, unknown)
    return model


def _ranks(merges: list[Any]) -> dict[str, int]:
    """Piece -> rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        left, right = pair if isinstance(pair, list) else pair.split(" ")
        ranks.setdefault(left + right, rank)
    return ranks


def _is_spaces(piece: str) -> bool:
    """Runs of escaped spaces are made by merges: as added tokens they only match a literal `▁` in the
    text.
    """
    return set(piece) == {SPACE}


def _settings(model: Any, ids: dict[str, int], unknown: str) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = True
    trainer.unk_piece, trainer.unk_id = unknown, ids[unknown]
    for name in ("bos", "eos", "pad"):
        setattr(trainer, f"{name}_piece", f"<{name}>")
        setattr(trainer, f"{name}_id", ids.get(f"<{name}>", -1))
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True


def _check(tokenizer_json: Path, model: Path, data: dict[str, Any]) -> None:
    """Compare ids on texts made of the vocabulary's own pieces: whatever was assumed above would show
    here.
    """
    import sentencepiece
    import tokenizers

    reference = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    ours = sentencepiece.SentencePieceProcessor(model_file=str(model))
    special = {token["content"] for token in data.get("added_tokens", []) if token["special"]}
    plain = [piece for piece in data["model"]["vocab"] if piece not in special and not _BYTE.fullmatch(piece)]
    for text in (*_FIXED_TEXTS, *_random_texts(plain)):
        if any(token in text for token in special):
            continue
        expected, got = reference.encode(text, add_special_tokens=False).ids, ours.EncodeAsIds(text)
        if expected != got:
            raise TokenizerError(
                f"{tokenizer_json}: as a SentencePiece model it gives other ids for {text[:60]!r} "
                f"({got[:12]} instead of {expected[:12]}); this tokenizer is not supported"
            )


def _random_texts(pieces: list[str]) -> Iterator[str]:
    pick = random.Random(0)
    for _ in range(CHECKED_TEXTS):
        yield "".join(pick.choices(pieces, k=pick.randrange(1, 24))).replace(SPACE, " ")
