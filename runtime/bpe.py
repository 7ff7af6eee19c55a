"""Byte-pair encoding on a table that is mapped from disk: text without control tokens to ids, ids to pieces.

The ids are those of Hugging Face's `tokenizers` for the tokenizer.json that the table was made of
(`export/token_table.py`; layout in docs/bundle.md). Nothing is read at the start but the header and the
tokens that are looked for in the raw text; a lookup touches a page or two.

    text -> added tokens | words ("▁the", "▁tank") -> characters or bytes -> merges, best rank first

No merge reaches over the beginning of a word, so words are encoded alone, and remembered.
"""

from __future__ import annotations

import heapq
import mmap
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from .errors import BundleError

MAGIC = b"GETOKEN1"
SPACE = "\u2581"  # how pieces write a space
CACHED_WORDS = 8192
CACHED_CHARS = 64  # longer words are not remembered
_EMPTY = 2**64 - 1
_POSITIONS = 32  # bits of a position in a queue entry
_HASH = 0x9E3779B97F4A7C15  # 2^64 / golden ratio


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands behind MAGIC and its own length; sections are (offset, bytes) in the file."""

    vocab_size: int
    id_bits: int  # of an id in a slot
    rank_bits: int
    slots_log2: int  # of the merge table
    unknown: int
    controls: tuple[int, ...]  # special added tokens
    plain_added: tuple[int, ...]  # other added tokens, found in the raw text
    glued: str  # characters that a piece may hold before a space
    sections: dict[str, tuple[int, int]]


def slot_of(pair: int, slots_log2: int) -> int:
    """Where the search for a pair of ids (left << id_bits | right) begins."""
    return (pair * _HASH & _EMPTY) >> (64 - slots_log2)


class ControlFinder:
    """Where given tokens stand in a text: from the left, the longest at each place."""

    def __init__(self, controls: Iterable[str]) -> None:
        self.controls = frozenset(controls)
        self.lengths = sorted({len(control) for control in self.controls}, reverse=True)
        # Looked up by slices at each possible first character: a checkpoint may have thousands of them.
        firsts = "".join(sorted(re.escape(first) for first in {control[0] for control in self.controls}))
        self._firsts = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """(start, end) of every one of them."""
        done = 0
        for match in self._firsts.finditer(text):
            start = match.start()
            if start < done:
                continue
            for length in self.lengths:
                if text[start : start + length] in self.controls:
                    done = start + length
                    yield start, done
                    break


class TokenTable:
    """A mapped table. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Raises BundleError."""
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = self._read_header(path)
            sections = {
                name: memoryview(self._map)[first : first + size]
                for name, (first, size) in header.sections.items()
            }
            self._slots = sections["slots"].cast("Q")  # left | right | rank, or _EMPTY; (2 ** slots_log2,)
            self._merged = sections["merged"].cast("I")  # rank -> id that the merge makes
            self._chars = sections["chars"].cast("I")  # code points that are pieces, ascending
            self._char_ids = sections["char_ids"].cast("I")
            self._byte_ids = sections["byte_ids"].cast("I")  # (256,), or none
            self._starts = sections["starts"].cast("I")  # (vocab + 1,): of each piece in `pieces`
            self._pieces = sections["pieces"]  # UTF-8
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise BundleError(f"{path}: not a whole token table ({cause}); export it again") from cause
        self.vocab_size, self.unknown, self.controls = header.vocab_size, header.unknown, header.controls
        self._id_bits, self._rank_bits, self._slots_log2 = header.id_bits, header.rank_bits, header.slots_log2
        self._glued = frozenset(header.glued)
        self._bytes = {token: byte for byte, token in enumerate(self._byte_ids)}
        self._added = {self.piece(token): token for token in header.plain_added}
        self._finder = ControlFinder(self._added)
        self._words: dict[str, tuple[int, ...]] = {}

    def _read_header(self, path: Path) -> Header:
        start = self._map[: len(MAGIC) + 8]
        if start[: len(MAGIC)] != MAGIC:
            raise ValueError(f"expected {MAGIC!r}, got {start[: len(MAGIC)]!r}")
        length = int.from_bytes(start[len(MAGIC) :], "little")
        header = msgspec.json.decode(self._map[len(start) : len(start) + length], type=Header)
        end = max(first + size for first, size in header.sections.values())
        if end != len(self._map):
            raise ValueError(f"{len(self._map)} bytes, expected {end}")
        return header

    def piece(self, token: int) -> str:
        """The token as the vocabulary writes it. Raises IndexError on an id outside it."""
        if not 0 <= token < self.vocab_size:
            raise IndexError(f"token {token} is not in 0…{self.vocab_size - 1}")
        return str(self._pieces[self._starts[token] : self._starts[token + 1]], "utf-8")

    def byte(self, token: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for other tokens."""
        return self._bytes.get(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are plain characters."""
        ids: list[int] = []
        place = 0
        for start, end in self._finder.spans(text):
            self._encode_words(text[place:start], ids)
            ids.append(self._added[text[start:end]])
            place = end
        self._encode_words(text[place:], ids)
        return ids

    def _encode_words(self, text: str, ids: list[int]) -> None:
        text = text.replace(" ", SPACE)
        first = 0
        while first < len(text):
            end = self._word_end(text, first)
            word = text[first:end]
            known = self._words.get(word)
            if known is None:
                known = tuple(self._merge(self._symbols(word)))
                if len(word) <= CACHED_CHARS:
                    if len(self._words) >= CACHED_WORDS:
                        self._words.clear()
                    self._words[word] = known
            ids.extend(known)
            first = end

    def _word_end(self, text: str, first: int) -> int:
        """Where the next word begins: at a space after something else, which no piece holds together."""
        end = first
        while True:
            end = text.find(SPACE, end + 1)
            if end < 0:
                return len(text)
            before = text[end - 1]
            if before != SPACE and before not in self._glued:
                return end

    def _symbols(self, word: str) -> list[int]:
        """One id for each character that is a piece, and one for each byte of the others."""
        ids: list[int] = []
        for char in word:
            code = ord(char)
            place = bisect_left(self._chars, code)
            if place < len(self._chars) and self._chars[place] == code:
                ids.append(self._char_ids[place])
            else:
                ids.extend(self._byte_ids[byte] for byte in char.encode())
        return ids

    def _rank(self, left: int, right: int) -> int:
        """Of the merge of two ids; −1: there is none."""
        pair = left << self._id_bits | right
        slot, mask = slot_of(pair, self._slots_log2), (1 << self._slots_log2) - 1
        while (found := self._slots[slot]) != _EMPTY:
            if found >> self._rank_bits == pair:
                return found & ((1 << self._rank_bits) - 1)
            slot = (slot + 1) & mask
        return -1

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge neighbours, the lowest rank first, the leftmost of equals, until none is left to merge.

        As `tokenizers` does it: an entry of the queue counts as long as its place still makes the same id.
        """
        count = len(ids)
        following, before = list(range(1, count + 1)), list(range(-1, count - 1))
        ranks = [self._rank(ids[at], ids[at + 1]) for at in range(count - 1)]
        ranks.append(-1)  # of each place and the next
        queue = [rank << _POSITIONS | at for at, rank in enumerate(ranks) if rank >= 0]
        heapq.heapify(queue)
        while queue:
            entry = heapq.heappop(queue)
            at, made = entry & ((1 << _POSITIONS) - 1), self._merged[entry >> _POSITIONS]
            if ranks[at] < 0 or self._merged[ranks[at]] != made:
                continue  # merged away in the meantime, or next to something else
            right = following[at]
            ids[at], ids[right], ranks[right] = made, -1, -1
            after = following[at] = following[right]
            left = before[at]
            if after < count:
                before[after] = at
                self._queue(queue, ranks, at, ids[at], ids[after])
            else:
                ranks[at] = -1
            if left >= 0:
                self._queue(queue, ranks, left, ids[left], ids[at])
        return [token for token in ids if token >= 0]

    def _queue(self, queue: list[int], ranks: list[int], at: int, left: int, right: int) -> None:
        rank = ranks[at] = self._rank(left, right)
        if rank >= 0:
            heapq.heappush(queue, rank << _POSITIONS | at)
