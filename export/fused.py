"""Products of one input that CUDA graphs run as one: queries, keys and values of a layer with a cache.

Their weights lie one after the other in the data file, so that one matrix of all rows and three of some rows
are the same bytes: `decoder.onnx` has the three, `decoder_cuda.onnx` the one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .plan import PlannedWeight
from .recipes import Recipe

PARTS = ("q_proj", "k_proj", "v_proj")
FUSED = "qkv_proj"
INNERS = ("float16",)  # the number types of products on CUDA


def groups(weights: Sequence[PlannedWeight]) -> list[tuple[PlannedWeight, ...]]:
    """All weights in order, those that can be one matrix together."""
    by_name = {weight.name: weight for weight in weights}
    found: dict[str, tuple[PlannedWeight, ...]] = {}
    for weight in weights:
        names = _names(weight.name)
        group = tuple(by_name[name] for name in names if name in by_name)
        if len(group) == len(PARTS) and _are_alike(group):
            found[group[0].name] = group
        else:
            found[weight.name] = (weight,)
    return list(found.values())


def fused_layers(weights: Sequence[PlannedWeight], recipe: Recipe) -> frozenset[int]:
    """Layers whose queries, keys and values are one product; none if each is rounded by its own scale."""
    if recipe.activation_scales:
        return frozenset()
    return frozenset(int(group[0].name.split(".")[1]) for group in groups(weights) if len(group) > 1)


def fused(parts: Sequence[PlannedWeight]) -> PlannedWeight:
    """One matrix of all rows."""
    rows = sum(part.shape[0] for part in parts)
    name = parts[0].name.replace(PARTS[0], FUSED)
    return replace(parts[0], name=name, shape=(rows, parts[0].shape[1]), held=None)


def _names(name: str) -> Iterator[str]:
    """Of the group that a weight may belong to, the first part first."""
    for part in PARTS:
        if f".self_attn.{part}." in name:
            yield from (name.replace(part, other) for other in PARTS)


def _are_alike(group: tuple[PlannedWeight, ...]) -> bool:
    first = group[0]
    return first.inner in INNERS and all(
        (other.storage, other.inner, other.gain, other.file, other.shape[1])
        == (first.storage, first.inner, first.gain, first.file, first.shape[1])
        for other in group
    )
