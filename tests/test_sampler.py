"""The sampler against transformers' logits processors, and its own promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemma_edge.runtime.errors import RequestError
from gemma_edge.runtime.sampler import Sampler, SamplingParams, candidates

VOCAB = 3000


def logits_of(seed: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


def reference(logits: np.ndarray, seen: list[int], params: SamplingParams) -> np.ndarray:
    """The distribution that transformers draws from."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        steps.append(MinPLogitsWarper(params.min_p))
    scores = steps(torch.tensor([seen]), torch.tensor(logits)[None].clone())
    return scores.softmax(-1)[0].numpy()


def ours(logits: np.ndarray, seen: list[int], params: SamplingParams) -> np.ndarray:
    """The distribution that our sampler draws from."""
    logits = logits.copy()
    sampler = Sampler(params, seen, VOCAB)
    if params.repetition_penalty != 1.0:
        sampler._penalise(logits)
    ids, weights = candidates(logits, params)
    probabilities = np.zeros(VOCAB)
    probabilities[ids] = weights / weights.sum()
    return probabilities


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    scale=st.sampled_from([0.1, 1.0, 3.0, 10.0]),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 1, 5, 64, 1000, 5000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
def test_same_distribution_as_transformers(seed, scale, temperature, top_k, top_p, min_p, penalty):
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    logits = logits_of(seed, scale)
    seen = [3, 7, 7, 100, int(logits.argmax())]
    expected, got = reference(logits, seen, params), ours(logits, seen, params)
    # A candidate at the very edge of top-p may fall on either side of it by rounding: at most one may differ.
    assert np.count_nonzero((expected > 0) != (got > 0)) <= 1
    assert np.abs(expected - got).sum() < 2e-3


def test_ties_at_the_kth_place_stay_in():
    logits = np.zeros(VOCAB, np.float32)
    logits[[5, 6, 7]] = 2.0
    params = SamplingParams(temperature=1.0, top_k=2)
    assert np.allclose(ours(logits, [], params), reference(logits, [0], params))
    assert set(candidates(logits, params)[0]) == {5, 6, 7}


def test_greedy_is_argmax_and_copies_nothing():
    logits = logits_of(1)
    logits.flags.writeable = False  # a write would raise
    sampler = Sampler(SamplingParams(), [1, 2], VOCAB)
    assert sampler.pick(logits) == logits.argmax()
    assert sampler._seen.size == 0


def test_greedy_with_a_penalty_counts_what_it_picked():
    logits = np.full(VOCAB, -1.0, np.float32)
    logits[[10, 11, 12]] = [5.0, 4.9, 4.8]
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [1], VOCAB)
    assert [sampler.pick(logits.copy()) for _ in range(3)] == [10, 11, 12]


def test_drawn_frequencies_follow_the_distribution():
    logits = np.full(VOCAB, -30.0, np.float32)
    logits[[1, 2, 3]] = np.log([0.6, 0.3, 0.1])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=5), [], VOCAB)
    drawn = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=VOCAB) / 4000
    assert np.allclose(drawn[[1, 2, 3]], [0.6, 0.3, 0.1], atol=0.03)


def test_a_seed_repeats_and_no_seed_does_not():
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=2.0, seed=seed), [], VOCAB)
        return [sampler.pick(logits_of(i)) for i in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_logits_that_are_not_numbers_are_an_error():
    logits = logits_of(2)
    logits[9] = np.nan
    with pytest.raises(FloatingPointError):
        Sampler(SamplingParams(), [], VOCAB).pick(logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"temperature": "hot"},
    ],
)
def test_parameters_out_of_range_are_refused(wrong):
    with pytest.raises(RequestError) as error:
        SamplingParams(**wrong)
    assert error.value.code == "invalid_request"
    assert next(iter(wrong)) in str(error.value)
