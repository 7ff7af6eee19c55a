"""The dense 12B and 31B go the same way as E2B, by config.json alone; the mixture of experts is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.gemma4_unified import configuration_gemma4_unified, modeling_gemma4_unified

from gemma_edge.export.audio_geometry import parse_audio_model
from gemma_edge.export.geometry import TextModel, parse_text_model, plan_caches
from gemma_edge.export.plan import make_plan, total_bytes
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.trace import trace_decoder, trace_embeddings
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.profile import load_profile

DATA = Path(__file__).parent / "data"
# Layers, hidden, query heads, key/value heads of sliding and of full layers, weights in billions.
DENSE = {"12b": (48, 3840, 16, 8, 1, 11.9), "31b": (60, 5376, 32, 16, 4, 30.7)}


def config_of(name: str, **text: Any) -> dict[str, Any]:
    config = json.loads((DATA / f"gemma-4-{name}.config.json").read_text())
    config["text_config"] |= text
    return config


def model_of(name: str, **text: Any) -> TextModel:
    return parse_text_model(config_of(name, **text), name)


@pytest.mark.parametrize("name", DENSE)
def test_the_shape_is_read(name: str):
    model = model_of(name)
    layers, hidden, heads, sliding_heads, full_heads, _ = DENSE[name]
    assert len(model.layers) == len(model.cached_layers) == layers
    assert (model.geometry.hidden_size, model.geometry.num_attention_heads) == (hidden, heads)
    assert {layer.kv_heads for layer in model.layers if layer.is_sliding} == {sliding_heads}
    assert {layer.kv_heads for layer in model.layers if not layer.is_sliding} == {full_heads}
    assert model.keys_are_values and model.geometry.hidden_size_per_layer_input == 0
    assert model.geometry.max_position_embeddings == 262_144


@pytest.mark.parametrize("name", DENSE)
def test_int4_fits_a_jetson_agx(name: str):
    """Planned at full size, without weights."""
    profile = load_profile("jetson-agx-orin-64gb")
    plan = make_plan(model_of(name), profile, load_recipe("int4"), context=8192)
    weights = sum(weight.shape[0] * weight.shape[1] for weight in plan.weights)
    assert weights / 1e9 == pytest.approx(DENSE[name][5], rel=0.02)
    assert total_bytes(plan.memory) < 0.5 * (profile.memory.budget_mib << 20)


def trace(model: TextModel) -> tuple[int, int]:
    """(attention operators, cache tensors) of the decoder's graph."""
    caches = plan_caches(model, context=8192, sliding_slack=0, dtype="float16")
    graph = trace_decoder(model, caches).graph.graph
    assert [value.name for value in trace_embeddings(model).graph.graph.outputs] == ["inputs_embeds"]
    past = sum((value.name or "").startswith("past_key_values") for value in graph.inputs)
    return sum(node.op_type == "GroupQueryAttention" for node in graph), past


@pytest.mark.parametrize("name", DENSE)
def test_six_layers_of_full_width_are_traced(name: str):
    types = ["sliding_attention"] * 5 + ["full_attention"]
    attention, past = trace(model_of(name, num_hidden_layers=6, layer_types=types))
    assert attention >= 5 and past == 12  # the last layer's may be split in two


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", DENSE)
def test_all_layers_are_traced(name: str):
    layers = DENSE[name][0]
    attention, past = trace(model_of(name))
    assert attention >= layers - 1 and past == 2 * layers


def test_the_unified_text_model_is_the_same_model():
    """transformers has a class of its own for the 12B; on the same weights it gives the same logits."""
    fields: dict[str, Any] = dict(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=8,
        final_logit_softcapping=30.0,
    )
    torch.manual_seed(0)
    plain = Gemma4ForCausalLM(Gemma4TextConfig(**fields, hidden_size_per_layer_input=0)).eval()
    config = configuration_gemma4_unified.Gemma4UnifiedTextConfig(**fields)
    unified = modeling_gemma4_unified.Gemma4UnifiedForCausalLM(config).eval()
    unified.load_state_dict(plain.state_dict(), strict=True)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, unified(ids).logits)
    text = dict(fields, model_type="gemma4_unified_text")
    assert parse_text_model(text, "config").geometry.hidden_size_per_layer_input == 0


def test_the_12b_is_exported_without_its_ears(caplog: pytest.LogCaptureFixture):
    assert parse_audio_model(config_of("12b"), "config.json", text_hidden_size=3840) is None
    assert "the bundle takes text only" in caplog.text


def test_the_mixture_of_experts_is_refused():
    config = config_of("26b-a4b")
    with pytest.raises(ConfigError, match=r"26b: enable_moe_block \(mixture of experts\) .* dense, causal"):
        parse_text_model(copy.deepcopy(config), "26b")
