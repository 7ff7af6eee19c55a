"""131,072 tokens of context: rotary tables, caches and integer lengths hold at the far end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding, apply_rotary_pos_emb

from gemma_edge.export.geometry import Rope
from gemma_edge.export.modules.values import rope_table

from .support.graph_runner import GraphRunner
from .support.tiny_bundles import export_tiny

CONTEXT = 131_072
PAST = CONTEXT - 80  # tokens that the caches are filled with
S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize("head_dim", [16, 64, 256])
def test_rotary_tables_are_those_of_transformers_to_the_last_bit(head_dim: int):
    """One bit of a frequency is an angle of 0.015 at position 131,000."""
    config = Gemma4TextConfig(head_dim=head_dim, global_head_dim=2 * head_dim, num_hidden_layers=6)
    rotary = Gemma4TextRotaryEmbedding(config)
    positions = torch.cat([torch.arange(600), torch.arange(CONTEXT - 300, CONTEXT)])
    for layer_type, rope, width in (
        ("sliding_attention", Rope(1e4, 1.0, 1.0), head_dim),
        ("full_attention", Rope(1e6, 0.25, 1.0), 2 * head_dim),
    ):
        expected = rotary(torch.zeros(1), positions[None], layer_type)
        for table, wanted in zip(rope_table(rope, width, CONTEXT), expected, strict=True):
            assert table.shape == (CONTEXT, width // 2)
            assert torch.equal(torch.from_numpy(table)[positions], wanted[0, :, : width // 2])


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> tuple[GraphRunner, np.ndarray, list[int]]:
    """(graphs with PAST tokens in their caches, transformers' logits for 80 more tokens, their ids)"""
    shape = dict(
        num_hidden_layers=6,
        layer_types=[S, S, F, S, S, F],
        num_kv_shared_layers=3,
        head_dim=32,
        global_head_dim=64,
        sliding_window=16,
        max_position_embeddings=CONTEXT,
    )
    folder = tmp_path_factory.mktemp("far")
    tiny = export_tiny(folder, model=dict(seed=3, **shape), context=CONTEXT, budget_mib=4096)
    model = tiny.reference()
    past = made_up_past(model)
    ids = torch.randint(300, 500, (1, CONTEXT - PAST), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    for index, (keys, values) in past.items():
        cache.update(keys, values, index)
    with torch.no_grad():
        expected = model(ids, past_key_values=cache, output_hidden_states=True).logits[0].numpy()
    graphs = GraphRunner(tiny.path)
    fill(graphs, past)
    return graphs, expected, ids[0].tolist()


def made_up_past(model: Gemma4ForCausalLM) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> keys and values of PAST made-up tokens, normalised and rotated as the layer would."""
    random = torch.Generator().manual_seed(2)
    past = {}
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            if attention.is_kv_shared_layer:
                continue
            drawn = torch.randn(2, 1, 1, PAST, attention.head_dim, generator=random)
            positions = model.model.rotary_emb(drawn, torch.arange(PAST)[None], attention.layer_type)
            keys = apply_rotary_pos_emb(attention.k_norm(drawn[0]), *positions)
            past[index] = (keys, attention.v_norm(drawn[1]))
    return past


def fill(graphs: GraphRunner, past: dict[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put `past` where the graph expects it: a window-sized cache has the last L(T) tokens, from row 0 on."""
    graphs.reset()
    graphs.tokens = PAST
    window = graphs.bundle.manifest.geometry.sliding_window
    for cache, tensors in zip(graphs.bundle.manifest.caches.layers, past.values(), strict=True):
        resident = PAST
        if cache.layer_type == S:
            group = cache.capacity - window + 1
            resident = PAST - group * -(-(PAST - cache.capacity) // group)
        for part, tensor in zip(("key", "value"), tensors, strict=True):
            buffer = graphs.caches[f"past_key_values.{cache.index}.{part}"]
            buffer[:, :, :resident] = tensor[:, :, PAST - resident :].numpy()


def test_decoding_up_to_the_last_position(far):
    """A chunk, a chunk that keeps no row, then token by token to position 131,071."""
    graphs, expected, ids = far
    for count, keep in ((20, 1), (33, 0), *[(1, 1)] * 27):
        first = graphs.tokens - PAST
        logits = graphs.run(ids[first : first + count], keep=keep)
        if keep:
            assert np.abs(logits[-1] - expected[first + count - 1]).max() < 1e-3
    assert graphs.tokens == CONTEXT
