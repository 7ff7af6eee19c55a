"""The ONNX operators that the traced modules emit directly; knows their signatures, not the model.

`Linear` and `Table` are placeholders of the domain `gemma_edge`: `attach` turns each into a float or a
quantized operator, as the recipe says, when the weight's real bytes are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out

PLACEHOLDER_DOMAIN = "gemma_edge"
LINEAR = "Linear"
TABLE = "Table"

Shape = Sequence[int | torch.SymInt]


class Linear(nn.Module):
    """y = x W^T, W: (out_features, in_features). dtype: that of x and y."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.weight.dtype, (
            f"x is {x.dtype}, the product is declared for {self.weight.dtype}"
        )
        shape = (*x.shape[:-1], self.weight.shape[0])
        return symbolic(
            f"{PLACEHOLDER_DOMAIN}::{LINEAR}", (x, self.weight), dtype=x.dtype, shape=shape, version=1
        )


def fused_linear(x: Tensor, parts: Sequence[Linear]) -> Tensor:
    """Several products of one x, one after the other along the last axis."""
    weights = [part.weight for part in parts]
    assert all(weight.dtype == x.dtype for weight in weights)
    shape = (*x.shape[:-1], sum(weight.shape[0] for weight in weights))
    return symbolic(f"{PLACEHOLDER_DOMAIN}::{LINEAR}", (x, *weights), dtype=x.dtype, shape=shape, version=1)


class Table(nn.Module):
    """Rows of an embedding table, W: (rows, width)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, ids: Tensor) -> Tensor:
        shape = (*ids.shape, self.weight.shape[1])
        return symbolic(
            f"{PLACEHOLDER_DOMAIN}::{TABLE}",
            (self.weight, ids),
            dtype=self.weight.dtype,
            shape=shape,
            version=1,
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32. dtype: of the result, if not of x."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normalized("SimplifiedLayerNormalization", x, weight, eps, version=1)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(x - mean) / deviation * weight over the last axis."""
    return _normalized("LayerNormalization", x, weight, eps, version=17)


def _normalized(op: str, x: Tensor, weight: Tensor, eps: float, *, version: int) -> Tensor:
    attrs = dict(axis=-1, epsilon=eps, stash_type=1)
    return symbolic(op, (x, weight), attrs=attrs, dtype=weight.dtype, shape=x.shape, version=version)


def strided_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """x (1, channels, 1 + rows, width), kernel 3, stride 2: the first row is the others' left neighbour.

    Zeros stand after the last row and on both sides of the width. Returns (1, channels out, rows / 2,
    width / 2), rounded up.
    """
    shape = (x.shape[0], weight.shape[0], x.shape[2] // 2, (x.shape[3] + 1) // 2)
    attributes = dict(kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 1])
    return symbolic("Conv", (x, weight), attrs=attributes, dtype=x.dtype, shape=shape, version=11)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, y broadcast to x: torch would decompose it into products of flattened copies."""
    shape = (*x.shape[:-1], y.shape[-1])
    return symbolic("MatMul", (x, y), dtype=x.dtype, shape=shape, version=13)


def matmul_transposed(x: Tensor, y: Tensor) -> Tensor:
    """x @ y^T over the last two axes, y broadcast to x, not copied."""
    shape = (*x.shape[:-1], y.shape[-2])
    attributes = dict(transB=1)
    return symbolic(
        "com.microsoft::FusedMatMul", (x, y), attrs=attributes, dtype=x.dtype, shape=shape, version=1
    )


def clip(x: Tensor, least: Tensor, most: Tensor) -> Tensor:
    """Between two scalars."""
    return symbolic("Clip", (x, least, most), dtype=x.dtype, shape=x.shape, version=13)


def reshape(x: Tensor, target: Tensor, shape: Shape) -> Tensor:
    """ONNX Reshape: a 0 in `target` keeps that dimension, so no shape is computed at run time."""
    return symbolic("Reshape", (x, target), dtype=x.dtype, shape=shape, version=21)


def slice_rows(x: Tensor, start: Tensor, end: Tensor, axis: Tensor, rows: int | torch.SymInt) -> Tensor:
    """x[:, start:end], said to have `rows` rows; start, end and axis are (1,) int64."""
    shape = (x.shape[0], rows, *x.shape[2:])
    return symbolic("Slice", (x, start, end, axis), dtype=x.dtype, shape=shape, version=13)


def first_rows(x: Tensor, zero: Tensor, end: Tensor, axis: Tensor, rows: int | torch.SymInt) -> Tensor:
    """x[:, :, :end], said to have `rows` rows: of a cache (1, heads, capacity, head_dim)."""
    shape = (*x.shape[:2], rows, x.shape[3])
    return symbolic("Slice", (x, zero, end, axis), dtype=x.dtype, shape=shape, version=13)


def split(x: Tensor, sizes: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    """x cut along its last axis; `sizes` holds `widths` as int64."""
    return symbolic_multi_out(
        "Split",
        (x, sizes),
        attrs=dict(axis=-1),
        dtypes=[x.dtype] * len(widths),
        shapes=[(*x.shape[:-1], width) for width in widths],
        version=18,
    )


def concat_rows(first: Tensor, second: Tensor, shape: Shape) -> Tensor:
    return symbolic(
        "Concat", (first, second), attrs=dict(axis=1), dtype=second.dtype, shape=shape, version=13
    )


def dimension(x: Tensor, axis: int) -> Tensor:
    """x.shape[axis] as (1,) int64, read in the graph."""
    return symbolic(
        "Shape", (x,), attrs=dict(start=axis, end=axis + 1), dtype=torch.int64, shape=(1,), version=21
    )


def integer_range(limit: Tensor, step: int, count: int | torch.SymInt) -> Tensor:
    """0, step, 2 step, … below `limit` (1,) int64; said to be `count` numbers."""
    scalar = limit.squeeze(0)
    zero, delta = torch.zeros((), dtype=torch.int64), torch.full((), step, dtype=torch.int64)
    return symbolic("Range", (zero, scalar, delta), dtype=torch.int64, shape=(count,), version=11)


def integer_division(x: Tensor, y: Tensor) -> Tensor:
    """Of non-negative int64: ONNX Div truncates."""
    return symbolic("Div", (x, y), dtype=x.dtype, shape=x.shape, version=14)


def tensor_scatter(cache: Tensor, update: Tensor, start: Tensor) -> Tensor:
    """`cache` (1, heads, capacity, head_dim) with `update` from row `start` (1,) on; in place if so bound."""
    return symbolic(
        "TensorScatter",
        (cache, update, start),
        attrs=dict(axis=2),
        dtype=cache.dtype,
        shape=cache.shape,
        version=23,
    )


def rotary(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """x (1, rows, heads * head_dim) rotated to `positions` (1, rows)."""
    return symbolic(
        "com.microsoft::RotaryEmbedding",
        (x, positions, cos, sin),
        attrs=dict(num_heads=heads),
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    *,
    heads: int,
    kv_heads: int,
    window: int | None,
    evicts: bool = False,
    positions: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    writes: bool,
) -> tuple[Tensor, ...]:
    """Rotary attention over a cache, scale 1. Returns (output,) or, if it `writes`, (output, keys, values).

    query: with neither key nor value, all three one after the other.
    lengths: (tokens in the cache after this step - 1) as (1,) int32, and that plus one as a scalar.
    evicts: the cache is window-sized and the operator drops what left the window.
    scales: of an int8 cache, (1, kv_heads, 1, head_dim) each.
    """
    attrs: dict[str, int | float | str] = dict(num_heads=heads, kv_num_heads=kv_heads, do_rotary=1, scale=1.0)
    attrs["local_window_size"] = -1 if window is None else window
    if evicts:
        attrs["sliding_window_cache"] = 1
    inputs: list[Tensor | None] = [query, key, value, *past, *lengths, *rope, positions]
    if scales is not None:
        attrs |= dict(k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL", kv_cache_bit_width=8)
        inputs += [None, None, *scales]
    while inputs[-1] is None:
        inputs.pop()
    # The CPU operator wants somewhere to put an int8 cache even if it writes nothing: an unread copy.
    width = query.shape[-1] if key is not None else heads * past[0].shape[-1]
    shapes = [(*query.shape[:-1], width)]
    outputs = (query, *past) if writes or scales is not None else (query,)
    shapes += [cache.shape for cache in outputs[1:]]
    return tuple(
        symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            tuple(inputs),
            attrs=attrs,
            dtypes=tuple(output.dtype for output in outputs),
            shapes=shapes,
            version=1,
        )
    )[: 3 if writes else 1]
