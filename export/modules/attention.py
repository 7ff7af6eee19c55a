"""Attention of one layer over its own cache or a source's, in the three forms that prefill skip needs."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.bundle import KvDtype
from ..geometry import Layer, Rope, TextModel
from . import ops
from .constants import Constants, ReadTensor
from .reads import CacheReads, attend
from .step import Lengths, Step
from .values import cache_scales, rope_table

Cache = tuple[Tensor, Tensor]  # keys and values, (1, kv_heads, capacity, head_dim) each


class Attention(nn.Module):
    """Rotary grouped-query attention with normalised heads and scale 1. inner: its number type."""

    def __init__(self, model: TextModel, layer: Layer, inner: torch.dtype = torch.float32) -> None:
        super().__init__()
        shape, eps = model.geometry, model.rms_norm_eps
        self.layer, self.eps, self.heads, self.inner = layer, eps, shape.num_attention_heads, inner
        self.window = shape.sliding_window if layer.is_sliding else None
        self.q_proj = ops.Linear(shape.hidden_size, self.heads * layer.head_dim, inner)
        self.q_norm = ops.RMSNorm(layer.head_dim, eps, inner)
        self.o_proj = ops.Linear(self.heads * layer.head_dim, shape.hidden_size, inner)
        if not layer.is_shared:
            width = layer.kv_heads * layer.head_dim
            self.k_proj = ops.Linear(shape.hidden_size, width, inner)
            self.k_norm = ops.RMSNorm(layer.head_dim, eps, inner)
            values_are_keys = model.keys_are_values and not layer.is_sliding
            self.v_proj = None if values_are_keys else ops.Linear(shape.hidden_size, width, inner)

    def write_and_attend(
        self, x: Tensor, past: Cache, step: Step, *, keeps: bool = False
    ) -> tuple[Tensor, Cache]:
        """All S rows of x write the cache and attend. keeps: return the kept rows only."""
        key: Tensor | None
        value: Tensor | None
        if self.layer.index in step.fused:
            query, key, value = self._all_in_one(x, step), None, None
        else:
            query, (key, value) = self._query(x, step), self._keys_and_values(x, step)
        output, keys, values = self._attend(query, key, value, past, step.written, step, writes=True)
        return self.o_proj(step.kept.of(output) if keeps else output), (keys, values)

    def write(self, x: Tensor, past: Cache, step: Step) -> Cache:
        """All S rows of x write the cache; nothing attends, as far as the operators allow."""
        key, value = self._keys_and_values(x, step)
        if self.layer.is_sliding:
            # The operator evicts, so it has to run: cheaply, with the keys as queries, one head for each.
            heads = self.layer.kv_heads
            _, keys, values = self._attend(
                key, key, value, past, step.written, step, writes=True, heads=heads
            )
            return keys, values
        assert step.positions is not None and step.past_length is not None
        key = ops.rotary(key, step.positions, *self._rope(step), heads=self.layer.kv_heads)
        scales = self._scales(past, step) or (None, None)
        keys, values = (
            ops.tensor_scatter(cache, self._stored(new, cache.dtype, scale, step), step.past_length)
            for new, cache, scale in zip((key, value), past, scales, strict=True)
        )
        return keys, values

    def read(self, x: Tensor, cache: Cache, step: Step) -> Tensor:
        """R rows of x attend to a cache that already holds their keys: no new keys, no cache output."""
        if step.reads is not None and self.inner == torch.float32:
            return self.o_proj(self._read_plainly(x, cache, step, step.reads))
        zeros = step.constants[f"zeros_1x{self.heads * self.layer.head_dim}"]
        nothing = step.constants[f"zeros_0x{self.layer.kv_heads * self.layer.head_dim}"]
        query = step.kept.with_filler(self._query(x, step), zeros)
        lengths = step.read_sliding if self.layer.is_sliding else step.read_full
        (output,) = self._attend(query, nothing, nothing, cache, lengths, step, writes=False)
        return self.o_proj(step.kept.without_filler(output))

    def _read_plainly(self, x: Tensor, cache: Cache, step: Step, reads: CacheReads) -> Tensor:
        head_dim, kv_heads = self.layer.head_dim, self.layer.kv_heads
        query = ops.rotary(self._query(x, step), reads.positions, *self._rope(step), heads=self.heads)
        group = self.heads // kv_heads
        grouped = ops.reshape(
            query,
            step.constants[f"group_{kv_heads}x{group}x{head_dim}"],
            (*query.shape[:2], kv_heads, group, head_dim),
        )
        output = attend(grouped, reads.used(self.layer, cache), reads.bias(self.layer.is_sliding))
        return ops.reshape(output, step.constants[f"merge_{self.heads * head_dim}"], query.shape)

    def _all_in_one(self, x: Tensor, step: Step) -> Tensor:
        """Queries, keys and values side by side: one product, and one norm with a weight for each head."""
        assert self.v_proj is not None
        product = ops.fused_linear(x, (self.q_proj, self.k_proj, self.v_proj))
        heads, head_dim = self.heads + 2 * self.layer.kv_heads, self.layer.head_dim
        by_head = ops.reshape(
            product, step.constants[f"rows_{heads}x{head_dim}"], (x.shape[1], heads, head_dim)
        )
        normed = ops.rms_norm(by_head, step.constants[f"qkv_norm_{self.layer.index}"], self.eps)
        return ops.reshape(normed, step.constants[f"flat_{heads * head_dim}"], product.shape)

    def _query(self, x: Tensor, step: Step) -> Tensor:
        return self._norm_heads(self.q_proj(x), self.q_norm.weight, self.heads, step)

    def _keys_and_values(self, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """(1, S, kv_heads * head_dim) each; keys not yet rotated."""
        key = self.k_proj(x)
        value = key if self.v_proj is None else self.v_proj(x)
        ones = step.constants[f"ones_{self.layer.head_dim}"]
        heads = self.layer.kv_heads
        return (
            self._norm_heads(key, self.k_norm.weight, heads, step),
            self._norm_heads(value, ones, heads, step),
        )

    def _norm_heads(self, x: Tensor, weight: Tensor, heads: int, step: Step) -> Tensor:
        if heads == 1:
            return ops.rms_norm(x, weight, self.eps)
        normed = ops.rms_norm(self._split_heads(x, heads, step), weight, self.eps)
        return ops.reshape(normed, step.constants[f"merge_{heads * self.layer.head_dim}"], x.shape)

    def _split_heads(self, x: Tensor, heads: int, step: Step) -> Tensor:
        """(1, S, heads * head_dim) -> (1, S, heads, head_dim)"""
        head_dim = self.layer.head_dim
        return ops.reshape(x, step.constants[f"split_{heads}x{head_dim}"], (*x.shape[:2], heads, head_dim))

    def _stored(self, x: Tensor, dtype: torch.dtype, scale: Tensor | None, step: Step) -> Tensor:
        """(1, S, kv_heads * head_dim) as a cache holds it: (1, kv_heads, S, head_dim) in its type."""
        rows = self._split_heads(x, self.layer.kv_heads, step).transpose(1, 2)
        if scale is not None:
            rows = torch.clamp(torch.round(rows / scale), -128, 127)
        return rows.to(dtype)

    def _rope(self, step: Step) -> tuple[Tensor, Tensor]:
        layer_type = self.layer.layer_type
        return step.constants[f"cos_{layer_type}"], step.constants[f"sin_{layer_type}"]

    def _scales(self, cache: Cache, step: Step) -> tuple[Tensor, Tensor] | None:
        if cache[0].dtype != torch.int8:
            return None
        return step.constants[f"key_scale_{self.layer.source}"], step.constants[
            f"value_scale_{self.layer.source}"
        ]

    def _attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        past: Cache,
        lengths: Lengths,
        step: Step,
        *,
        writes: bool,
        heads: int | None = None,
    ) -> tuple[Tensor, ...]:
        return ops.group_query_attention(
            query,
            key,
            value,
            past,
            lengths,
            self._rope(step),
            heads=heads or self.heads,
            kv_heads=self.layer.kv_heads,
            window=self.window,
            evicts=self.layer.is_sliding and writes,
            positions=None if writes else step.query_positions,
            scales=self._scales(past, step),
            writes=writes,
        )


def declare_attention_constants(
    constants: Constants,
    model: TextModel,
    *,
    context: int,
    kv_dtype: KvDtype,
    inner: torch.dtype = torch.float32,
) -> None:
    """Rotary tables of `context` rows, reshape targets, empty keys, and the scales of an int8 cache."""
    heads = model.geometry.num_attention_heads
    for layer in model.layers:
        head_dim, rope = layer.head_dim, model.rope[layer.layer_type]
        for part, name in enumerate(("cos", "sin")):
            make = partial(_rope_part, rope, head_dim, context, part)
            constants.declare(f"{name}_{layer.layer_type}", (context, head_dim // 2), inner, make)
        constants.filled(f"ones_{head_dim}", (head_dim,), 1.0, inner)
        constants.filled(f"zeros_1x{heads * head_dim}", (1, 1, heads * head_dim), 0.0, inner)
        constants.filled(
            f"zeros_0x{layer.kv_heads * head_dim}", (1, 0, layer.kv_heads * head_dim), 0.0, inner
        )
        for count in (heads, layer.kv_heads):
            # No -1: Reshape cannot work out a dimension of a tensor with zero rows.
            constants.integers(f"split_{count}x{head_dim}", 0, 0, count, head_dim)
            constants.integers(f"merge_{count * head_dim}", 0, 0, count * head_dim)
        group = heads // layer.kv_heads
        constants.integers(
            f"group_{layer.kv_heads}x{group}x{head_dim}", 0, 0, layer.kv_heads, group, head_dim
        )
        if kv_dtype == "int8" and not layer.is_shared:
            for part, name in enumerate(("key", "value")):
                scale_shape = (1, layer.kv_heads, 1, head_dim)
                make = partial(_scale_part, layer, rope, part)
                constants.declare(f"{name}_scale_{layer.index}", scale_shape, torch.float32, make)


def declare_fused_constants(
    constants: Constants, model: TextModel, fused: Iterable[int], inner: torch.dtype
) -> None:
    """For layers whose queries, keys and values are one product."""
    for index in fused:
        layer = model.layers[index]
        heads = model.geometry.num_attention_heads + 2 * layer.kv_heads
        shape = (1, heads, layer.head_dim)
        make = partial(_norm_weights, index, layer.kv_heads, shape)
        constants.declare(f"qkv_norm_{index}", shape, inner, make)
        constants.integers(f"rows_{heads}x{layer.head_dim}", -1, heads, layer.head_dim)
        constants.integers(f"flat_{heads * layer.head_dim}", 1, -1, heads * layer.head_dim)


def _norm_weights(index: int, kv_heads: int, shape: tuple[int, int, int], read: ReadTensor) -> np.ndarray:
    """(1, heads, head_dim): the weight of each head's norm; values have none."""
    weights = np.ones(shape, np.float32)
    weights[:, : -2 * kv_heads] = read(f"layers.{index}.self_attn.q_norm.weight")
    weights[:, -2 * kv_heads : -kv_heads] = read(f"layers.{index}.self_attn.k_norm.weight")
    return weights


def _rope_part(rope: Rope, head_dim: int, context: int, part: int, read: ReadTensor) -> np.ndarray:
    return rope_table(rope, head_dim, context)[part]


def _scale_part(layer: Layer, rope: Rope, part: int, read: ReadTensor) -> np.ndarray:
    key_norm = read(f"layers.{layer.index}.self_attn.k_norm.weight")
    return cache_scales(key_norm, rope, layer.head_dim, layer.kv_heads)[part]
