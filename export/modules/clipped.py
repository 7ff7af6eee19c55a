"""Linear layers between clip bounds that the checkpoint fixes, and clipping to a number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops

FLOAT_MAX = torch.finfo(torch.float32).max


class ClippedLinear(nn.Module):
    """clip(clip(x) W^T): the bounds are scalars of the checkpoint, infinite where nothing is clipped."""

    def __init__(self, in_features: int, out_features: int, *, clipped: bool) -> None:
        super().__init__()
        self.linear = ops.Linear(in_features, out_features)
        self.clipped = clipped
        if clipped:
            for name in ("input_min", "input_max", "output_min", "output_max"):
                self.register_buffer(name, torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.clipped:
            return self.linear(x)
        y = self.linear(ops.clip(x, self.get_buffer("input_min"), self.get_buffer("input_max")))
        return ops.clip(y, self.get_buffer("output_min"), self.get_buffer("output_max"))


def clip(x: Tensor, limit: float) -> Tensor:
    """To -limit … limit, which float32 may not reach."""
    limit = min(limit, FLOAT_MAX)
    return ops.clip(x, torch.full((), -limit), torch.full((), limit))
