"""The embedding graph: token ids to the decoder's two float inputs; it holds the big tables only."""

from __future__ import annotations

from torch import Tensor, nn

from ..geometry import TextModel
from .ops import Table


class Embeddings(nn.Module):
    """Scaled token embedding and, where the model has them, scaled rows of the per-layer table."""

    def __init__(self, model: TextModel) -> None:
        super().__init__()
        shape = model.geometry
        self.token_scale = shape.hidden_size**0.5
        self.embed_tokens = Table(shape.vocab_size, shape.hidden_size)
        self.per_layer_scale = shape.hidden_size_per_layer_input**0.5
        if shape.hidden_size_per_layer_input:
            width = shape.num_hidden_layers * shape.hidden_size_per_layer_input
            self.embed_tokens_per_layer: Table | None = Table(shape.vocab_size_per_layer_input, width)
        else:
            self.embed_tokens_per_layer = None

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        embedded = self.embed_tokens(input_ids) * self.token_scale  # (1, S, hidden)
        if self.embed_tokens_per_layer is None:
            return (embedded,)
        return embedded, self.embed_tokens_per_layer(input_ids) * self.per_layer_scale  # (1, S, layers * P)
