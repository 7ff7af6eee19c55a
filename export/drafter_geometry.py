"""Reads the shape of a `gemma4_assistant` drafter from its config.json, and checks that it fits its target.

A drafter is a small Gemma 4 whose layers all attend to the target's caches: to the last sliding and the last
full-attention layer that own one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ..runtime.bundle import Geometry, LayerType
from ..runtime.errors import ConfigError
from .geometry import Layer, TextModel, parse_text_model, read_config

MODEL_TYPE = "gemma4_assistant"
OF_ANOTHER = "this drafter belongs to another model; give the one that was made for the target"
LAYER_NAMES: dict[LayerType, str] = {"sliding_attention": "sliding", "full_attention": "full-attention"}


@dataclass(frozen=True)
class Centroids:
    """A head in two steps: the nearest groups of tokens, then the tokens in them."""

    count: int
    chosen: int


@dataclass(frozen=True)
class DrafterModel:
    """Everything that the drafter's config.json says, and the target's part of it."""

    text: TextModel  # its layers are numbered after the target's, whose layers are their sources
    target: TextModel
    centroids: Centroids | None  # None: every token is scored

    @property
    def sources(self) -> dict[LayerType, Layer]:
        """The target's layer that each type of layer reads."""
        return {layer.layer_type: self.target.layers[layer.source] for layer in self.text.layers}

    def cache_index(self, layer_type: LayerType) -> int:
        """Number in `past_key_values.{index}.key`."""
        return self.target.cached_layers.index(self.sources[layer_type])


def read_drafter(folder: Path, target: TextModel) -> DrafterModel:
    """The drafter in `folder`. Raises ConfigError saying why it is none, or none of this target."""
    return parse_drafter(read_config(folder), str(folder / "config.json"), target)


def parse_drafter(config: Any, where: str, target: TextModel) -> DrafterModel:
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else config
        raise ConfigError(f"{where}: model_type {found!r}, expected {MODEL_TYPE}: this is no drafter")
    text_config = config.get("text_config")
    if not isinstance(text_config, dict):
        raise ConfigError(f"{where}: a drafter without a text_config")
    if config.get("quantization_config") or text_config.get("quantization_config"):
        raise ConfigError(f"{where}: quantization_config: expected a drafter that is not quantized yet")
    if text_config.get("hidden_size_per_layer_input") or text_config.get("use_double_wide_mlp"):
        raise ConfigError(f"{where}: a drafter has neither per-layer inputs nor double-wide MLPs")
    # Parsed as a model that owns its caches, to which the target's are then given.
    own = text_config | dict(
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=None,
        tie_word_embeddings=config.get("tie_word_embeddings", True),
    )
    text = parse_text_model(own, where)
    _check_fits(config, text, target, where)
    shape = text.geometry
    layers = tuple(_reading(layer, target, where) for layer in text.layers)
    # transformers lets a drafter see one token more than the window: its own place is behind the caches.
    seen = msgspec.structs.replace(shape, sliding_window=shape.sliding_window + 1)
    return DrafterModel(replace(text, layers=layers, geometry=seen), target, _centroids(config, where, shape))


def _check_fits(config: dict[str, Any], text: TextModel, target: TextModel, where: str) -> None:
    pairs = {
        "vocab_size": (text.geometry.vocab_size, target.geometry.vocab_size),
        "backbone_hidden_size": (config.get("backbone_hidden_size"), target.geometry.hidden_size),
        "sliding_window": (text.geometry.sliding_window, target.geometry.sliding_window),
    }
    for name, (found, wanted) in pairs.items():
        if found != wanted:
            raise ConfigError(
                f"{where}: {name} is {found}, the target's {name.removeprefix('backbone_')} is {wanted}: "
                f"{OF_ANOTHER}"
            )


def _reading(layer: Layer, target: TextModel, where: str) -> Layer:
    """The layer, reading the target's last cache of its type."""
    same = [other for other in target.cached_layers if other.layer_type == layer.layer_type]
    if not same:
        raise ConfigError(
            f"{where}: layer {layer.index} is a {LAYER_NAMES[layer.layer_type]} layer, the target has none"
        )
    source = same[-1]
    if (layer.head_dim, layer.kv_heads) != (source.head_dim, source.kv_heads):
        raise ConfigError(
            f"{where}: layer {layer.index} has {layer.kv_heads} key/value heads of {layer.head_dim}, the "
            f"target's {LAYER_NAMES[layer.layer_type]} layers have {source.kv_heads} of {source.head_dim}: "
            f"{OF_ANOTHER}"
        )
    return replace(layer, index=len(target.layers) + layer.index, source=source.index)


def _centroids(config: dict[str, Any], where: str, shape: Geometry) -> Centroids | None:
    if not config.get("use_ordered_embeddings"):
        return None
    count, chosen = config.get("num_centroids", 2048), config.get("centroid_intermediate_top_k", 32)
    if not isinstance(count, int) or count < 1 or shape.vocab_size % count:
        raise ConfigError(f"{where}: num_centroids is {count!r}, expected a divisor of {shape.vocab_size}")
    if not isinstance(chosen, int) or not 1 <= chosen <= count:
        raise ConfigError(f"{where}: centroid_intermediate_top_k is {chosen!r}, expected 1 to {count}")
    return Centroids(count, chosen)
