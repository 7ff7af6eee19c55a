"""What guesses come from: phrases said before, names from the prompt, where copying starts and ends."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.runtime import lookup
from gemma_edge.runtime.lookup import Memory, Table, Text

IDS = st.lists(st.integers(0, 5), max_size=60)


def guessed(text: Text, most: int) -> list[int]:
    return [token for token, _ in islice(text.guesses(), most)]


def ids_of(length: int, seed: int, first: int = 1000) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(first, first + 800) for _ in range(length)]


# Reports of one program: "- NAME, min LOW, max HIGH" in the prompt, "Normal. NAME from LOW to HIGH" answered.
SYSTEM, NAME_IS, MIN, MAX, LINE_END = [1, 2, 3], [10, 11], [12, 13], [14, 15], [16]
SAYS, FROM, TO, DONE = [20, 21, 22, 23], [24, 25], [26], [27, 28]


def report(seed: int) -> tuple[list[int], list[int]]:
    """(prompt, answer) with made-up names and values of several tokens each."""
    drawn = random.Random(seed)
    lines, values = [], []
    for sensor in range(3):
        name, low, high = ([drawn.randrange(100, 900) for _ in range(3)] for _ in range(3))
        lines += [*NAME_IS, *name, *MIN, *low, *MAX, *high, *LINE_END]
        if sensor == 0:
            values = [*SAYS, *name, *FROM, *low, *TO, *high, *DONE]
    return [*SYSTEM, *lines], values


def test_an_earlier_answer_is_guessed():
    memory, answer = Memory(), ids_of(40, seed=1)
    Text(memory, ids_of(20, seed=2)).extend(answer)
    text = Text(memory, ids_of(20, seed=3))
    text.extend(answer[:4])
    assert guessed(text, 30) == answer[4:34]


def test_a_phrase_of_the_prompt_is_guessed():
    prompt = ids_of(60, seed=1)
    text = Text(Memory(), prompt)
    text.extend(prompt[20:22])
    assert guessed(text, 10) == prompt[22:32]
    text.extend([*prompt[22:25], 5, 6])
    assert guessed(text, 3) == []  # nothing is known of this


def test_of_several_places_the_next_one_is_taken():
    prompt = [1, 2, 50, 1, 2, 60, 9, 8, 7, 1, 2, 70]
    text = Text(Memory(), prompt)
    text.extend([9, 8, 7])
    text.extend([5, 1, 2])
    assert guessed(text, 1) == [70]


def test_names_and_values_are_guessed_where_they_were_copied_before():
    """Never seen, but behind what stood before others in earlier prompts; then the text goes on."""
    memory = Memory()
    for seed in range(3):
        prompt, answer = report(seed)
        text = Text(memory, prompt)
        text.extend(answer)
    prompt, answer = report(99)
    text = Text(memory, prompt)
    text.extend(answer[:1])
    assert guessed(text, len(answer) - 1) == answer[1:]


def test_chances_are_what_was_right():
    memory, drawn = Memory(), random.Random(1)
    for _ in range(300):
        text = Text(memory, [])
        text.extend([1, 2, 3, 4, 5 if drawn.random() < 0.9 else 6])
    text = Text(memory, [])
    text.extend([1, 2, 3])
    (token, sure), (other, unsure) = islice(text.guesses(), 2)
    assert token == 4 and sure > 0.97
    assert other == 5 and 0.8 < unsure < 0.97


@given(IDS, st.lists(IDS, min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_guessing_and_pieces_change_nothing(
    prompt: list[int], answers: list[list[int]], drawn: random.Random
):
    """Guesses depend on the tokens alone: not on how many came at once, nor on what was guessed between."""
    whole, pieces = Memory(), Memory()
    for answer in answers:
        one, other = Text(whole, prompt), Text(pieces, prompt)
        one.extend(answer)
        at = 0
        while at < len(answer):
            guessed(other, drawn.randint(0, 9))
            size = drawn.randint(1, 9)
            other.extend(answer[at : at + size])
            at += size
        found = [list(islice(text.guesses(), 12)) for text in (one, other)]
        assert found[0] == found[1]
        assert all(0 < chance <= 1 for _, chance in found[0])
        prompt = [*prompt, *answer]


@given(IDS, st.lists(st.integers(0, 5), min_size=2, max_size=40))
@settings(max_examples=300, deadline=None)
def test_the_longest_match_is_found(prompt: list[int], answer: list[int]):
    def match(place: int) -> int:
        length = 0
        while (
            length < min(place, len(answer), lookup.LONGEST_MATCH)
            and prompt[place - 1 - length] == answer[-1 - length]
        ):
            length += 1
        return length

    after = len(prompt) // 2
    place, length = Text(Memory(), prompt)._find(answer, after)
    matches = {at: match(at) for at in range(2, len(prompt) + 1)}
    longest = max(matches.values(), default=0)
    if longest < 2:
        assert length == 0
    else:
        best = [at for at, found in matches.items() if found == longest]
        assert length == longest
        assert place == next((at for at in best if at >= after), best[0])


def test_tables_forget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lookup, "KEPT", 100)
    table: Table[int, int] = Table()
    for key in range(1000):
        table.learn(-1, 7)
        table.learn(key, key)
        assert len(table._new) + len(table._old) <= 200
    assert table.get(0) is None and table.get(-1) == (7, lookup.MOST_TIMES) and table.get(999) == (999, 1)
    table.learn(-1, 8)
    assert table.get(-1) == (8, 1)


@pytest.mark.parametrize("prompt", [[], [1], [1, 2], [1, 1, 1, 1]])
def test_short_prompts(prompt: Sequence[int]):
    text = Text(Memory(), prompt)
    assert guessed(text, 3) == []
    for token in (1, 1, 2, 1, 1, 2):
        text.extend([token])
        guessed(text, 20)
