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
