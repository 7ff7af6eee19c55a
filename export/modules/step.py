"""The integers one run of the decoder graph needs: which rows are kept, how many tokens each cache holds.

All of it is computed inside the graph from the mask and from the caches' shapes, so that an engine which
knows nothing of these rules (onnxruntime-genai) can run the same graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..geometry import TextModel
from . import ops
from .constants import Constants
from .reads import CacheReads

INT64_MAX = torch.iinfo(torch.int64).max

Lengths = tuple[Tensor, Tensor]  # tokens in a cache: minus one as (1,) int32, and itself as () int32


class Rows(Protocol):
    """Which rows of a step go on above the last cache."""

    def of(self, x: Tensor) -> Tensor: ...

    def with_filler(self, query: Tensor, zeros: Tensor) -> Tensor: ...

    def without_filler(self, output: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Kept:
    """The last R rows of a step. All tensors are (1,) int64."""

    constants: Constants
    start: Tensor  # S - R
    any: Tensor  # 1 if R > 0, else 0
    none: Tensor  # 1 - any
    query_start: Tensor  # S - max(R, 1)
    rows: torch.SymInt  # R, for declaring shapes

    def of(self, x: Tensor) -> Tensor:
        """The kept rows of x (1, S, ...)."""
        return self._slice(x, self.start)

    def queries(self, x: Tensor) -> Tensor:
        """The last max(R, 1) rows of x (1, S)."""
        return self._slice(x, self.query_start)

    def with_filler(self, query: Tensor, zeros: Tensor) -> Tensor:
        """query (1, R, width), or the row `zeros` (1, 1, width) if R = 0."""
        return ops.concat_rows(self._slice(zeros, self.any), query, query.shape)

    def without_filler(self, output: Tensor) -> Tensor:
        return self._slice(output, self.none)

    def _slice(self, x: Tensor, start: Tensor) -> Tensor:
        return ops.slice_rows(x, start, self.constants["end"], self.constants["row_axis"], self.rows)


class AllRows:
    """Every row goes on."""

    def of(self, x: Tensor) -> Tensor:
        return x

    def with_filler(self, query: Tensor, zeros: Tensor) -> Tensor:
        return query

    def without_filler(self, output: Tensor) -> Tensor:
        return output


@dataclass(frozen=True)
class Step:
    """What all layers share in one run."""

    constants: Constants
    kept: Rows
    positions: Tensor | None  # (1, S); None where nothing writes a cache without attending
    query_positions: Tensor  # (1, max(R, 1))
    past_length: Tensor | None  # (1,) T - S; None as above
    written: Lengths  # for layers that write
    read_full: Lengths  # for kept rows over a full-attention cache
    read_sliding: Lengths  # for kept rows over a window-sized cache, counted in its own rows
    reads: CacheReads | None = None  # for kept rows over float32 caches on a CPU
    fused: frozenset[int] = frozenset()  # layers whose queries, keys and values are one product


def declare_step_constants(constants: Constants) -> None:
    constants.integers("end", INT64_MAX)
    constants.integers("row_axis", 1)
    constants.integers("cache_axis", 2)
    constants.integers("scalar_shape")
    for value in (0, 1):
        constants.integers(f"int_{value}", value)


def read_step(
    constants: Constants,
    model: TextModel,
    attention_mask: Tensor,
    position_ids: Tensor,
    logits_to_keep: Tensor,
    kept_rows: Tensor,
    past: list[Tensor],
) -> Step:
    zero, one = constants["int_0"], constants["int_1"]
    total = attention_mask.sum(dim=1)  # (1,) T
    new = ops.dimension(position_ids, 1)  # (1,) S
    start = torch.maximum(new - logits_to_keep, zero)
    any_kept = torch.minimum(new - start, one)
    none_kept = one - any_kept
    kept = Kept(constants, start, any_kept, none_kept, start - none_kept, kept_rows.shape[0])
    resident = total
    for layer, keys in zip(model.cached_layers, past[::2], strict=True):
        if layer.is_sliding:
            resident = _resident(constants, total, ops.dimension(keys, 2), model.geometry.sliding_window)
            break
    reads = None
    if past[0].dtype == torch.float32:
        reads = CacheReads(
            constants,
            kept.of(position_ids),
            total=total,
            resident=resident,
            any_kept=any_kept,
            window=model.geometry.sliding_window,
            count=attention_mask.shape[1],
        )
    return Step(
        constants=constants,
        kept=kept,
        positions=position_ids,
        query_positions=kept.queries(position_ids),
        past_length=total - new,
        written=_lengths(constants, total - one),
        # With no kept row, the made-up query looks at one cached token only.
        read_full=_lengths(constants, (total - one) * any_kept),
        read_sliding=_lengths(constants, (resident - one) * any_kept),
        reads=reads,
    )


def read_prefill_step(constants: Constants, attention_mask: Tensor, position_ids: Tensor) -> Step:
    """Of a run in which no layer reads another one's cache."""
    one = constants["int_1"]
    total = attention_mask.sum(dim=1)  # (1,) T
    written = _lengths(constants, total - one)
    return Step(
        constants=constants,
        kept=AllRows(),
        positions=position_ids,
        query_positions=position_ids,
        past_length=total - ops.dimension(position_ids, 1),
        written=written,
        read_full=written,
        read_sliding=written,
    )


def _resident(constants: Constants, total: Tensor, capacity: Tensor, window: int) -> Tensor:
    """Rows in use of a window-sized cache: T up to its capacity C, else T - G ceil((T-C) / G), G = C - W + 1.

    GroupQueryAttention evicts G positions at a time; see its `sliding_window_cache` attribute.
    """
    group = capacity - (window - 1)
    over = torch.maximum(total - capacity, constants["int_0"])
    return total - group * ops.integer_division(over + group - constants["int_1"], group)


def _lengths(constants: Constants, last: Tensor) -> Lengths:
    total = ops.reshape(last + constants["int_1"], constants["scalar_shape"], ())
    return last.to(torch.int32), total.to(torch.int32)
