"""What an export will write, worked out beforehand: storage of every weight, sizes, memory needed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..runtime.bundle import Caches, KvDtype, Memory
from ..runtime.errors import ConfigError, GemmaEdgeError
from ..runtime.profile import DeviceProfile
from .geometry import TextModel, plan_caches
from .modules import ops
from .modules.decoder import Decoder
from .modules.embeddings import Embeddings
from .recipes import BLOCK_MIN, Recipe, Storage, decide

DECODER_DATA = "decoder.onnx.data"
EMBEDDINGS_DATA = "embeddings.onnx.data"
HEAD = "lm_head.weight"
TOKEN_TABLE = "embed_tokens.weight"

# Python, numpy, onnxruntime and a SentencePiece tokenizer, resident before a model is loaded.
PROCESS_BYTES = 140 << 20
# Activations that live at once in a prefill chunk, in multiples of one row of the widest layer.
LIVE_ROWS = 6


@dataclass(frozen=True)
class PlannedWeight:
    """A matrix that is streamed to a data file."""

    name: str  # canonical
    shape: tuple[int, int]
    storage: Storage
    file: str
    is_table: bool  # rows are looked up, not multiplied

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.shape[1] // self.storage.block)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without its scales."""
        if self.storage.bits == 32:
            return self.shape[1] * 4
        return self.blocks * self.storage.block * self.storage.bits // 8

    @property
    def data_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def scale_bytes(self) -> int:
        return 0 if self.storage.bits == 32 else self.shape[0] * self.blocks * 4

    @property
    def size_bytes(self) -> int:
        return self.data_bytes + self.scale_bytes


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    weights: tuple[PlannedWeight, ...]
    small: dict[str, tuple[int, ...]]  # norms and scalars: float32, inside the graph
    caches: Caches
    memory: Memory
    head: str  # the weight that the head multiplies with: its own, or the token table's

    @property
    def file_bytes(self) -> int:
        """Size of the data files, but for alignment."""
        return sum(weight.size_bytes for weight in self.weights)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must have."""
        return {weight.name: weight.shape for weight in self.weights} | self.small


def make_plan(
    model: TextModel, profile: DeviceProfile, recipe: Recipe, *, context: int, kv_dtype: KvDtype | None = None
) -> Plan:
    """Decide storage and predict memory. Raises BudgetError when the device has too little of it."""
    weights, small = _weights(model, profile, recipe)
    head = TOKEN_TABLE if model.tied_head else HEAD
    dtype = kv_dtype or profile.kv_cache.dtype

    def at(tokens: int) -> tuple[Caches, Memory]:
        caches = plan_caches(model, context=tokens, sliding_slack=profile.kv_cache.sliding_slack, dtype=dtype)
        return caches, _predict(model, profile, weights, small, caches, head)

    caches, memory = at(context)
    budget = profile.memory.budget_mib << 20
    if total_bytes(memory) > budget:
        fits = _largest_context(lambda tokens: total_bytes(at(tokens)[1]) <= budget, context)
        raise BudgetError(_over_budget(profile, memory, context, fits))
    return Plan(weights, small, caches, memory, head)


class BudgetError(GemmaEdgeError):
    """The model with this context does not fit the device."""


def total_bytes(memory: Memory) -> int:
    """What counts against the budget: mapped tables do not, the system may drop their pages at any time."""
    return memory.weights_bytes + memory.kv_bytes + memory.overhead_bytes


def _weights(
    model: TextModel, profile: DeviceProfile, recipe: Recipe
) -> tuple[tuple[PlannedWeight, ...], dict[str, tuple[int, ...]]]:
    with torch.device("meta"):
        embeddings = Embeddings(model)
        decoder = Decoder(model, context=1, kv_dtype="float32")
    weights: list[PlannedWeight] = []
    small: dict[str, tuple[int, ...]] = {}
    for file, module in ((EMBEDDINGS_DATA, embeddings), (DECODER_DATA, decoder)):
        for prefix, part in module.named_modules():
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            for suffix, tensor in own:
                name = f"{prefix}.{suffix}"
                if name.startswith("constants.") or (name == HEAD and model.tied_head):
                    continue
                shape = tuple(tensor.shape)
                if isinstance(part, ops.Linear | ops.Table):
                    storage = decide(recipe, profile, name, shape[1])
                    weights.append(PlannedWeight(name, shape, storage, file, isinstance(part, ops.Table)))
                else:
                    small[name] = shape
    for weight in weights:
        _refuse_padded_table(weight)
    return tuple(weights), small


def _refuse_padded_table(weight: PlannedWeight) -> None:
    """MatMulNBits takes a padded last block, GatherBlockQuantized does not."""
    width, block = weight.shape[1], weight.storage.block
    if weight.is_table and block and width % block:
        raise ConfigError(
            f"{weight.name} has rows of {width} values, but a table is quantized in whole blocks; "
            f"expected a multiple of {BLOCK_MIN}, or a recipe with a rule of 32 bits for it"
        )


def _predict(
    model: TextModel,
    profile: DeviceProfile,
    weights: tuple[PlannedWeight, ...],
    small: Mapping[str, tuple[int, ...]],
    caches: Caches,
    head: str,
) -> Memory:
    small_bytes = sum(4 * math.prod(shape) for shape in small.values())
    multiplied = [weight for weight in weights if not weight.is_table or weight.name == head]
    tables = [weight for weight in weights if weight.is_table]
    in_memory = sum(weight.size_bytes for weight in multiplied) + small_bytes
    return Memory(
        weights_bytes=in_memory,
        mapped_bytes=sum(weight.size_bytes for weight in tables) + _rope_bytes(model, caches.context),
        kv_bytes=caches.size_bytes,
        overhead_bytes=PROCESS_BYTES
        + _activation_bytes(model, profile.prefill_chunk, caches.context)
        + _cache_copy_bytes(caches, profile.execution_provider),
        read_per_token_bytes=in_memory + sum(weight.size_bytes // weight.shape[0] for weight in tables),
    )


def _cache_copy_bytes(caches: Caches, provider: str) -> int:
    """Copies of caches that the CPU operators make in a step (docs/decisions.md).

    Of int8 for each reading layer in turn; of float16 as float32 around a layer, and kept for the two
    source layers.
    """
    if provider != "cpu" or caches.dtype == "float32":
        return 0
    values = sorted(2 * cache.kv_heads * cache.capacity * cache.head_dim for cache in caches.layers)
    return values[-1] if caches.dtype == "int8" else 4 * (values[-1] + sum(values[-2:]))


def _rope_bytes(model: TextModel, context: int) -> int:
    head_dims = {layer.layer_type: layer.head_dim for layer in model.layers}
    return sum(context * head_dim * 4 for head_dim in head_dims.values())


def _activation_bytes(model: TextModel, chunk: int, context: int) -> int:
    shape = model.geometry
    chunk = min(chunk, context)
    widest = max(
        *(layer.intermediate_size for layer in model.layers if not layer.is_shared),
        shape.num_attention_heads * shape.global_head_dim,
    )
    per_layer = 3 * shape.num_hidden_layers * shape.hidden_size_per_layer_input
    scores = shape.num_attention_heads * chunk * context  # of one full-attention layer
    return 4 * (chunk * (LIVE_ROWS * widest + per_layer) + scores + 3 * shape.vocab_size)


def _largest_context(fits, context: int) -> int:
    """The largest context below `context` that fits, in steps of 64 tokens; 0 if none does."""
    low, high = 0, -(-context // 64)  # low fits (or is nothing), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * 64) else (low, middle)
    return low * 64


def _over_budget(profile: DeviceProfile, memory: Memory, context: int, fits: int) -> str:
    def mib(size: int) -> str:
        return f"{size / (1 << 20):.0f} MiB"

    parts = (
        f"weights {mib(memory.weights_bytes)}, caches of {context} tokens {mib(memory.kv_bytes)}, "
        f"rest {mib(memory.overhead_bytes)}"
    )
    advice = (
        f"--context {fits} would fit"
        if fits
        else "no context fits: take a smaller model, a recipe with fewer bits, or a device with more memory"
    )
    return (
        f"{profile.name} grants {profile.memory.budget_mib} MiB, this bundle needs "
        f"{mib(total_bytes(memory))} ({parts}); {advice}"
    )
