"""131,072 tokens of context: rotary tables, caches and integer lengths hold at the far end."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

from gemma_edge.export.geometry import Rope
from gemma_edge.export.modules.values import rope_table

CONTEXT = 131_072


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
