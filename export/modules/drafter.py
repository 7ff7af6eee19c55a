"""The drafter graph: one token and the target's hidden state in, the next token and a hidden state out.

It reads the target's caches and writes none, so a chain of guesses runs it again and again at one position:
that of the token that was picked last, which the target has not run yet. Its parameters have the names of the
drafter's checkpoint.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ...runtime.bundle import KvDtype, LayerType
from ..drafter_geometry import DrafterModel
from ..geometry import Layer
from . import ops
from .attention import declare_attention_constants
from .constants import Constants, ReadTensor
from .decoder import DecoderLayer
from .step import AllRows, Step, _lengths, _resident, declare_step_constants
from .values import cache_scales

ORDER = "token_ordering"
TARGET = "target."  # before the names of tensors that are read from the target's checkpoint


class Drafter(nn.Module):
    """A `gemma4_assistant` over the caches of its target."""

    def __init__(self, model: DrafterModel, *, context: int, kv_dtype: KvDtype) -> None:
        super().__init__()
        text = model.text
        shape, backbone = text.geometry, model.target.geometry.hidden_size
        self.model = model
        self.pre_projection = ops.Linear(2 * backbone, shape.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(text, layer) for layer in text.layers])
        self.norm = ops.RMSNorm(shape.hidden_size, text.rms_norm_eps)
        self.post_projection = ops.Linear(shape.hidden_size, backbone)
        self.constants = Constants()
        head: nn.Module
        if model.centroids is None:
            head = ops.Linear(shape.hidden_size, shape.vocab_size)
        else:
            head = ops.Table(shape.vocab_size, shape.hidden_size)
            self.masked_embedding = nn.Module()
            self.masked_embedding.centroids = ops.Linear(shape.hidden_size, model.centroids.count)
            groups = (model.centroids.count, shape.vocab_size // model.centroids.count)
            self.constants.declare(ORDER, groups, torch.int64, _read_order)
        self.head_name = "embed_tokens" if text.tied_head else "lm_head"
        self.add_module(self.head_name, head)
        declare_step_constants(self.constants)
        declare_attention_constants(self.constants, text, context=context, kv_dtype=kv_dtype)
        if kv_dtype == "int8":
            self._declare_scales()

    def forward(
        self,
        inputs_embeds: Tensor,  # (1, 1, backbone) the token's row, as the target gets it
        hidden_states: Tensor,  # (1, 1, backbone) the target's after its last norm, or those given back
        attention_mask: Tensor,  # (1, T) T tokens are in the caches
        position_ids: Tensor,  # (1, 1) T
        past: list[Tensor],  # keys and values of the target's caches that are read, by layer type
    ) -> tuple[Tensor, ...]:
        types = list(self.model.sources)
        caches = {name: (past[2 * at], past[2 * at + 1]) for at, name in enumerate(types)}
        step = self._step(attention_mask, position_ids, caches)
        hidden = self.pre_projection(torch.cat([inputs_embeds, hidden_states], dim=-1))
        for module in self.layers:
            hidden = module.kept_rows(hidden, caches[module.layer.layer_type], step, None)
        hidden = self.norm(hidden)
        scores, ids = self._scores(hidden)
        best = scores.argmax(dim=-1)  # (1, 1)
        largest = scores.amax(dim=-1, keepdim=True)
        probability = 1 / torch.exp(scores - largest).sum(dim=-1)  # (1, 1) of the best among those scored
        token = best if ids is None else torch.gather(ids, 1, best)
        outputs = token, probability, self.post_projection(hidden), scores
        return outputs if ids is None else (*outputs, ids)

    def _scores(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of all tokens (1, 1, vocab), or of some (1, 1, N) with their ids (1, N)."""
        head = getattr(self, self.head_name)
        if self.model.centroids is None:
            return head(hidden), None
        nearest = torch.topk(self.masked_embedding.centroids(hidden), self.model.centroids.chosen, dim=-1)
        ids = torch.index_select(self.constants[ORDER], 0, nearest.indices.reshape(-1)).reshape(1, -1)
        return ops.matmul(hidden, head(ids).transpose(1, 2)), ids

    def _step(
        self, attention_mask: Tensor, position_ids: Tensor, caches: dict[LayerType, tuple[Tensor, Tensor]]
    ) -> Step:
        total = attention_mask.sum(dim=1)  # (1,) T
        resident = total
        if "sliding_attention" in caches:
            capacity = ops.dimension(caches["sliding_attention"][0], 2)
            window = self.model.target.geometry.sliding_window
            resident = _resident(self.constants, total, capacity, window)
        one = self.constants["int_1"]
        full = _lengths(self.constants, total - one)
        return Step(
            constants=self.constants,
            kept=AllRows(),
            positions=position_ids,
            query_positions=position_ids,
            past_length=total,
            written=full,
            read_full=full,
            read_sliding=_lengths(self.constants, resident - one),
        )

    def _declare_scales(self) -> None:
        """Of the target's int8 caches."""
        for layer in self.model.sources.values():
            for part, name in enumerate(("key", "value")):
                shape = (1, layer.kv_heads, 1, layer.head_dim)
                make = partial(_scales, self.model, layer, part)
                self.constants.declare(f"{name}_scale_{layer.index}", shape, torch.float32, make)


def _read_order(read: ReadTensor) -> np.ndarray:
    return read(f"masked_embedding.{ORDER}")


def _scales(model: DrafterModel, layer: Layer, part: int, read: ReadTensor) -> np.ndarray:
    key_norm = read(f"{TARGET}layers.{layer.index}.self_attn.k_norm.weight")
    return cache_scales(key_norm, model.target.rope[layer.layer_type], layer.head_dim, layer.kv_heads)[part]
