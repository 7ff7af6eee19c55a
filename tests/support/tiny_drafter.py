"""Tiny random drafters for tiny targets, in transformers and as checkpoints.

transformers 5.23.0 cannot build one as it is: its text config wants a layer that owns a cache before it
allows shared ones, and a drafter has none. That check alone is passed by here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4TextConfig

from .tiny_checkpoint import tiny_config

CENTROIDS: dict[str, Any] = dict(use_ordered_embeddings=True, num_centroids=32, centroid_intermediate_top_k=4)


def drafter_config(target: Gemma4TextConfig | None = None, **overrides: Any) -> Gemma4AssistantConfig:
    """Four layers, as wide as two heads. overrides: fields; those of the text_config in `text`."""
    target = target or tiny_config()
    text: dict[str, Any] = dict(
        vocab_size=target.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=target.num_key_value_heads,
        head_dim=16,
        global_head_dim=32,
        sliding_window=target.sliding_window,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        num_kv_shared_layers=4,
        use_double_wide_mlp=False,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        final_logit_softcapping=None,
        max_position_embeddings=4096,
    )
    text |= overrides.pop("text", {})
    fields: dict[str, Any] = dict(backbone_hidden_size=target.hidden_size)
    return Gemma4AssistantConfig(text_config=Gemma4TextConfig(**text), **(fields | overrides))


def random_drafter(config: Gemma4AssistantConfig, seed: int) -> Gemma4AssistantForCausalLM:
    """Weights big enough that every part counts."""
    torch.manual_seed(seed)
    all_shared = property(lambda self: ["reuse"] * self.num_hidden_layers)
    with patch.object(Gemma4TextConfig, "kv_sharing_modes", all_shared):
        drafter = Gemma4AssistantForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        for name, buffer in drafter.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.2)
            elif name.endswith("token_ordering"):
                buffer.copy_(torch.randperm(len(buffer)))
    return drafter


def write_tiny_drafter(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write config and weights to `folder` as transformers names them, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    drafter = random_drafter(drafter_config(**overrides), seed)
    weights = {name: tensor.contiguous().clone() for name, tensor in drafter.state_dict().items()}
    if drafter.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(drafter.config.to_dict(), default=str))
    return folder
