"""Exports a drafter into its target's bundle: weights of its own by the same recipe, the target's caches."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from ..runtime.bundle import DRAFTER, Caches, Quantized
from ..runtime.bundle import Drafter as DrafterDescription
from ..runtime.errors import ConfigError
from ..runtime.profile import DeviceProfile
from .attach import attach
from .checkpoint import Checkpoint, CheckpointError, TensorEntry, open_checkpoint, read_bytes
from .drafter_geometry import DrafterModel, read_drafter
from .geometry import TextModel
from .modules.drafter import ORDER, TARGET
from .plan import HEAD, PlannedWeight, plan_drafter
from .recipes import Recipe
from .source import CheckpointSource
from .store import DataFile, Progress, StoredWeight, store_weights
from .trace import trace_drafter

log = logging.getLogger(__name__)

DATA = f"{DRAFTER}.data"
ORDER_NAME = f"masked_embedding.{ORDER}"
INTEGERS = {"I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class PreparedDrafter:
    """A drafter that has been checked: nothing is written yet."""

    source: CheckpointSource
    model: DrafterModel
    checkpoint: Checkpoint
    weights: tuple[PlannedWeight, ...]
    small: dict[str, tuple[int, ...]]
    order: np.ndarray | None  # (groups, tokens of a group) int64

    @property
    def file_bytes(self) -> int:
        """Of its data file, but for alignment."""
        return sum(weight.size_bytes for weight in self.weights) + (
            0 if self.order is None else self.order.nbytes
        )

    @property
    def resident_bytes(self) -> int:
        """Of its weights. A table is looked up, a few thousand rows a token: mapped, but soon in memory."""
        small = sum(4 * math.prod(shape) for shape in self.small.values())
        order = 0 if self.order is None else self.order.nbytes
        return sum(weight.resident_bytes for weight in self.weights) + small + order


def prepare_drafter(
    source: CheckpointSource, target: TextModel, profile: DeviceProfile, recipe: Recipe
) -> PreparedDrafter:
    """Raises ConfigError or CheckpointError where it does not fit its target or is not whole."""
    if profile.execution_provider != "cpu":
        raise ConfigError(
            f"--drafter: {profile.name} runs on {profile.execution_provider}, where nothing is guessed: its "
            "sliding caches have no slack; leave the option out, or export for a device that runs on its CPU"
        )
    if not profile.kv_cache.sliding_slack:
        raise ConfigError(
            f"--drafter: profile {profile.name} has a sliding_slack of 0, so guesses cannot be taken back; "
            "give it 4 or more"
        )
    model = read_drafter(source.folder, target)
    checkpoint = open_checkpoint(source.folder)
    weights, small = plan_drafter(model, profile, recipe, DATA)
    shapes = {weight.name: weight.shape for weight in weights} | small
    order, integers = None, dict[str, str]()
    if model.centroids is not None:
        order = _read_order(checkpoint, model)
        shapes[ORDER_NAME], integers[ORDER_NAME] = order.shape, checkpoint.entry(ORDER_NAME).dtype
        order = order.reshape(model.centroids.count, -1)
    checkpoint.require(shapes, integers)
    return PreparedDrafter(source, model, checkpoint, weights, small, order)


def write_drafter(
    prepared: PreparedDrafter,
    caches: Caches,
    target: Checkpoint,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
) -> DrafterDescription:
    """Write graph and weights; what the manifest says of them."""
    model = prepared.model
    traced = trace_drafter(model, caches)
    if (order := prepared.order) is not None:
        traced.makers[f"constants.{ORDER}"] = lambda read: order
    tensors = {TARGET + name: entry for name, entry in target.tensors.items()} | dict(
        prepared.checkpoint.tensors
    )
    both = Checkpoint(prepared.checkpoint.folder, tensors)
    with DataFile(folder / DATA) as data:
        stored = store_weights({DATA: data}, both, prepared.weights, progress)
        ir.save(attach(traced, stored, both, data, head=HEAD, recipe=recipe), folder / DRAFTER)
    return DrafterDescription(
        model=prepared.source.asked,
        revision=prepared.source.revision,
        reads=tuple(model.cache_index(layer_type) for layer_type in model.sources),
        scored=_scored(model),
        weights_bytes=prepared.resident_bytes,
        quantization=tuple(_reports(stored)),
    )


def _scored(model: DrafterModel) -> int:
    vocab = model.text.geometry.vocab_size
    groups = model.centroids
    return vocab if groups is None else groups.chosen * (vocab // groups.count)


def _reports(stored: dict[str, StoredWeight]) -> list[Quantized]:
    found = (weight.report for weight in stored.values())
    return [
        msgspec.structs.replace(report, tensor=f"drafter.{report.tensor}")
        for report in found
        if report is not None
    ]


def _read_order(checkpoint: Checkpoint, model: DrafterModel) -> np.ndarray:
    """All tokens, group by group. Raises CheckpointError if not each is in one."""
    vocab = model.text.geometry.vocab_size
    entry: TensorEntry = checkpoint.entry(ORDER_NAME)
    if entry.shape != (vocab,) or entry.dtype not in INTEGERS:
        raise CheckpointError(
            f"{entry.file}: {entry.original_name} is {entry.dtype} {entry.shape}, expected I64 ({vocab},)"
        )
    dtype = np.dtype(INTEGERS[entry.dtype])
    order = np.frombuffer(read_bytes(entry, 0, vocab * dtype.itemsize), dtype).astype(np.int64)
    if not np.array_equal(np.sort(order), np.arange(vocab)):
        raise CheckpointError(
            f"{entry.file}: {entry.original_name} does not name each of {vocab} tokens once; "
            "download it again"
        )
    return order
