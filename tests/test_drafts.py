"""Guessed tokens: caches and logits as token by token whatever was right, the same answers, bounded cost."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import pytest

from gemma_edge.runtime import drafts
from gemma_edge.runtime.drafts import Guesser, Pace
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.lookup import Text
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.session import Session

from .support.tiny_bundles import TinyBundle

WINDOW, CHUNK, CONTEXT = 8, 16, 192


def ids_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(23, 500, length).tolist()


# What the session runs and takes back.


@pytest.mark.parametrize("device", [{}, dict(slack=1, kv="float16"), dict(slack=13, kv="int8")], ids=str)
def test_whatever_is_taken_back_nothing_is_left_of_it(tiny_bundle, device: dict):
    """Drafts of all lengths that can be taken back, right up to any point, against one token at a time."""
    tiny: TinyBundle = tiny_bundle(context=CONTEXT, chunk=CHUNK, **device)
    session = Session(tiny.bundle, threads=1, longest_draft=15)
    ids = ids_of(CONTEXT, seed=6)
    session.prefill(np.asarray(ids[:5]), 0, last=True)
    plain = [session.logits.copy()]
    states = {}
    for position in range(5, CONTEXT):
        session.step(ids[position], position)
        plain.append(session.logits.copy())
        states[position + 1] = session.caches.copy(position + 1)
    bound = 2e-3 if not device else 0.3  # rounded caches: a last bit may differ
    for seed in range(2):
        drawn = random.Random(seed)
        session.prefill(np.asarray(ids[:5]), 0, last=True)
        position, lengths = 5, set()
        while position < CONTEXT:
            most = min(session.caches.ahead(position + 1), 15)
            count = drawn.randint(0, most)
            right = drawn.randint(0, count)
            draft = ids[position + 1 : position + 1 + right] + ids_of(count - right, seed=position)
            session.step(ids[position], position, draft)
            for row in range(right + 1):
                off = np.abs(session.logits_after(row) - plain[position - 4 + row]).max()
                assert off < bound, f"position {position}, row {row} of {count + 1}: {off}"
            position += right + 1
            lengths.add(count)
            for name, rows in session.caches.copy(position).items():
                assert rows.shape == states[position][name].shape
                wide = states[position][name].astype(np.float32)
                assert np.abs(rows.astype(np.float32) - wide).max() <= (1e-3 if not device else 2), name
        assert max(lengths) >= min(device.get("slack", 4), 9)


# Answers.


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def engines(tiny: TinyBundle) -> tuple[Engine, Engine]:
    """One token at a time; with guesses."""
    plain, guessing = Engine(tiny.bundle), Engine(tiny.bundle, speculate=8)
    plain.eos = guessing.eos = frozenset()
    return plain, guessing


def oracle(monkeypatch: pytest.MonkeyPatch, whole: Sequence[int], length: int, seed: int) -> None:
    """Make engines guess from `whole`, a prompt of `length` and its answer; wrong now and then."""
    drawn = random.Random(seed)
    said: list[int] = []

    def guess(guesser: Guesser, most: int) -> list[int]:
        assert said == whole[length : length + len(said)]
        draft = list(whole[length + len(said) :][: drawn.randint(0, max(min(most, 4), 0))])
        if draft and drawn.random() < 0.5:
            draft[drawn.randrange(len(draft))] = 7
        return draft

    monkeypatch.setattr(Guesser, "may_guess", True)
    monkeypatch.setattr(Guesser, "extend", lambda guesser, tokens: said.extend(tokens))
    monkeypatch.setattr(Guesser, "guess", guess)


PARAMS = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.3),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, seed=3),
    SamplingParams(temperature=1.2, min_p=0.02, repetition_penalty=1.1, seed=4),
]


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "penalty", "drawn", "drawn, penalty"])
@pytest.mark.parametrize("length", [3, 30, 100])
def test_answers_are_those_of_one_token_at_a_time(engines, params, length: int, monkeypatch):
    """Drawn ones as well: each token takes one draw, whether it was guessed or not."""
    plain, guessing = engines
    prompt = ids_of(length, seed=length)
    answer = list(plain.generate(prompt, params, max_new_tokens=60))
    oracle(monkeypatch, prompt + answer, length, seed=length)
    assert list(guessing.generate(prompt, params, max_new_tokens=60)) == answer
    stats = guessing.last_stats
    assert 10 < stats.accepted < stats.drafted
    assert stats.decode_steps + stats.accepted == stats.new_tokens - 1 == 59
    assert stats.finish == "length"


def test_a_stop_id_ends_the_answer_inside_a_pass(engines, monkeypatch: pytest.MonkeyPatch):
    plain, guessing = engines
    prompt = ids_of(20, seed=1)
    answer = list(plain.generate(prompt, max_new_tokens=40))
    for at in range(3, 12):
        oracle(monkeypatch, prompt + answer, len(prompt), seed=at)
        monkeypatch.setattr(guessing, "eos", frozenset({answer[at]}))
        assert list(guessing.generate(prompt, max_new_tokens=40)) == answer[: answer.index(answer[at])]
        assert guessing.last_stats.finish == "stop"


def test_no_guess_goes_beyond_the_wanted_or_the_context(engines, monkeypatch: pytest.MonkeyPatch):
    plain, guessing = engines
    for prompt_length, wanted in ((20, 1), (20, 2), (20, 5), (CONTEXT - 12, None), (CONTEXT - 1, None)):
        prompt = ids_of(prompt_length, seed=2)
        answer = list(plain.generate(prompt, max_new_tokens=wanted))
        oracle(monkeypatch, [*prompt, *answer, *ids_of(20)], len(prompt), seed=5)
        assert list(guessing.generate(prompt, max_new_tokens=wanted)) == answer
        assert guessing.last_stats.new_tokens == (wanted or CONTEXT - prompt_length)


class Saying:
    """A sampler that picks what it is told, whatever the model says."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def pick(self, logits: np.ndarray) -> int:
        return next(self._tokens)

    def pick_from(self, session: Session) -> int:
        return next(self._tokens)


def say(engine: Engine, monkeypatch: pytest.MonkeyPatch, prompt: list[int], tokens: list[int]) -> int:
    """Have the engine answer with `tokens`; how many guesses were right."""
    monkeypatch.setattr("gemma_edge.runtime.engine.Sampler", lambda *args: Saying([*tokens, *ids_of(9)]))
    monkeypatch.setattr(Pace, "has_credit", True)
    monkeypatch.setattr(Pace, "choose", lambda pace, chances, most: len([*islice(chances, most)]))
    assert list(engine.generate(prompt, max_new_tokens=len(tokens))) == tokens
    return engine.last_stats.accepted


def test_what_stood_in_the_prompt_is_guessed(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(tiny.bundle, speculate=8)
    engine.eos = frozenset()
    phrase = ids_of(30, seed=3)
    prompt = [*ids_of(20, seed=4), *phrase, *ids_of(20, seed=5), *phrase[:4]]
    assert say(engine, monkeypatch, prompt, phrase[4:]) >= 18


def test_what_was_answered_before_is_guessed(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(tiny.bundle, speculate=8)
    engine.eos = frozenset({3})
    answer = ids_of(30, seed=3)
    assert say(engine, monkeypatch, ids_of(20, seed=4), answer) == 0
    assert say(engine, monkeypatch, ids_of(20, seed=5), answer) >= 20


def test_no_slack_no_guesses(tiny_bundle):
    tiny = tiny_bundle(context=CONTEXT, chunk=CHUNK, slack=0)
    engine = Engine(tiny.bundle, speculate=8)
    assert engine._drafts is None
    list(engine.generate(ids_of(20), max_new_tokens=10))
    assert engine.last_stats.drafted == 0


def test_the_slack_is_the_longest_draft(tiny: TinyBundle):
    assert Engine(tiny.bundle, speculate=8)._drafts.pace.longest == 4
    assert Engine(tiny.bundle, speculate=2)._drafts.pace.longest == 2


# What guessing costs.

World = Callable[[int], float]  # seconds of a pass by rows


def play(pace: Pace, tokens: int, seconds: World, rate: float, chance: float = 0.9, seed: int = 0):
    """(seconds spent, passes) for so many tokens. rate: of right guesses; chance: what is said of it."""
    drawn = random.Random(seed)
    spent, made, passes = 0.0, 0, 0
    while made < tokens:
        found = drawn.randint(0, 20)
        count = pace.choose([chance] * pace.longest, found) if pace.has_credit else 0
        right = 0
        while right < count and drawn.random() < rate:
            right += 1
        took = seconds(count + 1) * drawn.uniform(0.95, 1.05)
        pace.learn(count, right, took)
        spent += took
        made += right + 1
        passes += 1
    return spent, passes


def bound_by_memory(rows: int) -> float:
    return 0.1 + 0.006 * (rows - 1)


def bound_by_arithmetic(rows: int) -> float:
    return 0.1 * rows


def bad_at_two(rows: int) -> float:
    """A machine whose passes of few rows are far slower than of one."""
    return 0.1 if rows == 1 else 0.4 + 0.001 * rows


@pytest.mark.parametrize("seconds", [bound_by_memory, bound_by_arithmetic, bad_at_two])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_wrong_guesses_cost_three_in_a_hundred_at_most(seconds: World, rate: float):
    for longest in (1, 4, 8, 15):
        pace = Pace(longest)
        tokens = 600
        spent, _ = play(pace, tokens, seconds, rate)
        plain = tokens * seconds(1)
        # And one pass of the longest draft, which is lost before anything is known.
        assert spent <= plain * 1.03 + 1.05 * (seconds(longest + 1) - seconds(1)) + 0.01 * plain


def test_right_guesses_pay():
    pace = Pace(8)
    spent, passes = play(pace, 600, bound_by_memory, 0.9)
    assert spent < 0.35 * 600 * bound_by_memory(1)
    assert passes < 240


def test_a_change_is_noticed_both_ways():
    pace = Pace(8)
    plain = 600 * bound_by_memory(1)
    play(pace, 600, bound_by_memory, 0.0)
    spent, _ = play(pace, 600, bound_by_memory, 0.9)
    assert spent < 0.5 * plain
    spent, _ = play(pace, 600, bound_by_memory, 0.0)
    assert spent < 1.04 * plain
    # A machine on which guesses stop paying: each number of rows has to be timed again.
    play(pace, 600, bound_by_memory, 0.9)
    spent, _ = play(pace, 600, bound_by_arithmetic, 0.5, 0.5)
    assert spent < 1.2 * 600 * bound_by_arithmetic(1)
    play(pace, 600, bound_by_arithmetic, 0.5, 0.5)
    spent, _ = play(pace, 600, bound_by_arithmetic, 0.5, 0.5)
    assert spent < 1.04 * 600 * bound_by_arithmetic(1)


def test_an_interrupted_pass_is_not_held_against_guessing():
    pace = Pace(8)
    play(pace, 300, bound_by_memory, 0.9)
    pace.learn(6, 6, 60.0)
    spent, _ = play(pace, 600, bound_by_memory, 0.9)
    assert spent < 0.45 * 600 * bound_by_memory(1)


def test_few_good_guesses_are_not_held_up_by_many_bad_ones():
    """As many as bring most tokens a second: those of which the last is worth its row."""
    pace = Pace(8)
    play(pace, 300, bound_by_memory, 0.9)
    assert pace.choose([0.9] * 8, 8) == 8
    assert pace.choose([0.9, 0.9, 0.9, 0.01, 0.9, 0.9], 8) == 3
    assert pace.choose([0.01, 0.9, 0.9], 8) == 0 or pace._tries_again
    play(pace, 300, bound_by_arithmetic, 0.9)
    assert pace.choose([0.9, 0.9, 0.9], 8) <= 1


def test_what_looks_free_because_times_vary_is_not():
    """Passes of one row that were interrupted make those of two look cheap: the bound holds all the same."""
    pace, drawn = Pace(8), random.Random(0)
    spent = plain = 0.0
    for _ in range(1500):
        count = pace.choose([0.9] * 8, 8) if pace.has_credit else 0
        noise = drawn.expovariate(10) + (drawn.uniform(0.5, 3) if drawn.random() < 0.02 else 0)
        pace.learn(count, 0, bound_by_memory(count + 1) * (1 + noise))
        spent += bound_by_memory(count + 1)
        plain += bound_by_memory(1)
    assert spent <= plain * 1.03


def test_nothing_is_guessed_before_one_token_was_timed():
    pace = Pace(8)
    assert pace.choose([0.9], 8) == 0
    pace.learn(0, 0, 0.1)
    assert pace.choose([0.9], 8) == 1
    assert pace.choose([], 8) == pace.choose([0.9], 0) == pace.choose([0.9], -1) == 0
    assert drafts.MOST_DRAFT == 15


def test_reading_is_paid_from_credit_but_never_keeps_guesses_from_being_tried():
    pace = Pace(8)
    pace.learn(0, 0, 0.1)
    pace.charge(0.03)
    assert pace._credit_s == pytest.approx(0.07)
    pace.charge(5.0)  # an answer far longer than its passes are slow
    assert pace._credit_s == 0.0
    assert pace.choose([0.9], 8) == 0 and not pace.has_credit
    for _ in range(20):
        pace.learn(0, 0, 0.1)
    assert pace.has_credit and pace.choose([0.9], 8) == 1
    pace.learn(8, 0, 0.9)
    in_debt = pace._credit_s
    pace.charge(1.0)
    assert pace._credit_s == in_debt < 0


def test_what_is_read_late_is_learned_all_the_same(tiny: TinyBundle, monkeypatch: pytest.MonkeyPatch):
    """Without credit nothing is read before the answer ends; the next answer is guessed from it."""
    engine, prompt, tokens = Engine(tiny.bundle, speculate=8), ids_of(12, seed=1), ids_of(40, seed=2)
    engine.eos = frozenset()
    read: list[int] = []
    extend = Text.extend
    monkeypatch.setattr(Text, "extend", lambda text, ids: (read.append(len(ids)), extend(text, ids)))
    with monkeypatch.context() as patched:
        patched.setattr(Pace, "has_credit", False)
        patched.setattr("gemma_edge.runtime.engine.Sampler", lambda *args: Saying([*tokens, *ids_of(9)]))
        assert list(engine.generate(prompt, max_new_tokens=len(tokens))) == tokens
    assert read == [len(tokens)]
    assert say(engine, monkeypatch, prompt, tokens) > 20
