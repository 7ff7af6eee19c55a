"""The decoder graph: embeddings in, logits and caches out. Parameters have the checkpoint's canonical names.

S new tokens, R kept rows (the last ones, whose logits are wanted), T tokens seen including the new ones.
Layers below the last one that owns a cache see all S rows. That layer computes keys and values for S rows and
the rest for R rows; the KV-shared layers above it write nothing and see R rows. R may be 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...runtime.bundle import KvDtype
from ..geometry import Layer, TextModel
from . import ops
from .attention import Attention, Cache, declare_attention_constants
from .constants import Constants
from .step import Step, declare_step_constants, read_step

# Products of the MLP may exceed float16's range: with float16 inside, up_proj's weights are stored times this
# (`plan` does so), and the norm after down_proj, which does not care for its input's scale, takes it out.
PRODUCT_GAIN = 2**-6

ACTIVATIONS = {
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "silu": functional.silu,
    "relu": functional.relu,
}


class Decoder(nn.Module):
    """The whole text model above its embedding tables.

    inner: the number type of attention and MLP. The residual stream, the per-layer inputs and the head, whose
    values have no bound that float16 could hold, are always float32.
    drafts: the kept rows' last hidden states are an output, for a drafter.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        context: int,
        kv_dtype: KvDtype,
        inner: torch.dtype = torch.float32,
        drafts: bool = False,
    ) -> None:
        super().__init__()
        shape = model.geometry
        self.model, self.drafts = model, drafts
        self.layers = nn.ModuleList([DecoderLayer(model, layer, inner) for layer in model.layers])
        self.norm = ops.RMSNorm(shape.hidden_size, model.rms_norm_eps)
        self.lm_head = ops.Linear(shape.hidden_size, shape.vocab_size)
        self.constants = Constants()
        if width := shape.hidden_size_per_layer_input:
            self.per_layer_model_projection = ops.Linear(shape.hidden_size, shape.num_hidden_layers * width)
            self.per_layer_projection_norm = ops.RMSNorm(width, model.rms_norm_eps)
            self._declare_splits()
        declare_step_constants(self.constants)
        declare_attention_constants(self.constants, model, context=context, kv_dtype=kv_dtype, inner=inner)

    def forward(
        self,
        inputs_embeds: Tensor,  # (1, S, hidden)
        per_layer_inputs: Tensor | None,  # (1, S, layers * P); None for a model without them
        attention_mask: Tensor,  # (1, T), only its sum counts
        position_ids: Tensor,  # (1, S)
        logits_to_keep: Tensor,  # (1,)
        kept_rows: Tensor,  # (R,) stands for the dimension R while tracing, never used as data
        past: list[Tensor],  # keys and values of the layers that own a cache
    ) -> tuple[Tensor, ...]:
        step = read_step(
            self.constants, self.model, attention_mask, position_ids, logits_to_keep, kept_rows, past
        )
        return self.run(inputs_embeds, per_layer_inputs, step, past)

    def run(
        self, inputs_embeds: Tensor, per_layer_inputs: Tensor | None, step: Step, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        last_cached = self.model.last_cached
        extras = self._per_layer_extras(inputs_embeds, per_layer_inputs, step)
        hidden = inputs_embeds
        caches: dict[int, Cache] = {}
        pasts = iter(zip(past[::2], past[1::2], strict=True))
        present: list[Tensor] = []
        for module, extra in zip(self.layers, extras, strict=True):
            layer = module.layer
            if layer.index < last_cached:
                hidden, caches[layer.index] = module.all_rows(hidden, next(pasts), step, extra)
            elif layer.index == last_cached:
                hidden, caches[layer.index] = self.last_cached(module, hidden, next(pasts), step, extra)
            else:
                hidden = module.kept_rows(hidden, caches[layer.source], step, extra)
            if not layer.is_shared:
                present += caches[layer.index]
        hidden = self.norm(hidden)
        logits = self.lm_head(hidden)  # (1, R, vocab)
        if (cap := self.model.geometry.final_logit_softcapping) is not None:
            logits = torch.tanh(logits / cap) * cap
        return (logits, *present, hidden) if self.drafts else (logits, *present)

    def last_cached(
        self, module: DecoderLayer, hidden: Tensor, past: Cache, step: Step, extra: Tensor | None
    ) -> tuple[Tensor, Cache]:
        """The last layer that owns a cache: all rows in, the kept ones out."""
        return module.last_cached(hidden, past, step, extra)

    def _per_layer_extras(
        self, inputs_embeds: Tensor, per_layer_inputs: Tensor | None, step: Step
    ) -> list[Tensor | None]:
        """The extra input of each layer: (1, S, P) below the last cached layer, (1, R, P) from there on."""
        count = self.model.geometry.num_hidden_layers
        if per_layer_inputs is None:
            return [None] * count
        context = self.per_layer_model_projection(inputs_embeds)  # (1, S, layers * P)
        below = self.model.last_cached
        if below == 0:
            return self._mix(step.kept.of(context), step.kept.of(per_layer_inputs), "above", count)
        context_below, context_above = self._split(context, "parts", below, count - below)
        below_inputs, above_inputs = self._split(per_layer_inputs, "parts", below, count - below)
        return [
            *self._mix(context_below, below_inputs, "below", below),
            *self._mix(step.kept.of(context_above), step.kept.of(above_inputs), "above", count - below),
        ]

    def _mix(self, context: Tensor, identity: Tensor, name: str, layers: int) -> list[Tensor | None]:
        """Both (1, rows, layers * P): projected embedding, normalised for each layer, plus table row."""
        shape = self.model.geometry
        width = shape.hidden_size_per_layer_input
        scaled = context * shape.hidden_size**-0.5
        by_layer = ops.reshape(
            scaled, self.constants[f"{name}_by_layer"], (*context.shape[:2], layers, width)
        )
        normed = ops.reshape(
            self.per_layer_projection_norm(by_layer), self.constants[f"{name}_flat"], context.shape
        )
        return [*self._split((normed + identity) * 2**-0.5, name, *[1] * layers)]

    def _split(self, x: Tensor, name: str, *layers: int) -> list[Tensor]:
        """x cut along its last axis, so many layers' shares to each part."""
        width = self.model.geometry.hidden_size_per_layer_input
        if len(layers) == 1:
            return [x]
        return list(ops.split(x, self.constants[f"split_{name}"], [count * width for count in layers]))

    def _declare_splits(self) -> None:
        shape, below = self.model.geometry, self.model.last_cached
        width, above = shape.hidden_size_per_layer_input, shape.num_hidden_layers - below
        self.constants.integers("split_parts", below * width, above * width)
        for name, count in (("below", below), ("above", above)):
            self.constants.integers(f"{name}_by_layer", 0, 0, count, width)
            self.constants.integers(f"{name}_flat", 0, 0, count * width)
            self.constants.integers(f"split_{name}", *[width] * count)


class DecoderLayer(nn.Module):
    """Attention, gated MLP and the per-layer input, each added to the residual stream through a norm."""

    def __init__(self, model: TextModel, layer: Layer, inner: torch.dtype = torch.float32) -> None:
        super().__init__()
        shape, eps = model.geometry, model.rms_norm_eps
        gain = PRODUCT_GAIN if inner == torch.float16 else 1.0
        self.layer = layer
        self.self_attn = Attention(model, layer, inner)
        self.mlp = Mlp(shape.hidden_size, layer.intermediate_size, model.activation, inner)
        self.input_layernorm = ops.RMSNorm(shape.hidden_size, eps, inner)
        self.post_attention_layernorm = ops.RMSNorm(shape.hidden_size, eps)
        self.pre_feedforward_layernorm = ops.RMSNorm(shape.hidden_size, eps, inner)
        self.post_feedforward_layernorm = ops.RMSNorm(shape.hidden_size, eps * gain**2)
        self.register_buffer("layer_scalar", torch.empty(1))
        self.activation = ACTIVATIONS[model.activation]
        if width := shape.hidden_size_per_layer_input:
            self.per_layer_input_gate = ops.Linear(shape.hidden_size, width)
            self.per_layer_projection = ops.Linear(width, shape.hidden_size)
            self.post_per_layer_input_norm = ops.RMSNorm(shape.hidden_size, eps)

    def all_rows(
        self, hidden: Tensor, past: Cache, step: Step, extra: Tensor | None, *, keeps: bool = False
    ) -> tuple[Tensor, Cache]:
        """keeps: all rows attend, the kept ones go on."""
        x = self.input_layernorm(hidden)
        attended, present = self.self_attn.write_and_attend(x, past, step, keeps=keeps)
        return self._rest(step.kept.of(hidden) if keeps else hidden, attended, extra), present

    def last_cached(
        self, hidden: Tensor, past: Cache, step: Step, extra: Tensor | None
    ) -> tuple[Tensor, Cache]:
        x = self.input_layernorm(hidden)
        present = self.self_attn.write(x, past, step)
        attended = self.self_attn.read(step.kept.of(x), present, step)
        return self._rest(step.kept.of(hidden), attended, extra), present

    def kept_rows(self, hidden: Tensor, cache: Cache, step: Step, extra: Tensor | None) -> Tensor:
        return self._rest(hidden, self.self_attn.read(self.input_layernorm(hidden), cache, step), extra)

    def _rest(self, hidden: Tensor, attended: Tensor, extra: Tensor | None) -> Tensor:
        """Everything after the attention. extra: this layer's share of the per-layer inputs."""
        hidden = hidden + self.post_attention_layernorm(attended)
        hidden = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        if extra is not None:
            gated = self.activation(self.per_layer_input_gate(hidden)) * extra
            hidden = hidden + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return hidden * self.layer_scalar


class Mlp(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str,
        inner: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.gate_proj = ops.Linear(hidden_size, intermediate_size, inner)
        self.up_proj = ops.Linear(hidden_size, intermediate_size, inner)
        self.down_proj = ops.Linear(intermediate_size, hidden_size, inner)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
