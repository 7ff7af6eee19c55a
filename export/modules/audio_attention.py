"""Attention of the audio encoder: a token sees itself and `left_tokens` before it, with a bias by distance.

The reference attends in blocks of a clip; what a token sees does not depend on where blocks begin. So a chunk
that starts anywhere is cut into blocks of B queries, each with the C = left_tokens + B keys that they see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..audio_geometry import AudioModel
from . import ops
from .clipped import ClippedLinear
from .constants import Constants, ReadTensor

MASKED = -1e9
KEY_SCALE = math.log(1 + math.e) / math.log(2)
MAX_TIMESCALE = 10_000.0


@dataclass(frozen=True)
class Blocks:
    """What all layers share in one run of T tokens, cut into N blocks."""

    constants: Constants
    count: int | torch.SymInt  # N, for declaring shapes
    tokens: Tensor  # (1,) T
    query_rows: Tensor  # (N * B,) the last block is filled up with the last token
    key_rows: Tensor  # (N * C,) into the past keys and the new ones, one after the other
    mask: Tensor  # (N, 1, B, C) 0 or MASKED


class AudioAttention(nn.Module):
    """Multi-head attention whose logits are capped by a tanh."""

    def __init__(self, model: AudioModel, index: int, constants: Constants) -> None:
        super().__init__()
        self.model, self.index = model, index
        width = model.hidden_size
        self.q_proj = ClippedLinear(width, width, clipped=model.clipped)
        self.k_proj = ClippedLinear(width, width, clipped=model.clipped)
        self.v_proj = ClippedLinear(width, width, clipped=model.clipped)
        self.post = ClippedLinear(width, width, clipped=model.clipped)
        self._declare(constants)

    def forward(
        self, x: Tensor, past_keys: Tensor, past_values: Tensor, blocks: Blocks
    ) -> tuple[Tensor, Tensor, Tensor]:
        constants, model = blocks.constants, self.model
        query = self.q_proj(x) * constants[f"query_scale_{self.index}"]
        keys = torch.cat([past_keys, self.k_proj(x)], dim=1)  # (1, left + T, hidden)
        values = torch.cat([past_values, self.v_proj(x)], dim=1)
        context = model.block + model.left_tokens
        queries = self._split(
            query, blocks.query_rows, blocks, model.block, constants["query_blocks"]
        )  # (N, heads, B, head_dim)
        split_keys = self._split(keys, blocks.key_rows, blocks, context, constants["key_blocks"])
        content = ops.matmul(queries, split_keys.transpose(2, 3))  # (N, heads, B, C)
        distance = self._shift(ops.matmul(queries, constants[f"relative_keys_{self.index}"]), constants)
        logits = torch.tanh(content + distance) * model.logit_cap + blocks.mask
        split_values = self._split(values, blocks.key_rows, blocks, context, constants["key_blocks"])
        attended = ops.matmul(torch.softmax(logits, dim=-1), split_values)  # (N, heads, B, head_dim)
        rows = (1, x.shape[1], model.hidden_size)
        merged = ops.reshape(attended.transpose(1, 2), constants["merged_blocks"], rows)
        output = ops.slice_rows(merged, constants["int_0"], blocks.tokens, constants["row_axis"], x.shape[1])
        return self.post(output), keys[:, -model.left_tokens :], values[:, -model.left_tokens :]

    def _split(self, x: Tensor, rows: Tensor, blocks: Blocks, size: int, target: Tensor) -> Tensor:
        """Rows of x (1, …, hidden) as blocks of `size` rows and heads: (N, heads, size, head_dim)"""
        shape = (blocks.count, size, self.model.heads, self.model.head_dim)
        return ops.reshape(x.index_select(1, rows), target, shape).transpose(1, 2)

    def _shift(self, scores: Tensor, constants: Constants) -> Tensor:
        """(N, heads, B, distances left_tokens … 0) -> (N, heads, B, C): row i begins at its key i.

        Rows padded to C + 1 and read as rows of C move by one more place each.
        """
        model, count = self.model, scores.shape[0]
        context = model.block + model.left_tokens
        padded = nn.functional.pad(scores, (0, model.block))  # (N, heads, B, C + 1)
        flat = ops.reshape(padded, constants["shift_flat"], (count, model.heads, model.block * (context + 1)))
        kept = flat[:, :, : model.block * context]
        return ops.reshape(kept, constants["shift_rows"], (count, model.heads, model.block, context))

    def _declare(self, constants: Constants) -> None:
        model, index = self.model, self.index
        prefix = f"audio_tower.layers.{index}.self_attn."
        scale, projection = prefix + "per_dim_scale", prefix + "relative_k_proj.weight"
        constants.reads[scale] = (model.head_dim,)
        constants.reads[projection] = (model.hidden_size, model.hidden_size)
        constants.declare(
            f"query_scale_{index}", (model.hidden_size,), torch.float32, partial(_query_scale, model, scale)
        )
        shape = (model.heads, model.head_dim, model.left_tokens + 1)
        constants.declare(
            f"relative_keys_{index}", shape, torch.float32, partial(_relative_keys, model, projection)
        )


def declare_block_constants(constants: Constants, model: AudioModel) -> None:
    """Index ranges, the band of keys that a row of a block sees, reshape targets."""
    block, context = model.block, model.block + model.left_tokens
    constants.integers("query_blocks", -1, block, model.heads, model.head_dim)
    constants.integers("key_blocks", -1, context, model.heads, model.head_dim)
    constants.integers("merged_blocks", 1, -1, model.hidden_size)
    constants.integers("shift_flat", 0, 0, block * (context + 1))
    constants.integers("shift_rows", 0, 0, block, context)
    constants.integers("flat", -1)
    constants.integers("row_axis", 1)
    constants.integers("int_0", 0)
    constants.integers("block", block)
    constants.integers("block_less_1", block - 1)
    constants.integers("left", model.left_tokens)
    constants.integers("left_less_1", model.left_tokens - 1)
    constants.integers("columns", *range(context))
    constants.declare("band", (1, 1, block, context), torch.float32, partial(_band, model))
    constants.filled("masked", (1,), MASKED)
    constants.filled("float_0", (1,), 0.0)


def read_blocks(
    constants: Constants, model: AudioModel, x: Tensor, past_tokens: Tensor, count: int | torch.SymInt
) -> Blocks:
    """For x (1, T, hidden), after `past_tokens` (1,) tokens of the clip."""
    tokens = ops.dimension(x, 1)
    block = constants["block"]
    filled = ops.integer_division(tokens + constants["block_less_1"], block) * block  # (1,) N * B
    starts = ops.integer_range(filled, model.block, count)  # (N,)
    rows = ops.integer_range(filled, 1, count * model.block)
    columns = starts.unsqueeze(1) + constants["columns"]  # (N, C)
    last_key = tokens + constants["left_less_1"]
    width = model.block + model.left_tokens
    key_rows = ops.reshape(torch.minimum(columns, last_key), constants["flat"], (count * width,))
    # A column before the clip's first token holds the zeros that the state began with.
    before = torch.where(columns < constants["left"] - past_tokens, constants["masked"], constants["float_0"])
    return Blocks(
        constants=constants,
        count=count,
        tokens=tokens,
        query_rows=torch.minimum(rows, tokens - 1),
        key_rows=key_rows,
        mask=before.unsqueeze(1).unsqueeze(1) + constants["band"],
    )


def _band(model: AudioModel, read: ReadTensor) -> np.ndarray:
    """Row i of a block sees columns i … i + left_tokens."""
    block, context = model.block, model.block + model.left_tokens
    distance = np.arange(block)[:, None] + model.left_tokens - np.arange(context)[None, :]
    seen = (distance >= 0) & (distance <= model.left_tokens)
    return np.where(seen, 0, MASKED).astype(np.float32)[None, None]


def _query_scale(model: AudioModel, scale: str, read: ReadTensor) -> np.ndarray:
    """All constant factors of a logit before its tanh: the queries' own, the keys', and 1 / cap."""
    learned = np.logaddexp(0, read(scale).astype(np.float64))  # softplus
    factor = model.head_dim**-0.5 / math.log(2) * KEY_SCALE / model.logit_cap
    return np.tile(learned * factor, model.heads).astype(np.float32)


def _relative_keys(model: AudioModel, projection: str, read: ReadTensor) -> np.ndarray:
    """The projected sinusoid of each distance, (heads, head_dim, distances); without the keys' factor."""
    timescales = model.hidden_size // 2
    increment = math.log(MAX_TIMESCALE) / max(timescales - 1, 1)
    rates = np.exp(np.arange(timescales) * -increment)
    rows = [
        np.zeros(model.hidden_size)
        if position is None
        else np.concatenate([np.sin(position * rates), np.cos(position * rates)])
        for position in model.relative_positions
    ]
    projected = np.stack(rows) @ read(projection).astype(np.float64).T / KEY_SCALE
    by_head = projected.reshape(len(rows), model.heads, model.head_dim)
    return np.ascontiguousarray(by_head.transpose(1, 2, 0), np.float32)
