"""Reading another layer's float32 cache with plain products: what suits a CPU when it decodes.

GroupQueryAttention takes each query head by itself and so reads the same keys and values once for each head
that shares them. Here the heads of a group are the rows of one product. Rows in use are cut out of a cache
once, for all the layers that read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Layer
from . import ops
from .constants import Constants

FAR = 1e30  # taken off a score, leaves a probability of zero

Cache = tuple[Tensor, Tensor]  # keys and values, (1, kv_heads, capacity, head_dim) each


class CacheReads:
    """What the kept rows of one run need to read caches that this run has filled. R may be 0."""

    def __init__(
        self,
        constants: Constants,
        positions: Tensor,  # (1, R)
        *,
        total: Tensor,  # (1,) int64 T
        resident: Tensor,  # (1,) rows of a window-sized cache
        any_kept: Tensor,  # (1,) 1 if R > 0, else 0
        window: int,
        count: int | torch.SymInt,  # said to be the number of rows in use
    ) -> None:
        self.positions = positions
        self._constants, self._window, self._count = constants, window, count
        self._first = total - resident  # the token in row 0 of a window-sized cache
        one = constants["int_1"]
        # With no kept row, one row of a cache is enough.
        self._rows = {False: (total - one) * any_kept + one, True: (resident - one) * any_kept + one}
        self._used: dict[int, Cache] = {}
        self._biases: dict[bool, Tensor] = {}

    def used(self, layer: Layer, cache: Cache) -> Cache:
        """Keys and values in use, (1, 1, kv_heads, L, head_dim) each."""
        if layer.source not in self._used:
            keys, values = (self._cut(part, self._rows[layer.is_sliding]) for part in cache)
            self._used[layer.source] = keys, values
        return self._used[layer.source]

    def bias(self, is_sliding: bool) -> Tensor:
        """(1, R, 1, 1, L): zero where a row may look, far below zero elsewhere."""
        if is_sliding not in self._biases:
            at = self.positions - self._first if is_sliding else self.positions
            columns = ops.integer_range(self._rows[is_sliding], 1, self._count)
            back = (at.unsqueeze(2) - columns).to(torch.float32)  # (1, R, L), how far
            bias = torch.clamp(back, max=0.0)
            if is_sliding:
                bias = bias + torch.clamp((self._window - 1) - back, max=0.0)
            self._biases[is_sliding] = (bias * FAR).unsqueeze(2).unsqueeze(2)
        return self._biases[is_sliding]

    def _cut(self, part: Tensor, rows: Tensor) -> Tensor:
        constants = self._constants
        return ops.first_rows(part, constants["int_0"], rows, constants["cache_axis"], self._count).unsqueeze(
            1
        )


def attend(query: Tensor, used: Cache, bias: Tensor) -> Tensor:
    """query (1, R, kv_heads, group, head_dim), scale 1; returns the same shape."""
    keys, values = used
    scores = ops.matmul_transposed(query, keys) + bias  # (1, R, kv_heads, group, L)
    return ops.matmul(torch.softmax(scores, dim=-1), values)
