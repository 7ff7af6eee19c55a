"""The same bundle in onnxruntime-genai: logits and greedy tokens of transformers, across the window."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest
import torch

PROMPT, STEPS = 20, 40
S, F = "sliding_attention", "full_attention"
MODEL = dict(seed=7, num_hidden_layers=6, layer_types=[S, S, F] * 2, num_kv_shared_layers=3)


def generate(folder: Path, prompt: list[int], count: int) -> tuple[list[int], list[np.ndarray]]:
    """Greedy tokens and the logits that they were picked from."""
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    tokens, logits = [], []
    while not generator.is_done():
        logits.append(np.array(generator.get_logits()).reshape(-1).copy())
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, logits


def expected(tiny, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Logits of transformers at the places where `tokens` were picked."""
    with torch.no_grad():
        logits = tiny.reference()(torch.tensor([prompt + tokens])).logits[0].numpy()
    return logits[len(prompt) - 1 : -1]


@pytest.mark.parametrize("slack", [0, 4])
def test_greedy_tokens_are_those_of_transformers(tiny_bundle, slack: int):
    tiny = tiny_bundle(model=MODEL, slack=slack, context=96)
    prompt = list(range(300, 300 + PROMPT))
    tokens, logits = generate(tiny.path, prompt, STEPS)
    reference = expected(tiny, prompt, tokens)
    assert len(tokens) == STEPS
    # min_length makes genai mask the stop tokens; all others must agree.
    stops = list(tiny.bundle.manifest.tokens.eos)
    reference[:, stops] = -np.inf
    assert tokens == reference.argmax(-1).tolist()
    finite = np.isfinite(reference)
    assert np.abs(np.stack(logits)[finite] - reference[finite]).max() < 1e-3


def test_quantized_with_half_precision_caches(tiny_bundle):
    """genai allocates the cache type that the graph asks for; it gives what our own calls give."""
    from .support.graph_runner import GraphRunner

    tiny = tiny_bundle(model=MODEL, recipe="int4", kv="float16", context=96)
    prompt = list(range(300, 300 + PROMPT))
    tokens, logits = generate(tiny.path, prompt, 12)
    graphs = GraphRunner(tiny.path)
    ours = graphs.run(prompt)[-1]
    for token, theirs in zip(tokens, logits, strict=True):
        keep = np.isfinite(theirs) & (theirs > -1e30)
        assert np.abs(theirs - ours)[keep].max() < 0.05
        ours = graphs.run([token])[-1]


def test_the_configuration_names_the_caches(tiny_bundle):
    tiny = tiny_bundle(model=MODEL, slack=4, context=96)
    config = json.loads((tiny.path / "genai_config.json").read_text())
    decoder = config["model"]["decoder"]
    assert config["model"]["type"] == "gemma4_text" and decoder["filename"] == "text.onnx"
    assert decoder["num_hidden_layers"] == 3 and decoder["sliding_window"]["layers"] == [0, 1]
    assert decoder["sliding_window"]["cache_slack"] == 4
    assert config["model"]["eos_token_id"] == [1, 16, 9]
    assert config["search"]["past_present_share_buffer"] is True
