"""Plans an export from a checkpoint's headers: what quantized tensors say that config.json does not.

How many scales a row of a table has, and whether an untied head is the token table's copy.
"""

from __future__ import annotations

import functools

from ..runtime.errors import ConfigError
from ..runtime.profile import DeviceProfile
from .audio_geometry import AudioModel
from .checkpoint import Checkpoint
from .geometry import TextModel
from .plan import HEAD, LAYER_TABLE, TOKEN_TABLE, Plan, make_plan
from .qat import Quantization
from .qat_rows import find_held, same_weight
from .recipes import Recipe


def plan_for(
    checkpoint: Checkpoint,
    model: TextModel,
    profile: DeviceProfile,
    recipe: Recipe,
    *,
    context: int,
    audio: AudioModel | None = None,
    drafter_bytes: int = 0,
) -> Plan:
    """The plan, with all tensors that it needs in `checkpoint`. Raises GemmaEdgeError where they are not."""
    planning = functools.partial(
        make_plan, model, profile, recipe, context=context, audio=audio, drafter_bytes=drafter_bytes
    )
    if model.quantization is None:
        plan = planning()
        checkpoint.require(plan.shapes)
        return plan
    planning = functools.partial(planning, scale_columns=_scale_columns(checkpoint, model.quantization))
    plan = planning()
    _refuse_what_is_not_imported(plan, model.quantization, recipe)
    checkpoint.require(plan.shapes, plan.integers)
    return planning(head_is_table=True) if _head_is_table(checkpoint, plan) else plan


def _refuse_what_is_not_imported(plan: Plan, quantization: Quantization, recipe: Recipe) -> None:
    """Two kinds of the audio tower's products that Google's checkpoints leave as floats."""
    for name, shape in plan.folded.items():
        if len(shape) == 2 and (held := quantization.held(name, is_table=False)) is not None:
            raise ConfigError(
                f"{name} has {held.bits} bits by config.json's quantization_config, but its product with "
                "sinusoids is worked out at export, from floats; expected it under modules_to_not_convert, "
                "as in Google's checkpoints: export with --no-audio, or the bfloat16 checkpoint"
            )
    for weight in plan.weights:
        has_bias = f"{weight.name.removesuffix('.weight')}.bias" in plan.small
        if recipe.activation_scales and weight.held is not None and has_bias:
            raise ConfigError(
                f"recipe {recipe.name}: activation_scales of {weight.name}, which adds a bias before its "
                "output is rounded, are not reproduced; remove activation_scales, or export with --no-audio"
            )


def _scale_columns(checkpoint: Checkpoint, quantization: Quantization) -> dict[str, int]:
    columns: dict[str, int] = {}
    for name in (TOKEN_TABLE, LAYER_TABLE):
        held = quantization.held(name, is_table=True)
        entry = checkpoint.tensors.get(held.scales) if held else None
        if entry is not None and len(entry.shape) == 2:
            columns[name] = entry.shape[1]
    return columns


def _head_is_table(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Google's qat-mobile checkpoints hold the head beside the token table, byte for byte the same."""
    held = {weight.name: weight.held for weight in plan.weights}
    head, table = held.get(HEAD), held.get(TOKEN_TABLE)
    if head is None or table is None or head.columns != table.columns:
        return False
    return same_weight(find_held(checkpoint, head), find_held(checkpoint, table))
