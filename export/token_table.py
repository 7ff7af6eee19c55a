"""Writes tokenizer.json's BPE as a table that the device maps (`runtime/bpe.py`), and checks it against it.

Merges lie in a hash table by their pair of ids, one 64-bit slot each: left, right, rank. Pieces are UTF-8,
one after the other, with the places where they start.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..runtime.bpe import MAGIC, SPACE, Header, slot_of
from ..runtime.errors import GemmaEdgeError

CHECKED_TEXTS = 400
ALIGN = 64
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_FIXED_TEXTS = (
    "The temperature in the greenhouse is 21.5 °C, humidity 60 %.",
    "  two spaces,\ttab\n\nand newlines   \n",
    '{"a": [1, 2.5, -3e7], "b": null}\ndef f(x):\n    return x ** 2\n',
    "naïve café Ελληνικά русский 日本語 한국어 العربية हिन्दी 👩‍👩‍👧 \u200b\u00a0\u0001",
)


class TokenizerError(GemmaEdgeError):
    """tokenizer.json is of a kind that has no token table with the same ids."""


def write_token_table(tokenizer_json: Path, out: Path) -> None:
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
    out.write_bytes(_table(data, tokenizer_json))
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
        require(
            not token.get("normalized"), f"added token {token['content']!r} is looked for after normalizing"
        )
    have = {match[1] for piece in model.get("vocab", {}) if (match := _BYTE.fullmatch(piece))}
    require(len(have) == 256, f"{len(have)} of 256 byte tokens")


def _table(data: dict[str, Any], path: Path) -> bytes:
    bpe, added = data["model"], data.get("added_tokens", [])
    ids: dict[str, int] = bpe["vocab"] | {token["content"]: token["id"] for token in added}
    unknown = bpe.get("unk_token") or "<unk>"
    if unknown not in ids:
        raise TokenizerError(f"{path}: its vocabulary has no {unknown}")
    pieces = {index: piece for piece, index in ids.items()}
    vocab_size = max(pieces) + 1
    encoded = [pieces.get(index, f"<hole{index}>").encode() for index in range(vocab_size)]
    special = {token["id"] for token in added if token["special"]} | {ids[unknown]}
    merges = [(pair if isinstance(pair, list) else pair.split(" ")) for pair in bpe["merges"]]
    slots, id_bits, rank_bits, slots_log2 = _merge_table(merges, bpe["vocab"], vocab_size, path)
    chars = sorted((ord(piece), index) for piece, index in bpe["vocab"].items() if len(piece) == 1)
    bytes_of = {int(match[1], 16): ids[piece] for piece in ids if (match := _BYTE.fullmatch(piece))}
    arrays = {
        "slots": slots,
        "merged": np.array([bpe["vocab"][left + right] for left, right in merges], "<u4"),
        "chars": np.array([code for code, _ in chars], "<u4"),
        "char_ids": np.array([index for _, index in chars], "<u4"),
        "byte_ids": np.array([bytes_of[byte] for byte in range(256)], "<u4"),
        "starts": np.cumsum([0, *map(len, encoded)]).astype("<u4"),
        "pieces": np.frombuffer(b"".join(encoded), np.uint8),
    }
    header = Header(
        vocab_size=vocab_size,
        id_bits=id_bits,
        rank_bits=rank_bits,
        slots_log2=slots_log2,
        unknown=ids[unknown],
        controls=tuple(sorted(special)),
        plain_added=tuple(sorted(token["id"] for token in added if token["id"] not in special)),
        glued="".join(sorted(_before_spaces(bpe["vocab"]))),
        sections={},
    )
    return _file(header, {name: array.tobytes() for name, array in arrays.items()})


def _merge_table(
    merges: list[Any], vocab: dict[str, int], vocab_size: int, path: Path
) -> tuple[np.ndarray, int, int, int]:
    """Slots, and the bits of an id, of a rank, of the number of slots."""
    id_bits, rank_bits = (vocab_size - 1).bit_length(), max(len(merges), 2).bit_length()
    if 2 * id_bits + rank_bits > 63:
        raise TokenizerError(f"{path}: {vocab_size} tokens and {len(merges)} merges do not fit into a slot")
    slots_log2 = max(len(merges) * 2 - 1, 2).bit_length()
    slots, mask = [2**64 - 1] * (1 << slots_log2), (1 << slots_log2) - 1
    ranks = {}
    for rank, (left, right) in enumerate(merges):
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise TokenizerError(f"{path}: the merge of {left!r} and {right!r} is not in its vocabulary")
        ranks[vocab[left] << id_bits | vocab[right]] = rank  # of a pair given twice the last one counts
    for pair, rank in ranks.items():
        slot = slot_of(pair, slots_log2)
        while slots[slot] != 2**64 - 1:
            slot = (slot + 1) & mask
        slots[slot] = pair << rank_bits | rank
    return np.array(slots, "<u8"), id_bits, rank_bits, slots_log2


def _before_spaces(vocab: dict[str, int]) -> set[str]:
    """Characters that stand before a space in some piece: a word may go on after them."""
    return {
        before
        for piece in vocab
        for before, char in itertools.pairwise(piece)
        if char == SPACE and before != SPACE
    }


def _file(header: Header, sections: dict[str, bytes]) -> bytes:
    """MAGIC, the header's length, the header, and sections at multiples of ALIGN."""
    room = len(msgspec.json.encode(header)) + 64 * len(sections)  # of the header with its sections
    places, end = {}, len(MAGIC) + 8 + room
    for name, data in sections.items():
        start = -(-end // ALIGN) * ALIGN
        places[name] = (start, len(data))
        end = start + len(data)
    encoded = msgspec.json.encode(msgspec.structs.replace(header, sections=places)).ljust(room)
    out = bytearray(end)
    out[: len(MAGIC) + 8 + room] = MAGIC + room.to_bytes(8, "little") + encoded
    for name, data in sections.items():
        start, size = places[name]
        out[start : start + size] = data
    return bytes(out)


def _check(tokenizer_json: Path, table: Path, data: dict[str, Any]) -> None:
    """Compare ids on texts made of the vocabulary's own pieces: whatever was assumed above would show."""
    import tokenizers

    from ..runtime.tokenizer import Tokenizer

    reference, ours = tokenizers.Tokenizer.from_file(str(tokenizer_json)), Tokenizer(table)
    for text in (*_FIXED_TEXTS, *_random_texts(list(data["model"]["vocab"]))):
        expected, got = reference.encode(text, add_special_tokens=False).ids, ours.encode(text)
        if expected != got:
            raise TokenizerError(
                f"{tokenizer_json}: as a token table it gives other ids for {text[:60]!r} "
                f"({got[:12]} instead of {expected[:12]}); this tokenizer is not supported"
            )


def _random_texts(pieces: list[str]) -> Iterator[str]:
    pick = random.Random(0)
    for _ in range(CHECKED_TEXTS):
        yield "".join(pick.choices(pieces, k=pick.randrange(1, 24))).replace(SPACE, pick.choice((" ", SPACE)))
