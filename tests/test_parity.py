"""Exported graphs against transformers: logits, greedy tokens, chunked prefill, prefill skip; nine shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma4ForCausalLM

from .support.graph_runner import GraphRunner
from .support.shapes import (
    LAST_SOURCE_SLIDING,
    NO_PER_LAYER_INPUTS,
    NOTHING_SHARED_OWN_HEAD,
    VALUES_ARE_KEYS,
)

PROMPT, STEPS = 40, 64
TOLERANCE = 1e-3
S, F = "sliding_attention", "full_attention"
SWAPPED_ROPE = {
    S: dict(rope_type="proportional", rope_theta=5000.0, partial_rotary_factor=0.5, factor=2.0),
    F: dict(rope_type="default", rope_theta=50_000.0),
}

# name -> (text config, slack of the sliding caches)
SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "e2b": (dict(), 4),
    "nothing shared, own head": (NOTHING_SHARED_OWN_HEAD, 0),
    "last source sliding": (LAST_SOURCE_SLIDING, 0),
    "last source sliding, slack": (
        dict(num_hidden_layers=5, layer_types=[S, F, S, S, F], num_kv_shared_layers=2, sliding_window=11),
        7,
    ),
    "no per-layer inputs": (NO_PER_LAYER_INPUTS, 2),
    "values are keys": (VALUES_ARE_KEYS, 4),
    "all full": (dict(num_hidden_layers=3, layer_types=[F] * 3, num_kv_shared_layers=1), 4),
    "one layer": (dict(num_hidden_layers=1, layer_types=[F], num_kv_shared_layers=0), 4),
    "window beyond the context, swapped rope": (
        dict(
            num_hidden_layers=4,
            layer_types=[S, F] * 2,
            num_kv_shared_layers=2,
            sliding_window=200,
            rope_parameters=SWAPPED_ROPE,
            head_dim=32,
        ),
        8,
    ),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(
    request: pytest.FixtureRequest, tiny_bundle
) -> tuple[GraphRunner, Gemma4ForCausalLM, np.ndarray, list[int]]:
    """(graphs, transformers' model, its logits for every position of a text, the text's ids)"""
    config, slack = SHAPES[request.param]
    tiny = tiny_bundle(model=dict(seed=7, **config), slack=slack)
    model = tiny.reference()
    ids = torch.randint(3, 500, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(5))
    return GraphRunner(tiny.path), model, logits_of(model, ids[0].tolist()), ids[0].tolist()


def logits_of(model: Gemma4ForCausalLM, ids: list[int]) -> np.ndarray:
    """(tokens, vocab). Asking for hidden states switches off transformers' own prefill skip, which fails
    without per-layer inputs.
    """
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).logits[0].numpy()


@pytest.mark.parametrize(
    "chunks",
    [[PROMPT] + [1] * STEPS, [1] * 30, [7, 13, 11, 9] + [1] * 12, [33, 1, 1, 12, 1, 1, 5, 5], [60]],
    ids=["prompt and decode", "token by token", "ragged", "chunks after decoding", "in one piece"],
)
def test_logits(shape, chunks: list[int]):
    graphs, _, expected, ids = shape
    graphs.reset()
    for count in chunks:
        done = graphs.tokens
        logits = graphs.run(ids[done : done + count])
        assert logits.shape == (1, expected.shape[1])
        assert np.abs(logits[-1] - expected[done + count - 1]).max() < TOLERANCE


def test_prefill_skip_leaves_the_same_caches(shape):
    """Chunks that keep no row return none, and what follows is as if they had been computed in full."""
    graphs, _, expected, ids = shape
    graphs.reset()
    for count in (9, 1, 17, 8):
        done = graphs.tokens
        assert graphs.run(ids[done : done + count], keep=0).shape == (0, expected.shape[1])
    for count in (5, 1, 1, 1):
        done = graphs.tokens
        logits = graphs.run(ids[done : done + count], keep=1)
        assert np.abs(logits[-1] - expected[done + count - 1]).max() < TOLERANCE


def test_greedy_tokens(shape):
    graphs, model, _, ids = shape
    graphs.reset()
    text = ids[:PROMPT]
    logits = graphs.run(text)
    for _ in range(STEPS):
        text = [*text, int(logits[-1].argmax())]
        logits = graphs.run(text[-1:])
    # Each token given those before it: equal everywhere means the same greedy text.
    best = logits_of(model, text).argmax(-1).tolist()
    assert text[PROMPT:] == best[PROMPT - 1 : -1]


def test_several_kept_rows(tiny_bundle):
    """logits_to_keep = k is exact while the sliding caches still hold window + k - 1 tokens."""
    tiny = tiny_bundle(model=dict(seed=7), slack=4)
    graphs = GraphRunner(tiny.path)
    ids = list(range(100, 140))
    expected = logits_of(tiny.reference(), ids)
    # Window 8, capacity 12: after 40 tokens 10 are resident, see `_resident` in export/modules/step.py.
    logits = graphs.run(ids, keep=3)
    assert np.abs(logits - expected[-3:]).max() < TOLERANCE
