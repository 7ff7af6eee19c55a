"""The engine against transformers, and what it promises about state, length, stopping and cancelling."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from gemma_edge.runtime.engine import Engine, SamplingParams
from gemma_edge.runtime.errors import RequestError

from .support.cancelling import SetAfter
from .support.tiny_bundles import TinyBundle

WINDOW, CHUNK, CONTEXT = 8, 16, 192
Expected = Callable[..., list[int]]


@pytest.fixture(scope="module")
def tiny(tiny_bundle) -> TinyBundle:
    return tiny_bundle(context=CONTEXT, chunk=CHUNK)


@pytest.fixture(scope="module")
def engine(tiny: TinyBundle) -> Engine:
    return Engine(tiny.bundle)


@pytest.fixture(scope="module")
def expected(tiny: TinyBundle) -> Expected:
    """transformers' greedy answer, the stop id included if it comes."""
    torch.set_num_threads(1)  # so small a model only waits for threads
    model = tiny.reference()

    def generate(prompt: Sequence[int], new_tokens: int, **options) -> list[int]:
        with torch.no_grad():
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
            )
        return ids[0, len(prompt) :].tolist()

    return generate


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(23, 512, length).tolist()


@pytest.fixture
def endless(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """No id stops it."""
    monkeypatch.setattr(engine, "eos", frozenset())
    return engine


# Below, at and above the window, one chunk, whole chunks, ragged ends; the answer crosses the window as well.
@pytest.mark.parametrize(
    "length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 13, CHUNK - 1, CHUNK, CHUNK + 1, 33, 100, 128]
)
def test_greedy_tokens_are_transformers_tokens(endless: Engine, expected: Expected, length: int):
    prompt = prompt_of(length, seed=length)
    assert list(endless.generate(prompt, max_new_tokens=40)) == expected(prompt, 40, eos_token_id=None)


@pytest.mark.parametrize("chunk", [1, 3, WINDOW, CHUNK])
def test_chunk_size_changes_nothing(endless: Engine, chunk: int, monkeypatch: pytest.MonkeyPatch):
    prompt = prompt_of(70, seed=9)
    whole = list(endless.generate(prompt, max_new_tokens=20))
    monkeypatch.setattr(endless._session, "chunk", chunk)
    assert list(endless.generate(prompt, max_new_tokens=20)) == whole


def test_stop_ids_end_as_in_transformers(engine: Engine, expected: Expected, monkeypatch: pytest.MonkeyPatch):
    prompt = prompt_of(20, seed=1)
    stop = expected(prompt, 30, eos_token_id=None)[12]
    monkeypatch.setattr(engine, "eos", frozenset({stop}))
    answer = expected(prompt, 30, eos_token_id=[stop])
    assert answer[-1] == stop
    assert list(engine.generate(prompt, max_new_tokens=30)) == answer[:-1]
    stats = engine.last_stats
    assert (stats.finish, stats.new_tokens, stats.prompt_tokens) == ("stop", len(answer) - 1, 20)


def test_the_stop_ids_are_the_checkpoints(engine: Engine, tiny: TinyBundle):
    assert engine.eos == set(tiny.reference().config.eos_token_id)


def test_repetition_penalty_is_transformers(endless: Engine, expected: Expected):
    prompt = prompt_of(30, seed=5)
    got = list(endless.generate(prompt, SamplingParams(repetition_penalty=1.5), max_new_tokens=30))
    assert got == expected(prompt, 30, eos_token_id=None, repetition_penalty=1.5)
    assert got != expected(prompt, 30, eos_token_id=None)


def test_a_seed_repeats(endless: Engine):
    params = SamplingParams(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, seed=4)
    first = list(endless.generate(prompt_of(9), params, max_new_tokens=25))
    assert first == list(endless.generate(prompt_of(9), params, max_new_tokens=25))
    other = SamplingParams(temperature=1.5, top_k=50, top_p=0.95, min_p=0.01, seed=5)
    assert first != list(endless.generate(prompt_of(9), other, max_new_tokens=25))


def test_nothing_leaks_from_one_generation_into_the_next(endless: Engine):
    """Caches are not cleared: fill them with a long conversation, then with values no attention survives."""
    prompt = prompt_of(11, seed=2)
    alone = list(endless.generate(prompt, max_new_tokens=30))
    list(endless.generate(prompt_of(150, seed=3), max_new_tokens=40))
    assert list(endless.generate(prompt, max_new_tokens=30)) == alone
    for value in endless._session.caches.values.values():
        value.numpy()[...] = np.nan
    assert list(endless.generate(prompt, max_new_tokens=30)) == alone
    for value in endless._session.caches.values.values():
        value.numpy()[...] = 0


def test_the_context_can_be_filled_to_the_last_token(endless: Engine, expected: Expected):
    prompt = prompt_of(CONTEXT - 10)
    assert list(endless.generate(prompt, max_new_tokens=10)) == expected(prompt, 10, eos_token_id=None)
    assert endless.last_stats.finish == "length"
    assert len(list(endless.generate(prompt_of(CONTEXT - 1)))) == 1
    assert len(list(endless.generate(prompt))) == 10  # by default: what fits


@pytest.mark.parametrize(
    ("length", "new_tokens"),
    [(CONTEXT, None), (CONTEXT, 1), (CONTEXT + 100, None), (CONTEXT - 10, 11), (1, CONTEXT)],
)
def test_too_much_for_the_context_is_refused_at_once(engine: Engine, length: int, new_tokens: int | None):
    with pytest.raises(RequestError) as error:
        engine.generate(prompt_of(length), max_new_tokens=new_tokens)
    assert error.value.code == "context_length_exceeded"
    assert str(length) in str(error.value) and str(CONTEXT) in str(error.value)


@pytest.mark.parametrize(("prompt", "new_tokens"), [([], 5), ([-1], 5), ([512], 5), ([3], 0), ([3], -1)])
def test_impossible_requests_are_refused_at_once(engine: Engine, prompt: list[int], new_tokens: int):
    with pytest.raises(RequestError) as error:
        engine.generate(prompt, max_new_tokens=new_tokens)
    assert error.value.code == "invalid_request"


def test_cancelling_between_chunks_runs_no_further_chunk(endless: Engine, monkeypatch: pytest.MonkeyPatch):
    ran: list[int] = []
    run = endless._session.prefill
    monkeypatch.setattr(
        endless._session,
        "prefill",
        lambda ids, position, **rest: (ran.append(position), run(ids, position, **rest)),
    )
    assert list(endless.generate(prompt_of(100), max_new_tokens=5, cancel=SetAfter(2))) == []
    assert ran == [0, CHUNK]
    stats = endless.last_stats
    assert (stats.finish, stats.new_tokens, stats.ttft_s) == ("cancelled", 0, 0.0)


def test_cancelling_between_tokens(endless: Engine):
    cancel = threading.Event()
    tokens = endless.generate(prompt_of(10), max_new_tokens=50, cancel=cancel)
    got = [next(tokens) for _ in range(3)]
    cancel.set()
    assert list(tokens) == []
    assert (endless.last_stats.finish, endless.last_stats.new_tokens) == ("cancelled", len(got))


def test_closing_a_generation_early_counts_as_cancelled(endless: Engine):
    tokens = endless.generate(prompt_of(10), max_new_tokens=50)
    next(tokens)
    tokens.close()
    assert (endless.last_stats.finish, endless.last_stats.new_tokens) == ("cancelled", 1)


def test_an_overtaken_generation_cannot_go_on(endless: Engine):
    old = endless.generate(prompt_of(10), max_new_tokens=50)
    next(old)
    new = list(endless.generate(prompt_of(12), max_new_tokens=5))
    stats = endless.last_stats
    with pytest.raises(RuntimeError, match="another generation"):
        next(old)
    assert endless.last_stats is stats
    assert list(endless.generate(prompt_of(12), max_new_tokens=5)) == new


def test_statistics_add_up(endless: Engine):
    list(endless.generate(prompt_of(40), max_new_tokens=12))
    stats = endless.last_stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_steps) == (40, 12, 11)
    assert 0 < stats.prefill_s <= stats.ttft_s
    assert stats.decode_tokens_per_s == pytest.approx(11 / stats.decode_s)
    assert stats.prefill_tokens_per_s == pytest.approx(40 / stats.prefill_s)
