"""The prefill graph: it fills the caches from a chunk of a prompt and does nothing else.

The layers below the last one that owns a cache, and that layer's keys and values: no rows are kept, so there
are no logits. Parameters are a part of `Decoder`'s, under the same names; of `per_layer_model_projection`
there are the rows of these layers only.
"""

from __future__ import annotations

from torch import Tensor

from ...runtime.bundle import KvDtype
from ..geometry import TextModel
from . import ops
from .decoder import Decoder
from .step import read_prefill_step


class Prefill(Decoder):
    """Of the last layer it has what keys and values need."""

    def __init__(self, model: TextModel, *, context: int, kv_dtype: KvDtype) -> None:
        super().__init__(model, context=context, kv_dtype=kv_dtype)
        shape, below = model.geometry, model.last_cached
        self.layers = self.layers[: below + 1]
        last = self.layers[below]
        for name in {name for name, _ in last.named_children()} - {"self_attn", "input_layernorm"}:
            delattr(last, name)
        del last.layer_scalar
        for name in ("q_proj", "q_norm", "o_proj"):
            delattr(last.self_attn, name)
        del self.norm, self.lm_head
        if width := shape.hidden_size_per_layer_input:
            if below:
                self.per_layer_model_projection = ops.Linear(shape.hidden_size, below * width)
            else:
                del self.per_layer_model_projection, self.per_layer_projection_norm

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: Tensor,  # (1, S, hidden)
        per_layer_inputs: Tensor | None,  # (1, S, layers * P); None for a model without them
        attention_mask: Tensor,  # (1, T), only its sum counts
        position_ids: Tensor,  # (1, S)
        past: list[Tensor],  # keys and values of the layers that own a cache
    ) -> tuple[Tensor, ...]:
        step = read_prefill_step(self.constants, attention_mask, position_ids)
        *lower, last = self.layers
        extras = self._lower_extras(inputs_embeds, per_layer_inputs, len(lower))
        hidden = inputs_embeds
        present: list[Tensor] = []
        pasts = list(zip(past[::2], past[1::2], strict=True))
        for module, cache, extra in zip(lower, pasts, extras, strict=False):
            hidden, written = module.all_rows(hidden, cache, step, extra)
            present += written
        present += last.self_attn.write(last.input_layernorm(hidden), pasts[-1], step)
        return tuple(present)

    def _lower_extras(
        self, inputs_embeds: Tensor, per_layer_inputs: Tensor | None, count: int
    ) -> list[Tensor | None]:
        """The extra input of each of the first `count` layers, (1, S, P)."""
        if per_layer_inputs is None or not count:
            return [None] * count
        width = count * self.model.geometry.hidden_size_per_layer_input
        context = self.per_layer_model_projection(inputs_embeds)
        return self._mix(context, per_layer_inputs[:, :, :width], "below", count)
