"""Reads a Gemma 4 text model's shape from config.json alone; knows nothing of weights, devices or graphs.

What the exporter cannot reproduce is refused by name: a silently wrong model is worse than none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from ..runtime.bundle import Caches, Geometry, KvDtype, LayerCache, LayerType
from ..runtime.errors import ConfigError
from .qat import Quantization, parse_quantization

ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu", "relu")
KV_BYTES: dict[KvDtype, int] = {"float32": 4, "float16": 2, "int8": 1}

# The 12B is "unified": other eyes and ears, the same text model, without per-layer inputs.
WHOLE_TYPES = ("gemma4", "gemma4_unified")
TEXT_TYPES = ("gemma4_text", "gemma4_unified_text")

SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    index: int
    layer_type: LayerType
    head_dim: int
    kv_heads: int
    intermediate_size: int
    source: int  # the layer whose keys and values it attends to; its own index unless it is KV-shared

    @property
    def is_shared(self) -> bool:
        return self.source != self.index

    @property
    def is_sliding(self) -> bool:
        return self.layer_type == SLIDING


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: frequencies theta^(-2i/head_dim), zero past the rotated part."""

    theta: float
    rotated_fraction: float
    factor: float  # frequencies are divided by it


@dataclass(frozen=True)
class TextModel:
    """Everything config.json says that changes the computation."""

    geometry: Geometry
    layers: tuple[Layer, ...]
    rope: dict[LayerType, Rope]
    rms_norm_eps: float
    activation: str
    keys_are_values: bool  # full-attention layers have no v_proj: values are the keys before norm and rotary
    tied_head: bool
    dtype: str
    quantization: Quantization | None = None  # what the checkpoint holds quantized

    @property
    def cached_layers(self) -> tuple[Layer, ...]:
        """The layers that own a cache, in order: `past_key_values.{i}` is the i-th of them."""
        return tuple(layer for layer in self.layers if not layer.is_shared)

    @property
    def last_cached(self) -> int:
        """Above this layer's keys and values nothing is written: prefill needs only the kept rows there."""
        return self.cached_layers[-1].index


def read_text_model(folder: Path) -> TextModel:
    """The model of `folder`/config.json. Raises ConfigError naming what is missing or unsupported."""
    return parse_text_model(read_config(folder), str(folder / "config.json"))


def read_config(folder: Path) -> Any:
    """The content of `folder`/config.json. Raises ConfigError."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise ConfigError(
            f"{path}: cannot be read ({cause.strerror}); expected a Hugging Face checkpoint"
        ) from cause
    except ValueError as cause:
        raise ConfigError(f"{path}: not valid JSON: {cause}") from cause


def parse_text_model(config: dict[str, Any], where: str) -> TextModel:
    """`config`: the content of a config.json, with or without a `text_config` inside."""
    text = _text_config(config, where)
    _refuse_unsupported(text, where)
    reader = _Reader(text, where)
    layer_types = _layer_types(reader)
    overrides = _full_attention_overrides(reader, layer_types)
    layers = _layers(reader, layer_types, overrides)
    full = next((layer for layer in layers if not layer.is_sliding), layers[-1])
    geometry = Geometry(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=len(layers),
        num_attention_heads=reader.integer("num_attention_heads"),
        num_key_value_heads=reader.integer("num_key_value_heads"),
        head_dim=reader.integer("head_dim"),
        global_head_dim=full.head_dim,
        sliding_window=reader.integer("sliding_window"),
        layer_types=layer_types,
        num_kv_shared_layers=reader.integer("num_kv_shared_layers", 0, least=0),
        hidden_size_per_layer_input=reader.integer(
            "hidden_size_per_layer_input", 0 if _is_unified(text) else 256, least=0
        ),
        vocab_size_per_layer_input=reader.integer("vocab_size_per_layer_input", reader.integer("vocab_size")),
        final_logit_softcapping=text.get("final_logit_softcapping"),
        max_position_embeddings=reader.integer("max_position_embeddings", 131_072),
    )
    # The whole model's word counts, as in transformers.
    tied_head = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)))
    return TextModel(
        geometry=geometry,
        layers=layers,
        rope={layer_type: _rope(text, layer_type, where) for layer_type in sorted(set(layer_types))},
        rms_norm_eps=float(text.get("rms_norm_eps", 1e-6)),
        activation=text.get("hidden_activation", "gelu_pytorch_tanh"),
        keys_are_values=bool(text.get("attention_k_eq_v")),
        tied_head=tied_head,
        dtype=str(text.get("dtype") or config.get("dtype") or config.get("torch_dtype") or "unknown"),
        quantization=_quantization(config, text, where, tied_head),
    )


def plan_caches(model: TextModel, *, context: int, sliding_slack: int, dtype: KvDtype) -> Caches:
    """The caches of one sequence: full-attention layers hold `context` tokens, sliding ones window + slack.

    A sliding cache is never longer than the context unless the window is: the op needs capacity >= window.
    """
    window = model.geometry.sliding_window
    sliding_capacity = max(window, min(window + sliding_slack, context))
    layers = tuple(
        LayerCache(
            index=number,
            layer_type=layer.layer_type,
            kv_heads=layer.kv_heads,
            capacity=sliding_capacity if layer.is_sliding else context,
            head_dim=layer.head_dim,
        )
        for number, layer in enumerate(model.cached_layers)
    )
    values = sum(2 * cache.kv_heads * cache.capacity * cache.head_dim for cache in layers)
    return Caches(context=context, dtype=dtype, layers=layers, size_bytes=values * KV_BYTES[dtype])


class _Reader:
    """Reads integers out of the text config, naming file and field when one is missing or wrong."""

    def __init__(self, text: dict[str, Any], where: str) -> None:
        self.text = text
        self.where = where

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.text.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{self.where}: {key} is {value!r}, expected an integer of at least {least}")
        return value


def _text_config(config: Any, where: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: expected a JSON object")
    model_type = config.get("model_type")
    if model_type in WHOLE_TYPES:
        text = config.get("text_config")
        if not isinstance(text, dict):
            raise ConfigError(f"{where}: model_type {model_type} without a text_config")
    elif model_type in TEXT_TYPES:
        text = config
    else:
        known = ", ".join((*WHOLE_TYPES, *TEXT_TYPES))
        raise ConfigError(f"{where}: model_type {model_type!r} is not supported, expected one of {known}")
    return text


def _quantization(
    config: dict[str, Any], text: dict[str, Any], where: str, tied_head: bool
) -> Quantization | None:
    found = config.get("quantization_config") or text.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: quantization_config is {found!r}, expected an object")
    return parse_quantization(found, where, is_multimodal=text is not config, tied_head=tied_head)


def _is_unified(text: dict[str, Any]) -> bool:
    return text.get("model_type") == "gemma4_unified_text"


def _refuse_unsupported(text: dict[str, Any], where: str) -> None:
    def refuse(what: str) -> None:
        raise ConfigError(
            f"{where}: {what} is not supported; expected a dense, causal text model (E2B, E4B, 12B, 31B)"
        )

    if text.get("enable_moe_block"):
        refuse("enable_moe_block (mixture of experts)")
    if text.get("attention_bias"):
        refuse("attention_bias")
    # "vision" makes image tokens attend to each other; text stays causal, and a bundle is text only.
    if text.get("use_bidirectional_attention") not in (None, False, "vision"):
        refuse(f"use_bidirectional_attention={text['use_bidirectional_attention']!r}")
    if (activation := text.get("hidden_activation", ACTIVATIONS[0])) not in ACTIVATIONS:
        refuse(f"hidden_activation={activation!r} (expected one of {', '.join(ACTIVATIONS)})")


def _layer_types(reader: _Reader) -> tuple[LayerType, ...]:
    count = reader.integer("num_hidden_layers")
    types = reader.text.get("layer_types")
    if types is None:
        types = [SLIDING if (index + 1) % 6 else FULL for index in range(count)]
    if len(types) != count:
        raise ConfigError(
            f"{reader.where}: layer_types has {len(types)} entries, num_hidden_layers is {count}"
        )
    for layer_type in types:
        if layer_type not in get_args(LayerType):
            raise ConfigError(f"{reader.where}: layer type {layer_type!r} is not supported")
    # transformers makes the last layer full attention, whatever is written.
    return (*types[:-1], FULL)


def _full_attention_overrides(
    reader: _Reader, layer_types: tuple[LayerType, ...]
) -> dict[int, dict[str, int]]:
    """Layer index -> {head_dim, num_key_value_heads} that differ from the common ones.

    The Hub's files have `global_head_dim` and `num_global_key_value_heads`, newer ones `per_layer_config`.
    """
    per_layer = reader.text.get("per_layer_config")
    if per_layer is None:
        override = {"head_dim": reader.integer("global_head_dim", 512)}
        if reader.text.get("attention_k_eq_v") and reader.text.get("num_global_key_value_heads"):
            override["num_key_value_heads"] = reader.integer("num_global_key_value_heads")
        return {index: override for index, layer_type in enumerate(layer_types) if layer_type == FULL}
    supported = {"head_dim", "num_key_value_heads"}
    for index, override in per_layer.items():
        if unknown := set(override) - supported:
            raise ConfigError(
                f"{reader.where}: per_layer_config[{index}] sets {sorted(unknown)}, not supported"
            )
    return {int(index): override for index, override in per_layer.items()}


def _layers(
    reader: _Reader, layer_types: tuple[LayerType, ...], overrides: dict[int, dict[str, int]]
) -> tuple[Layer, ...]:
    count = len(layer_types)
    first_shared = count - reader.integer("num_kv_shared_layers", 0, least=0)
    if first_shared < 1:
        raise ConfigError(f"{reader.where}: num_kv_shared_layers leaves no layer with keys and values")
    intermediate = reader.integer("intermediate_size")
    heads = reader.integer("num_attention_heads")
    layers: list[Layer] = []
    for index, layer_type in enumerate(layer_types):
        shared = index >= first_shared
        source = index
        if shared:
            same = [other for other in range(first_shared) if layer_types[other] == layer_type]
            if not same:
                raise ConfigError(
                    f"{reader.where}: KV-shared layer {index} ({layer_type}) has no source layer"
                )
            source = same[-1]
        override = overrides.get(index, {})
        layer = Layer(
            index=index,
            layer_type=layer_type,
            head_dim=override.get("head_dim", reader.integer("head_dim")),
            kv_heads=override.get("num_key_value_heads", reader.integer("num_key_value_heads")),
            intermediate_size=intermediate * (2 if shared and reader.text.get("use_double_wide_mlp") else 1),
            source=source,
        )
        if heads % layer.kv_heads:
            raise ConfigError(
                f"{reader.where}: layer {index} has {layer.kv_heads} key/value heads for {heads} heads; "
                "expected a divisor"
            )
        if shared and (layer.head_dim, layer.kv_heads) != (layers[source].head_dim, layers[source].kv_heads):
            raise ConfigError(
                f"{reader.where}: KV-shared layer {index} differs in shape from its source {source}"
            )
        layers.append(layer)
    return tuple(layers)


def _rope(text: dict[str, Any], layer_type: LayerType, where: str) -> Rope:
    defaults: dict[str, dict[str, Any]] = {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    given = cast(dict[str, Any], text.get("rope_parameters") or defaults).get(layer_type)
    if not isinstance(given, dict) or "rope_theta" not in given:
        raise ConfigError(f"{where}: rope_parameters has no rope_theta for {layer_type}")
    known = {"rope_type", "rope_theta", "partial_rotary_factor", "factor"}
    if unknown := set(given) - known:
        raise ConfigError(f"{where}: rope_parameters of {layer_type} has {sorted(unknown)}, not supported")
    match given.get("rope_type", "default"):
        case "default":
            return Rope(float(given["rope_theta"]), 1.0, 1.0)
        case "proportional":
            rotated = float(given.get("partial_rotary_factor", 1.0))
            return Rope(float(given["rope_theta"]), rotated, float(given.get("factor", 1.0)))
        case other:
            raise ConfigError(f"{where}: rope_type {other!r} of {layer_type} is not supported")
