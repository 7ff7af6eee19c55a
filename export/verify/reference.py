"""transformers' own Gemma 4 text model over a checkpoint, float32, one decoder layer in memory at a time.

The model is built without weights; each layer gets its own from the checkpoint, runs every text, and gives
them back. Embedding tables are read by rows, the head in chunks of rows. Masks, rotary embeddings, KV sharing
and per-layer inputs go through transformers' code, so the results are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Gemma4TextConfig
from transformers.cache_utils import KVSharingDict
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma4.modeling_gemma4 import (
    Gemma4TextModel,
    Gemma4TextRotaryEmbedding,
    Gemma4TextScaledWordEmbedding,
)

from ..plan import HEAD, LAYER_TABLE, TOKEN_TABLE
from .tensors import SourceWeights

Observe = Callable[[int, int, Tensor], None]  # text, layer, hidden states after it (S, hidden)


@dataclass
class Carried:
    """What one text carries from layer to layer."""

    hidden: Tensor  # (1, S, hidden)
    extras: Tensor | None  # (1, S, layers, P) per-layer inputs
    positions: Tensor  # (1, S)
    rotary: dict[str, tuple[Tensor, Tensor]]  # layer type -> cos, sin
    masks: dict[str, Any]  # layer type -> transformers' mask, None where none is needed
    shared: KVSharingDict


@dataclass(frozen=True)
class Embedded:
    """What the embedding tables give for a text, as embeddings.onnx does."""

    tokens: Tensor  # (S, hidden)
    per_layer: Tensor | None  # (S, layers * P)


class Reference:
    """One checkpoint."""

    def __init__(self, weights: SourceWeights, *, attention: str | None = None) -> None:
        """attention: transformers' implementation; default its own choice."""
        config = AutoConfig.from_pretrained(weights.folder).get_text_config()
        self.config: Gemma4TextConfig = config
        if attention is not None:
            config._attn_implementation = attention
        with torch.device("meta"):
            self.model = Gemma4TextModel(config).eval().requires_grad_(False)
        self.model.rotary_emb = Gemma4TextRotaryEmbedding(config)
        self.weights = weights
        self.head = TOKEN_TABLE if config.tie_word_embeddings else HEAD

    @torch.no_grad()
    def embed(self, texts: Sequence[Sequence[int]]) -> list[Embedded]:
        """Rows of the embedding tables, scaled; only the rows in use are read."""
        used = sorted({token for text in texts for token in text})
        place = {token: index for index, token in enumerate(used)}
        compact = [torch.tensor([place[token] for token in text]) for text in texts]
        model, config = self.model, self.config
        tokens = self._table(TOKEN_TABLE, used, model.embed_tokens)
        if not config.hidden_size_per_layer_input:
            return [Embedded(tokens(ids), None) for ids in compact]
        per_layer = self._table(LAYER_TABLE, used, model.embed_tokens_per_layer)
        return [Embedded(tokens(ids), per_layer(ids)) for ids in compact]

    @torch.no_grad()
    def run(
        self, embedded: Sequence[Embedded], observe: Observe, progress: Callable[[str], None] = lambda _: None
    ) -> list[Tensor]:
        """Run all layers and return each text's normalised last hidden states (S, hidden)."""
        states = [self._start(text) for text in embedded]
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self._load, 0)
            for index in range(self.config.num_hidden_layers):
                weights = ahead.result()
                if index + 1 < self.config.num_hidden_layers:
                    ahead = pool.submit(self._load, index + 1)
                progress(f"reference layer {index}")
                self._run_layer(index, weights, states)
                for number, state in enumerate(states):
                    observe(number, index, state.hidden[0])
        _give(self.model.norm, {"weight": self._read("norm.weight")})
        return [self.model.norm(state.hidden)[0] for state in states]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) normalised -> (n, vocab), with the head in chunks of rows."""
        parts = [nn.functional.linear(hidden, rows) for rows in self._head_rows()]
        logits = torch.cat(parts, dim=-1)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _start(self, embedded: Embedded) -> Carried:
        """Everything that Gemma4TextModel.forward makes before its first layer."""
        model, hidden = self.model, embedded.tokens[None]
        count = hidden.shape[1]
        extras = None
        if embedded.per_layer is not None:
            _give(
                model.per_layer_model_projection, {"weight": self._read("per_layer_model_projection.weight")}
            )
            _give(model.per_layer_projection_norm, {"weight": self._read("per_layer_projection_norm.weight")})
            by_layer = embedded.per_layer.reshape(1, count, self.config.num_hidden_layers, -1)
            extras = model.project_per_layer_inputs(hidden, by_layer)
        positions = torch.arange(count)[None]
        wanted = dict(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        return Carried(
            hidden=hidden,
            extras=extras,
            positions=positions,
            rotary={kind: model.rotary_emb(hidden, positions, kind) for kind in set(self.config.layer_types)},
            masks={
                "full_attention": create_causal_mask(**wanted),
                "sliding_attention": create_sliding_window_causal_mask(**wanted),
            },
            shared=KVSharingDict(None),
        )

    def _run_layer(self, index: int, weights: dict[str, Tensor], states: Sequence[Carried]) -> None:
        layer, kind = self.model.layers[index], self.config.layer_types[index]
        _give(layer, weights)
        for state in states:
            state.hidden = layer(
                state.hidden,
                None if state.extras is None else state.extras[:, :, index, :],
                shared_kv_states=state.shared,
                position_embeddings=state.rotary[kind],
                attention_mask=state.masks[kind],
                position_ids=state.positions,
                past_key_values=None,
            )
        layer.to("meta")

    def _load(self, index: int) -> dict[str, Tensor]:
        prefix = f"layers.{index}."
        return {name: self._read(prefix + name) for name in self.model.layers[index].state_dict()}

    def _read(self, name: str) -> Tensor:
        return torch.from_numpy(self.weights.read(name))

    def _table(
        self, name: str, rows: list[int], whole: Gemma4TextScaledWordEmbedding
    ) -> Gemma4TextScaledWordEmbedding:
        """The embedding module with these rows only."""
        weight = torch.from_numpy(self.weights.rows_at(name, rows))
        table = Gemma4TextScaledWordEmbedding(
            *weight.shape, padding_idx=0, embed_scale=whole.scalar_embed_scale
        )
        _give(table, {"weight": weight})
        return table

    def _head_rows(self) -> Iterator[Tensor]:
        for rows in self.weights.rows(self.head):
            yield torch.from_numpy(rows)


def _give(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put `weights` in place of the module's own, uncopied; raises if one is missing or too many."""
    module.load_state_dict(weights, strict=True, assign=True)
    module.requires_grad_(False)
