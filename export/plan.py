"""What an export will write, worked out beforehand: storage of every weight, sizes, memory needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import nn

from ..runtime.bundle import Caches, KvDtype, Memory
from ..runtime.errors import ConfigError, GemmaEdgeError
from ..runtime.pieces import scores_bytes
from ..runtime.profile import DeviceProfile
from .audio_geometry import CALL_TOKENS, FRAMES_PER_TOKEN, AudioModel
from .drafter_geometry import DrafterModel
from .geometry import TextModel, plan_caches
from .modules import ops
from .modules.audio import AudioEncoder
from .modules.decoder import PRODUCT_GAIN, Decoder
from .modules.drafter import Drafter
from .modules.embeddings import Embeddings
from .modules.prefill import Prefill
from .qat import Held
from .recipes import BLOCK_MIN, Recipe, Storage, check_matches, check_suits, decide

DECODER_DATA = "decoder.onnx.data"
EMBEDDINGS_DATA = "embeddings.onnx.data"
AUDIO_DATA = "audio_encoder.onnx.data"
PREFILL_DATA = "prefill.onnx.data"
UP = ".mlp.up_proj.weight"
HEAD = "lm_head.weight"
TOKEN_TABLE = "embed_tokens.weight"
LAYER_TABLE = "embed_tokens_per_layer.weight"

Inner = Literal["float32", "float16"]

# Python, numpy, onnxruntime and a SentencePiece tokenizer, resident before a model is loaded.
PROCESS_BYTES = 140 << 20
# Activations that live at once in a prefill chunk, in multiples of one row of the widest layer.
LIVE_ROWS = 6
# Copies of the widest activation that live at once in a call of the audio encoder.
AUDIO_LIVE = 8
# What CUDA, cuBLAS and ONNX Runtime's kernels take of the memory, besides the process.
CUDA_CONTEXT_BYTES = 512 << 20
AUDIO_SESSION_BYTES = 32 << 20  # what ONNX Runtime keeps for the graph besides


@dataclass(frozen=True)
class PlannedWeight:
    """A matrix that is streamed to a data file."""

    name: str  # canonical
    shape: tuple[int, int]
    storage: Storage
    file: str
    is_table: bool  # rows are looked up, not multiplied
    held: Held | None = None  # how the checkpoint holds it, if quantized
    inner: Inner = "float32"  # the number type that it is multiplied in, which is its scales' too
    gain: float = 1.0  # it is stored times this

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return -(-self.shape[1] // self.storage.block)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row without its scales."""
        if self.storage.is_float:
            return self.shape[1] * self.storage.bits // 8
        return self.blocks * self.storage.block * self.storage.bits // 8

    @property
    def data_bytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def scale_bytes(self) -> int:
        return 0 if self.storage.is_float else self.shape[0] * self.blocks * np.dtype(self.inner).itemsize

    @property
    def size_bytes(self) -> int:
        return self.data_bytes + self.scale_bytes

    @property
    def resident_bytes(self) -> int:
        """In memory when it is multiplied: float16 is widened for products in float32."""
        widened = self.storage.is_float and self.inner == "float32"
        return 4 * math.prod(self.shape) if widened else self.size_bytes


@dataclass(frozen=True)
class ChannelWeight:
    """A matrix of the prefill graph, stored once more: int8, one scale a row, transposed."""

    name: str  # canonical
    shape: tuple[int, int]  # of the part that is stored: the first rows
    held: Held | None = None

    @property
    def size_bytes(self) -> int:
        return self.shape[0] * (self.shape[1] + 4)


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first weight is read."""

    weights: tuple[PlannedWeight, ...]
    small: dict[str, tuple[int, ...]]  # norms and scalars: float32, inside the graph
    folded: dict[str, tuple[int, ...]]  # what constants of the graphs are worked out from
    caches: Caches
    memory: Memory
    head: str  # the weight that the head multiplies with: its own, or the token table's
    prefill: tuple[ChannelWeight, ...] = ()  # empty: prompts run on the decoder graph

    @property
    def file_bytes(self) -> int:
        """Size of the data files, but for alignment."""
        return sum(weight.size_bytes for weight in self.weights) + self.prefill_bytes

    @property
    def prefill_bytes(self) -> int:
        return sum(weight.size_bytes for weight in self.prefill)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the checkpoint must have."""
        shapes: dict[str, tuple[int, ...]] = {}
        for weight in self.weights:
            shapes |= (
                {weight.name: weight.shape} if weight.held is None else weight.held.tensors(weight.shape)
            )
        return shapes | self.small | self.folded

    @property
    def integers(self) -> dict[str, str]:
        """The tensors among them that are not floats, with safetensors' name of their type."""
        return {weight.held.data: weight.held.dtype for weight in self.weights if weight.held is not None}


def make_plan(
    model: TextModel,
    profile: DeviceProfile,
    recipe: Recipe,
    *,
    context: int,
    kv_dtype: KvDtype | None = None,
    audio: AudioModel | None = None,
    drafter_bytes: int = 0,
    scale_columns: Mapping[str, int] | None = None,
    head_is_table: bool = False,
) -> Plan:
    """Decide storage and predict memory. Raises BudgetError when the device has too little of it.

    scale_columns: of quantized tables, scales in a row, as the checkpoint's headers say; without them a row
    of the per-layer table has one for each layer.
    head_is_table: an untied head has the token table's bytes, so it is not stored again.
    """
    if head_is_table:
        model = replace(model, tied_head=True)
    dtype = kv_dtype or profile.kv_cache.dtype
    if inner_type(profile) == torch.float16 and dtype != "float16":
        raise ConfigError(
            f"{profile.name}: kv_cache.dtype is {dtype}, expected float16, in which CUDA computes attention"
        )
    with torch.device("meta"):
        text = [
            (EMBEDDINGS_DATA, Embeddings(model)),
            (DECODER_DATA, Decoder(model, context=1, kv_dtype="float32", inner=inner_type(profile))),
        ]
        ears = [] if audio is None else [(AUDIO_DATA, AudioEncoder(audio))]
    check_suits(recipe, is_quantized=model.quantization is not None)
    columns = {LAYER_TABLE: model.geometry.num_hidden_layers} | dict(scale_columns or {})
    weights, small = _weights(text, model, profile, recipe, columns)
    audio_weights, audio_small = _weights(ears, model, profile, recipe, columns)
    matrices = weights + audio_weights
    check_matches(
        recipe, [weight.name for weight in matrices], [weight.name for weight in matrices if weight.held]
    )
    folded = {name: shape for _, encoder in ears for name, shape in encoder.constants.reads.items()}
    audio_bytes = 0 if audio is None else _audio_bytes(audio, audio_weights, audio_small)
    head = TOKEN_TABLE if model.tied_head else HEAD

    prefill = _channel_weights(model, weights) if wants_prefill_graph(profile, recipe) else ()
    budget = profile.memory.budget_mib << 20

    def at(tokens: int) -> tuple[Caches, Memory]:
        caches = plan_caches(model, context=tokens, sliding_slack=profile.kv_cache.sliding_slack, dtype=dtype)
        memory = _predict(model, profile, weights, small, caches, head, audio_bytes)
        return caches, msgspec.structs.replace(
            memory,
            drafter_bytes=drafter_bytes,
            weights_bytes=memory.weights_bytes + sum(weight.size_bytes for weight in prefill),
        )

    caches, memory = at(context)
    if total_bytes(memory) > budget and recipe.prefill_weights == "device":
        prefill = ()  # a device's wish for speed; the context comes first
        caches, memory = at(context)
    if total_bytes(memory) > budget:
        fits = _largest_context(lambda tokens: total_bytes(at(tokens)[1]) <= budget, context)
        raise BudgetError(_over_budget(profile, memory, context, fits), fits)
    return Plan(weights + audio_weights, small | audio_small, folded, caches, memory, head, prefill)


def plan_drafter(
    model: DrafterModel, profile: DeviceProfile, recipe: Recipe, file: str
) -> tuple[tuple[PlannedWeight, ...], dict[str, tuple[int, ...]]]:
    """A drafter's matrices and small tensors, under the names of its own checkpoint."""
    with torch.device("meta"):
        module = Drafter(model, context=1, kv_dtype="float32")
    return _weights([(file, module)], model.text, profile, recipe, {})


class BudgetError(GemmaEdgeError):
    """The model with this context does not fit the device; `fits` is the largest context that would, or 0."""

    def __init__(self, message: str, fits: int) -> None:
        super().__init__(message)
        self.fits = fits


def inner_type(profile: DeviceProfile) -> torch.dtype:
    """Of attention and MLP: CUDA's kernels take halves."""
    return torch.float16 if profile.execution_provider == "cuda" else torch.float32


def wants_prefill_graph(profile: DeviceProfile, recipe: Recipe) -> bool:
    """Whether prompts run on a graph of their own, on an int8 copy of the lower layers' weights."""
    wanted = profile.prefill_weights if recipe.prefill_weights == "device" else recipe.prefill_weights
    if recipe.activation_scales:
        if recipe.prefill_weights == "int8":
            raise ConfigError(
                f"recipe {recipe.name}: prefill_weights int8 rounds activations by its own scales, "
                "activation_scales by the checkpoint's; take one of them"
            )
        return False
    if wanted == "int8" and profile.execution_provider != "cpu":
        raise ConfigError(
            f"recipe {recipe.name}: prefill_weights is int8, which is for the CPU; {profile.name} runs on "
            f"{profile.execution_provider}: take `shared`"
        )
    return wanted == "int8"


def _channel_weights(model: TextModel, weights: Sequence[PlannedWeight]) -> tuple[ChannelWeight, ...]:
    """What the prefill graph multiplies with; `weights`: the decoder's, of which these are a part."""
    held = {weight.name: weight.held for weight in weights}
    with torch.device("meta"):
        module = Prefill(model, context=1, kv_dtype="float32")
    return tuple(
        ChannelWeight(f"{name}.weight", (part.weight.shape[0], part.weight.shape[1]), held[f"{name}.weight"])
        for name, part in module.named_modules()
        if isinstance(part, ops.Linear)
    )


def total_bytes(memory: Memory) -> int:
    """What counts against the budget: mapped tables do not, the system may drop their pages at any time."""
    parts = memory.weights_bytes, memory.kv_bytes, memory.overhead_bytes, memory.audio_bytes
    return sum(parts) + memory.drafter_bytes


def _weights(
    modules: Sequence[tuple[str, nn.Module]],
    model: TextModel,
    profile: DeviceProfile,
    recipe: Recipe,
    columns: Mapping[str, int],
) -> tuple[tuple[PlannedWeight, ...], dict[str, tuple[int, ...]]]:
    """The matrices and the small tensors of modules, each with its data file."""
    weights: list[PlannedWeight] = []
    small: dict[str, tuple[int, ...]] = {}
    for file, module in modules:
        for prefix, part in module.named_modules():
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            for suffix, tensor in own:
                name = f"{prefix}.{suffix}"
                if name.startswith("constants.") or (name == HEAD and model.tied_head):
                    continue
                shape = tuple(tensor.shape)
                if isinstance(part, ops.Linear | ops.Table) and suffix == "weight":
                    is_table = isinstance(part, ops.Table)
                    held = _held(model, name, shape, is_table, columns)
                    only_looked_up = is_table and not (name == TOKEN_TABLE and model.tied_head)
                    storage = decide(recipe, profile, name, shape[1], held=held, is_table=only_looked_up)
                    half = tensor.dtype == torch.float16
                    gain = PRODUCT_GAIN if half and name.endswith(UP) else 1.0
                    inner: Inner = "float16" if half else "float32"
                    weights.append(PlannedWeight(name, shape, storage, file, is_table, held, inner, gain))
                else:
                    small[name] = shape
    for weight in weights:
        _refuse_padded_table(weight)
    return tuple(weights), small


def _held(
    model: TextModel, name: str, shape: tuple[int, int], is_table: bool, columns: Mapping[str, int]
) -> Held | None:
    if model.quantization is None:
        return None
    held = model.quantization.held(name, is_table=is_table, columns=columns.get(name, 1))
    if held is not None and shape[1] % held.columns:
        raise ConfigError(f"{held.scales} has {held.columns} scales for a row of {shape[1]} values")
    return held


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
    audio_bytes: int,
) -> Memory:
    small_bytes = sum(4 * math.prod(shape) for shape in small.values())
    multiplied = [weight for weight in weights if not weight.is_table or weight.name == head]
    tables = [weight for weight in weights if weight.is_table]
    in_memory = sum(weight.resident_bytes for weight in multiplied) + small_bytes
    on_cuda, rope = profile.execution_provider == "cuda", rope_bytes(model, caches.context)
    return Memory(
        weights_bytes=in_memory,
        # On CUDA the rotary tables are in the GPU's memory, in float16.
        mapped_bytes=sum(weight.size_bytes for weight in tables) + (0 if on_cuda else rope),
        kv_bytes=caches.size_bytes,
        overhead_bytes=PROCESS_BYTES
        + _activation_bytes(model, profile.prefill_chunk, caches.context, on_cuda=on_cuda)
        + _cache_copy_bytes(caches, profile.execution_provider)
        + (CUDA_CONTEXT_BYTES + rope // 2 if on_cuda else 0),
        read_per_token_bytes=in_memory + sum(weight.size_bytes // weight.shape[0] for weight in tables),
        audio_bytes=audio_bytes,
    )


def _audio_bytes(
    audio: AudioModel, weights: tuple[PlannedWeight, ...], small: Mapping[str, tuple[int, ...]]
) -> int:
    """Weights, constants, state and activations of the audio encoder's session."""
    stored = sum(weight.size_bytes for weight in weights) + sum(4 * math.prod(s) for s in small.values())
    relative_keys = 4 * audio.num_layers * audio.hidden_size * (audio.left_tokens + 1)
    state = 4 * sum(math.prod(tensor.shape) for tensor in audio.state)
    subsampled = CALL_TOKENS * FRAMES_PER_TOKEN // 2 * audio.half_bins * audio.channels[0]
    inner = CALL_TOKENS * 4 * audio.hidden_size
    activations = 4 * AUDIO_LIVE * (subsampled + inner)
    return stored + relative_keys + 2 * state + activations + AUDIO_SESSION_BYTES


def _cache_copy_bytes(caches: Caches, provider: str) -> int:
    """Copies of caches that the CPU operators make in a step (docs/decisions.md).

    Of float32 the rows in use of the two source layers, once for all that read them; of int8 none; of float16
    as float32 around a layer, and kept for the two source layers.
    """
    if provider != "cpu" or caches.dtype == "int8":
        return 0
    sizes = {cache: 2 * cache.kv_heads * cache.capacity * cache.head_dim for cache in caches.layers}
    if caches.dtype == "float32":
        return 4 * sum({cache.layer_type: size for cache, size in sizes.items()}.values())
    values = sorted(sizes.values())
    return 4 * (values[-1] + sum(values[-2:]))


def rope_bytes(model: TextModel, context: int) -> int:
    """Of the rotary tables, which cover the context."""
    head_dims = {layer.layer_type: layer.head_dim for layer in model.layers}
    return sum(context * head_dim * 4 for head_dim in head_dims.values())


def _activation_bytes(model: TextModel, chunk: int, context: int, *, on_cuda: bool) -> int:
    shape = model.geometry
    chunk = min(chunk, context)
    widest = max(
        *(layer.intermediate_size for layer in model.layers if not layer.is_shared),
        shape.num_attention_heads * shape.global_head_dim,
    )
    per_layer = 3 * shape.num_hidden_layers * shape.hidden_size_per_layer_input
    scores = scores_bytes(chunk, context, shape.num_attention_heads)  # of one full-attention layer
    scores += scores // 2 if on_cuda else 0  # and the probabilities, which are halves there
    return 4 * (chunk * (LIVE_ROWS * widest + per_layer) + 3 * shape.vocab_size) + scores


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
        + (f", audio encoder {mib(memory.audio_bytes)}" if memory.audio_bytes else "")
        + (f", drafter {mib(memory.drafter_bytes)}" if memory.drafter_bytes else "")
    )
    advice = (
        f"--context {fits} would fit"
        if fits
        else "no context fits: take a smaller model, a recipe with fewer bits, or a device with more memory"
    )
    if memory.audio_bytes:
        advice += "; --no-audio leaves the audio encoder out"
    return (
        f"{profile.name} grants {profile.memory.budget_mib} MiB, this bundle needs "
        f"{mib(total_bytes(memory))} ({parts}); {advice}"
    )
