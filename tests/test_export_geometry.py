"""config.json to geometry: the Hub's layouts are read, what cannot be reproduced is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gemma_edge.export.geometry import parse_text_model, plan_caches
from gemma_edge.runtime.errors import ConfigError

S, F = "sliding_attention", "full_attention"


def e2b(**changes: Any) -> dict[str, Any]:
    text = dict(
        model_type="gemma4_text",
        vocab_size=262144,
        vocab_size_per_layer_input=262144,
        hidden_size=1536,
        hidden_size_per_layer_input=256,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_attention_heads=8,
        num_key_value_heads=1,
        num_global_key_value_heads=None,
        head_dim=256,
        global_head_dim=512,
        sliding_window=512,
        layer_types=[F if (i + 1) % 5 == 0 else S for i in range(35)],
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        final_logit_softcapping=30.0,
        rms_norm_eps=1e-6,
        max_position_embeddings=131072,
        enable_moe_block=False,
        attention_bias=False,
        attention_k_eq_v=False,
        use_bidirectional_attention=None,
        hidden_activation="gelu_pytorch_tanh",
        dtype="bfloat16",
    )
    return text | changes


def parse(config: dict[str, Any]):
    return parse_text_model(config, "config.json")


def test_e2b():
    model = parse(dict(model_type="gemma4", text_config=e2b(), audio_config={}, vision_config={}))
    assert model == parse(e2b())
    assert [layer.index for layer in model.cached_layers] == list(range(15))
    assert model.last_cached == 14
    assert {layer.source for layer in model.layers[15:]} == {13, 14}
    assert model.layers[34].source == 14 and model.layers[33].source == 13
    assert model.layers[14].head_dim == 512 and model.layers[13].head_dim == 256
    assert model.layers[14].intermediate_size == 6144 and model.layers[15].intermediate_size == 12288
    assert model.rope[F].rotated_fraction == 0.25 and model.rope[S].theta == 10_000
    assert model.dtype == "bfloat16"


def test_caches_of_e2b():
    caches = plan_caches(parse(e2b()), context=32768, sliding_slack=16, dtype="float16")
    sliding = [cache for cache in caches.layers if cache.layer_type == S]
    full = [cache for cache in caches.layers if cache.layer_type == F]
    assert len(sliding) == 12 and {cache.capacity for cache in sliding} == {528}
    assert len(full) == 3 and {cache.capacity for cache in full} == {32768}
    assert caches.size_bytes == 2 * 2 * (12 * 528 * 256 + 3 * 32768 * 512)
    eight_bits = plan_caches(parse(e2b()), context=32768, sliding_slack=64, dtype="int8")
    assert eight_bits.size_bytes <= 110e6
    assert plan_caches(parse(e2b()), context=520, sliding_slack=16, dtype="int8").layers[0].capacity == 520
    assert plan_caches(parse(e2b()), context=100, sliding_slack=16, dtype="int8").layers[0].capacity == 512


def test_the_file_that_transformers_writes_says_the_same():
    """transformers saves `per_layer_config` where the Hub's files have `global_head_dim`."""
    from transformers import Gemma4TextConfig

    config = e2b(attention_k_eq_v=True, num_global_key_value_heads=2, num_key_value_heads=4)
    saved = Gemma4TextConfig(**config).to_dict()
    assert "per_layer_config" in saved and "global_head_dim" not in saved
    model = parse(saved)
    assert model.layers == parse(config).layers
    assert model.layers[14].kv_heads == 2 and model.layers[13].kv_heads == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(enable_moe_block=True, num_experts=8), "enable_moe_block"),
        (dict(attention_bias=True), "attention_bias"),
        (dict(use_bidirectional_attention="all"), "use_bidirectional_attention='all'"),
        (dict(hidden_activation="quick_gelu"), "hidden_activation='quick_gelu'"),
        (dict(model_type="gemma3_text"), "model_type 'gemma3_text'"),
        (dict(model_type="gemma4"), "text_config"),
        (dict(layer_types=[S] * 34), "layer_types has 34"),
        (dict(layer_types=["chunked_attention"] * 35), "chunked_attention"),
        (dict(rope_parameters={S: dict(rope_type="default", rope_theta=1e4)}), F),
        (
            dict(rope_parameters={t: dict(rope_type="yarn", rope_theta=1e4, factor=4.0) for t in (S, F)}),
            "'yarn'",
        ),
        (dict(rope_parameters={t: dict(rope_theta=1e4, beta_fast=32) for t in (S, F)}), "beta_fast"),
        (dict(quantization_config=dict(quant_method="awq")), "'awq'"),
        (dict(num_kv_shared_layers=35), "num_kv_shared_layers"),
        (dict(num_kv_shared_layers=31), "no source layer"),
        (dict(num_key_value_heads=3), "3 key/value heads"),
        (dict(hidden_size=None), "hidden_size is None"),
        (dict(vocab_size="many"), "vocab_size is 'many'"),
        (dict(per_layer_config={"4": dict(sliding_window=3)}), "per_layer_config[4]"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=re.escape(named)):
        parse(e2b(**changes))


def test_text_attends_causally_even_if_images_do_not():
    assert parse(e2b(use_bidirectional_attention="vision")).layers == parse(e2b()).layers
