"""Initializers that are not in the checkpoint: declared while tracing, given their values afterwards."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

ReadTensor = Callable[[str], np.ndarray]  # canonical name -> float32 values
Make = Callable[[ReadTensor], np.ndarray]


class Constants(nn.Module):
    """Named buffers without values, each with the function that makes its value. Names have no dots."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[str, Make] = {}
        self.reads: dict[str, tuple[int, ...]] = {}  # tensors that makers read and no graph holds as they are

    def declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Make) -> None:
        if name not in self.makers:
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
            self.makers[name] = make

    def integers(self, name: str, *values: int) -> None:
        self.declare(name, (len(values),), torch.int64, lambda _: np.array(values, np.int64))

    def filled(
        self, name: str, shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32
    ) -> None:
        self.declare(name, shape, dtype, lambda _: np.full(shape, value, np.float32))

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name)
