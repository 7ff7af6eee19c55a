"""The decoder graph for CUDA: what the host decides comes as inputs, so that a decode step can be captured.

It differs from `Decoder` in form, not in what it computes:
- Lengths are not worked out from a mask: shapes and masks would be read on the host. The true length follows
  on the GPU from `last_position`; the operators' host-side totals are inputs, and bounds are enough there.
- One row is kept, always the last: sliding caches without slack allow no guesses, and CUDA's attention takes
  no zero rows. A chunk that is not a prompt's last runs that row too; it costs about one decode step.
- The last layer that owns a cache attends with all rows and keeps one, instead of writing apart: that is
  fewer kernels.
- Queries, keys and values of a layer are one product and one norm, where their weights are stored alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...runtime.bundle import KvDtype
from ..geometry import TextModel
from . import ops
from .attention import Cache, declare_fused_constants
from .constants import Constants
from .decoder import Decoder, DecoderLayer
from .step import Step

LAST = "last_row"


@dataclass(frozen=True)
class LastRow:
    """Keeps the last row."""

    constants: Constants

    def of(self, x: Tensor) -> Tensor:
        """x (1, S, width) -> (1, 1, width)"""
        constants = self.constants
        return ops.slice_rows(x, constants[LAST], constants["end"], constants["row_axis"], 1)

    def with_filler(self, query: Tensor, zeros: Tensor) -> Tensor:
        return query

    def without_filler(self, output: Tensor) -> Tensor:
        return output


class CudaDecoder(Decoder):
    """The same weights and constants under the same names."""

    def __init__(
        self,
        model: TextModel,
        *,
        context: int,
        kv_dtype: KvDtype,
        inner: torch.dtype = torch.float16,
        fused: frozenset[int] = frozenset(),
    ) -> None:
        """fused: layers whose queries, keys and values are one product."""
        super().__init__(model, context=context, kv_dtype=kv_dtype, inner=inner)
        self.fused = fused
        declare_fused_constants(self.constants, model, sorted(fused), inner)
        self.constants.integers(LAST, -1)
        self.constants.integers("vector_shape", 1)
        last_in_window = model.geometry.sliding_window - 1
        self.constants.declare(
            "last_in_window", (1,), torch.int32, lambda _: np.array([last_in_window], np.int32)
        )

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,  # (1, S, hidden)
        per_layer_inputs: Tensor | None,  # (1, S, layers * P); None for a model without them
        last_position: Tensor,  # (1, 1) int64: T - 1
        total_length: Tensor,  # () int32, on the host: T or more
        window_length: Tensor,  # () int32, on the host: min(T, window) or more
        past: list[Tensor],  # keys and values of the layers that own a cache
    ) -> tuple[Tensor, ...]:
        last = ops.reshape(last_position, self.constants["vector_shape"], (1,)).to(torch.int32)
        step = Step(
            constants=self.constants,
            kept=LastRow(self.constants),
            positions=None,
            query_positions=last_position,
            past_length=None,
            written=(last, total_length),
            read_full=(last, total_length),
            read_sliding=(torch.minimum(last, self.constants["last_in_window"]), window_length),
            fused=self.fused,
        )
        return self.run(inputs_embeds, per_layer_inputs, step, past)

    def last_cached(
        self, module: DecoderLayer, hidden: Tensor, past: Cache, step: Step, extra: Tensor | None
    ) -> tuple[Tensor, Cache]:
        return module.all_rows(hidden, past, step, extra, keeps=True)
