"""What a decode step by our own kernels needs to know: layers, products, and where their weights lie.

`decode_step.json` is written by the exporter from decoder_cuda.onnx, whose data file holds the weights;
vectors that the graph holds inline or in another type (norm weights, small rotary tables) are in
`decode_step.npz`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from ..bundle import DECODE_STEP, DECODE_STEP_VECTORS, Bundle
from ..errors import BundleError
from ..strict import convert

Activation = Literal["gelu_pytorch_tanh", "gelu", "silu", "relu"]


class Region(Struct, frozen=True):
    """An initializer of the graph in its data file."""

    name: str
    file: str
    offset: int  # bytes
    dtype: Literal["uint8", "float16", "float32"]
    shape: tuple[int, ...]


class Product(Struct, frozen=True):
    """A matrix as MatMulNBits holds it: (rows, blocks, bytes), symmetric, one scale a block."""

    rows: int
    width: int
    bits: Literal[2, 4, 8]
    block: int  # weights
    weights: Region
    scales: Region  # (rows, blocks)

    @property
    def row_bytes(self) -> int:
        return -(-self.width // self.block) * self.block * self.bits // 8


class StepLayer(Struct, frozen=True):
    """One layer. Its vectors in the npz: `layers.{index}.{norm}.weight`, as the checkpoint names them."""

    head_dim: int
    kv_heads: int
    sliding: bool
    cache: int  # number of the cache that it reads: `past_key_values.{cache}`
    writes: bool  # that cache is its own
    scalar: float
    attention: tuple[Product, ...]  # rows of queries[, keys[, values]]; without values, they are the keys
    o_proj: Product
    gate_proj: Product
    up_proj: Product
    down_proj: Product
    down_eps: float  # of the norm after it
    per_layer_input_gate: Product | None = None
    per_layer_projection: Product | None = None


class StepPlan(Struct, frozen=True):
    """A whole step. Rotary tables in the npz or as regions: (context, head_dim / 2) float16 by layer type."""

    hidden_size: int
    heads: int
    eps: float
    activation: Activation
    softcap: float  # 0: none
    layers: tuple[StepLayer, ...]
    head: Product
    rotary: dict[str, Region]  # "cos_full_attention", …; those that are not here are in the npz
    per_layer_model_projection: Product | None = None

    def products(self) -> Iterator[Product]:
        """All that a step reads."""
        if self.per_layer_model_projection is not None:
            yield self.per_layer_model_projection
        for layer in self.layers:
            yield from (*layer.attention, layer.o_proj, layer.gate_proj, layer.up_proj, layer.down_proj)
            if layer.per_layer_input_gate is not None and layer.per_layer_projection is not None:
                yield from (layer.per_layer_input_gate, layer.per_layer_projection)
        yield self.head

    def regions(self) -> Iterator[Region]:
        for product in self.products():
            yield from (product.weights, product.scales)
        yield from self.rotary.values()


@dataclass(frozen=True)
class StepFiles:
    """The plan with its vectors."""

    plan: StepPlan
    vectors: dict[str, np.ndarray]
    folder: Path

    def read(self, region: Region) -> np.ndarray:
        """The initializer's values, mapped."""
        return np.memmap(
            self.folder / region.file, region.dtype, "r", offset=region.offset, shape=region.shape
        )


def read_step(bundle: Bundle) -> StepFiles | None:
    """The bundle's plan; None if it has none. Raises BundleError for one that cannot be read."""
    path = bundle.path / DECODE_STEP
    if not path.exists():  # one that the manifest names is there: `open_bundle` has looked
        return None
    try:
        plan = convert(msgspec.json.decode(path.read_bytes()), StepPlan, str(path), BundleError)
        with np.load(bundle.path / DECODE_STEP_VECTORS, allow_pickle=False) as found:
            vectors = dict(found)
    except (OSError, ValueError, msgspec.DecodeError) as cause:
        raise BundleError(f"{path}: cannot be read ({cause}); export the bundle again") from cause
    return StepFiles(plan, vectors, bundle.path)
