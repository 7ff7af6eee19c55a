"""One decode step as a list of kernel launches, recorded once and replayed for every token.

    position, rows of the embedding tables (pinned memory) -> copied -> kernels -> logits, id (pinned memory)

Between the products nothing is left but attention: `decode_step.cu` says what a product takes in with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .plan import Product, StepFiles, StepLayer

ACTIVATIONS = {"gelu_pytorch_tanh": 0, "gelu": 1, "silu": 2, "relu": 3}
BRANCH, NORM, BOUNDED = 1, 2, 4  # what a product's input is, as the kernel has it
WARP = 32
MOST_WARPS = 16  # of a block of a product
LEAST_WARPS = 8
BLOCKS_AT_ONCE = 2  # blocks of 16 warps that fit on a multiprocessor
TURNS = {1: (5, 4, 3, 2, 1), 2: (3, 2, 1)}  # reads of a lane that are under way at once, by rows of a warp
TURN_BYTES = 8 * WARP  # of a row: what a warp reads in one turn
ATTENTION_THREADS = 256
SLIDING_SPLITS, FULL_SPLITS = 8, 32  # of the keys among blocks; at most 32
LARGE_HEAD = 512  # of these a block takes one at a time, of others two
STRIP = 8  # values of a row that a block of `make_room` moves
ALIGNMENT_BYTES = 256
PICK_THREADS = 512
# The kernels' struct of a sliding cache.
SLIDING = np.dtype(
    [("keys", "u8"), ("values", "u8"), *((name, "i4") for name in ("kv_heads", "capacity", "dim", "unused"))]
)


class Memory(Protocol):
    """Something on the device, kept as long as this is."""

    @property
    def pointer(self) -> int: ...

    def exported(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Any:
        """What speaks DLPack for these bytes."""
        ...


class Pinned(Memory, Protocol):
    """Memory of the host that the device reads and writes."""

    @property
    def bytes(self) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Launch:
    """A kernel by its name in C++, with its template's arguments."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Any, ...]  # int: a pointer; numpy scalars


class Device(Protocol):
    """Where launches are recorded: a GPU, or in tests a CPU that does as it would."""

    multiprocessors: int

    def array(self, values: npt.NDArray[Any]) -> Memory: ...

    def zeros(self, count_bytes: int) -> Memory: ...

    def pinned(self, count_bytes: int) -> Pinned: ...

    def record(
        self, copy: tuple[Memory, Pinned], launches: Sequence[Launch], *, capture: bool = True
    ) -> Callable[[], None]:
        """What copies, runs the launches in order and waits for them. capture: as one CUDA graph."""
        ...


@dataclass(frozen=True)
class Branch:
    """What is still to be added to the residual stream, normalised."""

    pointer: int
    weight: int
    eps: float
    scale: float


class DecodeStep:
    """Set `position` and the embedded rows, `run`; then `token` is the id with the largest logit."""

    def __init__(
        self,
        files: StepFiles,
        device: Device,
        *,
        initializers: Mapping[str, int],
        caches: Mapping[str, int],
        logits: int,
        window: int,
        context: int,
        rows: Mapping[str, int],
        capture: bool = True,
    ) -> None:
        """Pointers to device memory: `initializers` by the names in the plan, `caches` as `3.key`, `logits`.

        rows: how many float32 values each output of the embeddings graph has.
        """
        self._plan, self._device, self._initializers = files.plan, device, initializers
        self._caches, self._window, self._context = caches, window, context
        self._kept: list[Memory] = []
        self._vectors = {name: self._array(values) for name, values in files.vectors.items()}
        places, end = {}, ALIGNMENT_BYTES  # the position comes first
        for name, count in rows.items():
            places[name] = end
            end += -(-4 * count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._host, self._result = device.pinned(end), device.pinned(ALIGNMENT_BYTES)
        there = device.zeros(end)
        self._kept.append(there)
        self._position = there.pointer
        self._there = {name: there.pointer + place for name, place in places.items()}
        self.position = self._host.bytes[:8].view(np.int64)
        self.rows = {
            name: self._host.bytes[place : place + 4 * rows[name]].view(np.float32)
            for name, place in places.items()
        }
        self._token = self._result.bytes[:8].view(np.int64)
        self.launches: list[Launch] = []
        self._build(logits)
        self.run = device.record((there, self._host), self.launches, capture=capture)

    @property
    def token(self) -> int:
        """The first id with the largest of the last run's logits."""
        return int(self._token[0])

    def _build(self, logits: int) -> None:
        plan, layers = self._plan, self._plan.layers
        hidden = self._zeros(4 * plan.hidden_size), self._zeros(4 * plan.hidden_size)
        branch = self._zeros(4 * plan.hidden_size)
        most = max(sum(product.rows for product in layer.attention) for layer in layers)
        projected = self._zeros(4 * most)
        attended = self._zeros(4 * max(plan.heads * layer.head_dim for layer in layers))
        gated = self._zeros(4 * max(layer.gate_proj.rows for layer in layers))
        splits = max(SLIDING_SPLITS, FULL_SPLITS)
        partial = self._zeros(4 * plan.heads * splits * (max(layer.head_dim for layer in layers) + 4))
        counters = self._zeros(4 * plan.heads)
        self._make_room()
        extras, width = self._per_layer_inputs()
        self._states = [*hidden]
        x, pending = self._there["inputs_embeds"], None
        for index, layer in enumerate(layers):
            x = self._attention(index, layer, x, pending, projected, attended, partial, counters)
            # A mean of values, whose root mean square is 1: none is above the root of the head's size.
            self._product(layer.o_proj, attended, branch, bounded=True)
            pending = Branch(branch, self._norm(index, "post_attention_layernorm"), plan.eps, 1.0)
            x = self._product(
                layer.gate_proj,
                x,
                gated,
                up=layer.up_proj,
                branch=pending,
                norm=self._norm(index, "pre_feedforward_layernorm"),
            )
            self._product(layer.down_proj, gated, branch)
            scale = 1.0 if layer.per_layer_input_gate else layer.scalar
            pending = Branch(branch, self._norm(index, "post_feedforward_layernorm"), layer.down_eps, scale)
            if layer.per_layer_input_gate is not None and layer.per_layer_projection is not None:
                other = extras + 4 * index * width
                x = self._product(layer.per_layer_input_gate, x, gated, branch=pending, other=other)
                self._product(layer.per_layer_projection, gated, branch)
                norm = self._norm(index, "post_per_layer_input_norm")
                pending = Branch(branch, norm, plan.eps, layer.scalar)
        self._head(x, pending, logits)

    def _per_layer_inputs(self) -> tuple[int, int]:
        """Where each layer's share is, and its width."""
        plan, product = self._plan, self._plan.per_layer_model_projection
        if product is None:
            return 0, 0
        width = product.rows // len(plan.layers)
        context, extras = self._zeros(4 * product.rows), self._zeros(4 * product.rows)
        self._product(product, self._there["inputs_embeds"], context)
        arguments = (
            context,
            self._vectors["per_layer_projection_norm.weight"],
            self._there["per_layer_inputs"],
            np.int32(width),
            np.float32(plan.hidden_size**-0.5),
            np.float32(2**-0.5),
            np.float32(plan.eps),
            extras,
        )
        self.launches.append(Launch("mix", (len(plan.layers), 1, 1), 256, 0, arguments))
        return extras, width

    def _attention(
        self,
        index: int,
        layer: StepLayer,
        x: int,
        pending: Branch | None,
        projected: int,
        attended: int,
        partial: int,
        counters: int,
    ) -> int:
        """Projections, the new row of the cache, attention; returns where the residual stream is."""
        plan, dim = self._plan, layer.head_dim
        first = 0
        for product in layer.attention:
            norm = self._norm(index, "input_layernorm")
            x = self._product(product, x, projected + 4 * first, branch=pending, norm=norm)
            first, pending = first + product.rows, None
        queries = plan.heads * dim
        keys = projected + 4 * queries
        values = keys if first == queries + layer.kv_heads * dim else keys + 4 * layer.kv_heads * dim
        kind = "sliding_attention" if layer.sliding else "full_attention"
        cos, sin = self._rotary(f"cos_{kind}"), self._rotary(f"sin_{kind}")
        cache = [self._caches[f"{layer.cache}.{part}"] for part in ("key", "value")]
        key_norm = self._norm(index, "self_attn.k_norm") if layer.writes else 0
        each = plan.heads // layer.kv_heads
        together = 2 if dim < LARGE_HEAD and each % 2 == 0 else 1
        splits = SLIDING_SPLITS if layer.sliding else FULL_SPLITS
        arguments = (
            *(projected, keys, values, self._norm(index, "self_attn.q_norm"), key_norm),
            *(cos, sin, self._position, *cache),
            np.int32(self._capacity(layer)),
            np.int32(layer.sliding),
            np.int32(each),
            np.float32(plan.eps),
            *(partial, counters, attended),
        )
        kernel = f"attend<{dim}, {together}, {str(layer.writes).lower()}>"
        grid = (plan.heads // together, splits, 1)
        self.launches.append(Launch(kernel, grid, ATTENTION_THREADS, 0, arguments))
        return x

    def _make_room(self) -> None:
        """First of all: every full sliding cache loses its oldest row."""
        sliding = [layer for layer in self._plan.layers if layer.writes and layer.sliding]
        if not sliding:
            return
        table = np.zeros(len(sliding), SLIDING)
        for row, layer in zip(table, sliding, strict=True):
            row["keys"], row["values"] = (self._caches[f"{layer.cache}.{part}"] for part in ("key", "value"))
            row["kv_heads"], row["capacity"] = layer.kv_heads, self._capacity(layer)
            row["dim"] = layer.head_dim
        strips = max(layer.kv_heads * layer.head_dim // STRIP for layer in sliding)
        arguments = (self._array(table), self._position)
        self.launches.append(Launch("make_room", (strips, len(sliding), 2), 128, 0, arguments))

    def _capacity(self, layer: StepLayer) -> int:
        """Tokens. Without slack a sliding cache holds one window."""
        return min(self._window, self._context) if layer.sliding else self._context

    def _head(self, x: int, pending: Branch | None, logits: int) -> None:
        head = self._plan.head
        grid = self._grid(head.rows // rows_of_a_warp(head, "LOGITS"))[0]
        values, rows = self._zeros(4 * grid), self._zeros(4 * grid)
        self._product(head, x, logits, branch=pending, norm=self._vectors["norm.weight"], best=(values, rows))
        arguments = (values, rows, np.int32(grid), self._result.pointer)
        self.launches.append(Launch("pick", (1, 1, 1), PICK_THREADS, 0, arguments))

    def _product(
        self,
        product: Product,
        x: int,
        out: int,
        *,
        branch: Branch | None = None,
        norm: int = 0,
        up: Product | None = None,
        other: int = 0,
        best: tuple[int, int] | None = None,
        bounded: bool = False,
    ) -> int:
        """Launch out = W input; returns where the residual stream is: x, or x with the branch added."""
        result = "LOGITS" if best else "GATED" if up else "TIMES" if other else "STORE"
        rows = rows_of_a_warp(product, result)
        turns = -(-product.row_bytes // TURN_BYTES)
        updated = 0
        if branch is not None:
            updated = next(state for state in self._states if state != x)
        scale = "float" if product.scales.dtype == "float32" else "u16"
        of = (BRANCH if branch else 0) | (NORM if norm else 0) | (BOUNDED if bounded else 0)
        grid, warps = self._grid(product.rows if up else product.rows // rows)
        loads, at_once = -(-product.width // (8 * warps * WARP)), turns_at_once(turns, rows)
        whole = str(product.row_bytes % (at_once * TURN_BYTES) == 0).lower()
        template = f"{product.bits}, {scale}, {result}, {of}, {rows}, {at_once}, {loads}, {whole}"
        lane_bytes = 4 if product.bits == 8 else 2  # of a value in shared memory
        shared = turns * WARP * (64 // product.bits) * lane_bytes
        parts = (product, up or product)
        arguments = (
            *(self._initializers[part.weights.name] for part in parts),
            *(self._initializers[part.scales.name] for part in parts),
            np.int32(product.rows),
            np.int32(product.width),
            np.int32(product.row_bytes),
            np.int32(product.block.bit_length() - 1),
            x,
            branch.pointer if branch else 0,
            branch.weight if branch else 0,
            norm,
            updated,
            np.float32(branch.eps if branch else 0),
            np.float32(self._plan.eps),
            np.float32(branch.scale if branch else 1),
            out,
            other,
            np.int32(ACTIVATIONS[self._plan.activation]),
            np.float32(self._plan.softcap),
            *(best or (0, 0)),
        )
        self.launches.append(Launch(f"product<{template}>", (grid, 1, 1), warps * WARP, shared, arguments))
        return updated or x

    def _grid(self, units: int) -> tuple[int, int]:
        """Blocks, and warps of each, for so many warps' work: every multiprocessor has some."""
        processors = self._device.multiprocessors
        warps = min(max(-(-units // processors), LEAST_WARPS), MOST_WARPS)
        return min(-(-units // warps), BLOCKS_AT_ONCE * processors), warps

    def _norm(self, index: int, name: str) -> int:
        return self._vectors[f"layers.{index}.{name}.weight"]

    def _rotary(self, name: str) -> int:
        region = self._plan.rotary.get(name)
        return self._vectors[name] if region is None else self._initializers[region.name]

    def _array(self, values: npt.NDArray[Any]) -> int:
        self._kept.append(self._device.array(values))
        return self._kept[-1].pointer

    def _zeros(self, count_bytes: int) -> int:
        self._kept.append(self._device.zeros(count_bytes))
        return self._kept[-1].pointer


def rows_of_a_warp(product: Product, result: str) -> int:
    """How many rows a warp computes at once: the kernel's ROWS."""
    if result == "GATED":
        return 2  # one of each matrix
    return 2 if result == "LOGITS" and product.rows % 2 == 0 else 1


def turns_at_once(turns: int, rows: int) -> int:
    """The kernel's TURNS: the fewest that go to waste, then the most at once."""
    return min(TURNS[rows], key=lambda count: (-turns % count, -count))
