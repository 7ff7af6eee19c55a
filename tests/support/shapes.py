"""Text configurations that several tests hold against transformers, as changes of the tiny checkpoint's."""

from __future__ import annotations

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"

VALUES_ARE_KEYS: dict[str, Any] = dict(
    num_hidden_layers=4,
    layer_types=[SLIDING, FULL] * 2,
    num_kv_shared_layers=1,
    num_key_value_heads=2,
    num_global_key_value_heads=1,
    attention_k_eq_v=True,
)
NOTHING_SHARED_OWN_HEAD: dict[str, Any] = dict(
    num_hidden_layers=4,
    layer_types=[SLIDING, FULL] * 2,
    num_kv_shared_layers=0,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
LAST_SOURCE_SLIDING: dict[str, Any] = dict(
    num_hidden_layers=5,
    layer_types=[FULL, SLIDING, SLIDING, SLIDING, FULL],
    num_kv_shared_layers=2,
    num_key_value_heads=2,
    use_double_wide_mlp=False,
)
NO_PER_LAYER_INPUTS: dict[str, Any] = dict(
    num_hidden_layers=4,
    layer_types=[SLIDING, FULL] * 2,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=0,
    final_logit_softcapping=None,
    hidden_activation="silu",
)
