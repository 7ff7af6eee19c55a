"""What may come next, and how likely: looked up in the prompt and in earlier answers. Knows ids only.

Answers of one program are alike: mostly the same text, with names and numbers copied from the prompt. So four
are asked for the next token, each of which can be right where the others know nothing:

    said     what followed the last tokens before, in this answer and in earlier ones
    copied   the prompt's next token, while the answer copies from it
    jump     where copying begins: earlier answers, after the same last tokens, copied what stood behind
             certain tokens in their prompts; what stands behind these in this one
    resumed  where copying ends: how earlier answers went on when the prompt's next token was this one

How often each was right, alone, with or against the others, is counted with every token of every answer,
guessed or not: that is the chance of a guess. Several in a row are each looked up behind the one before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

SAID, COPIED, JUMP, RESUMED = 1, 2, 4, 8
SAID_LENGTHS = (4, 2, 1)  # tokens by which what was said is found
MOST_TIMES = 4  # how often in a row the same followed is told apart up to here
LONGEST_MATCH = 6  # tokens compared at a place of the prompt
MOST_PLACES = 24  # of the prompt that are compared
BEFORE = 2  # tokens in front of a copied piece, in the answer and in the prompt
KEPT = 4096  # entries of a table; as many older ones go when these are full
FADING = 0.98  # of counts, with each token of the kind
UNKNOWN = 0.5, 1.0  # (right, tried) of an opinion of which nothing is known

Key = TypeVar("Key")
Value = TypeVar("Value")
Tokens = tuple[int, ...]
# Who, found by how many tokens, how many times in a row it was so, the token, its place in the prompt or -1.
Opinion = tuple[int, int, int, int, int]


class Copying(NamedTuple):
    """Where the answer copies from."""

    place: int = 0  # of the prompt's next token
    run: int = 0  # tokens copied so far; 0: none, and `place` is behind the last one that was
    before: Tokens = ()  # the answer's tokens in front of the first one


class Memory:
    """Of one engine: what answers have taught."""

    def __init__(self) -> None:
        self.said: Table[Tokens, int] = Table()  # last tokens -> the one that followed
        self.jumps: Table[Tokens, Tokens] = Table()  # tokens before a copied piece -> those before its source
        self.resumed: Table[Tokens, int] = (
            Table()
        )  # tokens before a piece, the prompt's next -> the answer's next
        self.counts: dict[
            Tokens, tuple[float, float]
        ] = {}  # kind of opinion -> [right, tried]; older ones fade

    def best(self, opinions: Sequence[Opinion]) -> tuple[int, float]:
        """(token, chance that it comes) of the opinion that is right most often."""
        best, token = -1.0, 0
        for said, kind in _kinds(opinions):
            right, tried = self.counts.get(kind, UNKNOWN)
            if right > best * tried:
                best, token = right / tried, said
        return token, best

    def count(self, opinions: Sequence[Opinion], token: int) -> None:
        """`token` came after these opinions."""
        for said, kind in _kinds(opinions):
            right, tried = self.counts.get(kind, UNKNOWN)
            self.counts[kind] = right * FADING + (said == token), tried * FADING + 1


class Text:
    """A prompt and the answer to it so far."""

    def __init__(self, memory: Memory, prompt_ids: Sequence[int]) -> None:
        self._memory = memory
        self._prompt = list(prompt_ids)
        self._places: dict[Tokens, list[int]] = {}  # BEFORE tokens -> the places behind them
        for place, pair in enumerate(zip(self._prompt, self._prompt[1:], strict=False), BEFORE):
            self._places.setdefault(pair, []).append(place)
        self._answer: list[int] = []
        self._copying = Copying()
        self._now = self._opinions(self._answer, self._copying)  # on the next token

    def extend(self, ids: Sequence[int]) -> None:
        """The answer goes on with these tokens."""
        memory, answer = self._memory, self._answer
        for token in ids:
            copying = self._copying
            memory.count(self._now, token)
            for length in SAID_LENGTHS:
                if length <= len(answer):
                    memory.said.learn(tuple(answer[-length:]), token)
            for key in self._resuming(copying):
                memory.resumed.learn(key, token)
            answer.append(token)
            self._copying = self._follow(answer, copying, self._now)
            if self._copying.run <= copying.run:
                self._learn_jump(copying)
            self._now = self._opinions(answer, self._copying)

    def guesses(self) -> Iterator[tuple[int, float]]:
        """The tokens that may follow, and how likely each is, given that those before it are right."""
        answer, copying, opinions = self._answer[-LONGEST_MATCH - BEFORE :], self._copying, self._now
        while opinions:
            token, chance = self._memory.best(opinions)
            yield token, chance
            answer.append(token)
            copying = self._follow(answer, copying, opinions)
            opinions = self._opinions(answer, copying)

    def _opinions(self, answer: list[int], copying: Copying) -> list[Opinion]:
        memory, prompt = self._memory, self._prompt
        opinions: list[Opinion] = []
        for length in SAID_LENGTHS:
            if length <= len(answer) and (said := memory.said.get(tuple(answer[-length:]))):
                opinions.append((SAID, length, said[1], said[0], -1))
                break
        place = copying.place
        if copying.run and place < len(prompt):
            opinions.append((COPIED, min(copying.run, LONGEST_MATCH), 0, prompt[place], place))
        for length in range(min(BEFORE, len(answer)), 0, -1):
            jump = memory.jumps.get(tuple(answer[-length:]))
            if jump and (places := self._places.get(jump[0])):
                source = places[bisect_left(places, place) % len(places)]  # the next one, or the first
                if source < len(prompt) and not (copying.run and source == place):
                    opinions.append((JUMP, length, jump[1], prompt[source], source))
                break
        for key in self._resuming(copying):
            if resumed := memory.resumed.get(key):
                opinions.append((RESUMED, len(key), resumed[1], resumed[0], -1))
                break
        return opinions

    def _resuming(self, copying: Copying) -> tuple[Tokens, ...]:
        """What `resumed` is found by, the more certain one first."""
        if not copying.run or copying.place >= len(self._prompt):
            return ()
        token = self._prompt[copying.place]
        return ((*copying.before, token), (token,))

    def _follow(self, answer: list[int], copying: Copying, opinions: Sequence[Opinion]) -> Copying:
        """Where the answer copies from after its last token, about which there were these opinions."""
        token = answer[-1]
        for who, _, _, said, place in opinions:
            if said == token and who == COPIED:
                return Copying(place + 1, copying.run + 1, copying.before)
            if said == token and who == JUMP:
                return Copying(place + 1, 1, tuple(answer[-BEFORE - 1 : -1]))
        place, match = self._find(answer, copying.place)
        if not match:
            return Copying(copying.place)
        return Copying(place, match, tuple(answer[-match - BEFORE : -match]))

    def _find(self, answer: list[int], after: int) -> tuple[int, int]:
        """(place, match): where most of the last tokens stand in the prompt, from `after` on if there."""
        places = self._places.get(tuple(answer[-BEFORE:]), ())
        first = bisect_left(places, after)
        best, found = 0, 0
        for place in (*places[first : first + MOST_PLACES], *places[:first][:MOST_PLACES]):
            match = BEFORE
            while (
                match < min(LONGEST_MATCH, place, len(answer))
                and self._prompt[place - 1 - match] == answer[-1 - match]
            ):
                match += 1
            if match > best:
                best, found = match, place
        return found, best

    def _learn_jump(self, copied: Copying) -> None:
        """A piece was copied as far as this."""
        start = copied.place - copied.run
        if copied.run >= BEFORE and start >= BEFORE:
            source = tuple(self._prompt[start - BEFORE : start])
            for length in range(1, len(copied.before) + 1):
                self._memory.jumps.learn(copied.before[-length:], source)


class Table(Generic[Key, Value]):
    """What followed last, and how many times in a row; the least recently used half goes when it is full."""

    def __init__(self) -> None:
        self._new: dict[Key, tuple[Value, int]] = {}
        self._old: dict[Key, tuple[Value, int]] = {}

    def get(self, key: Key) -> tuple[Value, int] | None:
        return self._new.get(key) or self._old.get(key)

    def learn(self, key: Key, value: Value) -> None:
        known = self.get(key)
        times = min(known[1] + 1, MOST_TIMES) if known and known[0] == value else 1
        if len(self._new) >= KEPT:
            self._old, self._new = self._new, {}
        self._new[key] = value, times


def _kinds(opinions: Sequence[Opinion]) -> list[tuple[int, Tokens]]:
    """Each opinion's token and what it is counted by: its own kind, who says the same, who says anything."""
    same: dict[int, int] = {}
    asked = 0
    for who, _, _, token, _ in opinions:
        same[token] = same.get(token, 0) | who
        asked |= who
    return [(token, (who, length, times, same[token], asked)) for who, length, times, token, _ in opinions]
