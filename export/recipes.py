"""Quantization recipes: data that says for each weight how many bits, which block and which method."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Literal

from ..runtime.bundle import Struct
from ..runtime.errors import ConfigError
from ..runtime.profile import Bits, DeviceProfile
from ..runtime.strict import decode_yaml_file
from .qat import Held

Method = Literal["float", "nearest", "search", "import"]
Activations = Literal["int8", "float32"]
RecipePrefill = Literal["device", "shared", "int8"]

BLOCK_MIN = 16  # of MatMulNBits and GatherBlockQuantized
BLOCK_MAX_2_BITS = 256  # of MatMulNBits
FLOAT_BITS = (16, 32)


class Rule(Struct, frozen=True):
    """How the weights whose canonical name matches `weights` are stored."""

    weights: str  # shell pattern: * and ?
    method: Method
    bits: Literal[2, 4, 8, 16, 32] | None = None  # none with `import`: the checkpoint's
    block: Literal["device"] | int = (
        "device"  # weights that share a scale; "device": the profile's for these bits
    )


class RecipeFile(Struct, frozen=True):
    """A recipe as a YAML file has it. Rules in order: the first that matches a weight decides."""

    name: str
    title: str
    rules: tuple[Rule, ...]
    extends: str | None = None  # a recipe whose rules follow these, and whose settings are kept
    activations: Activations | None = None  # int8 unless said
    activation_scales: bool | None = None  # no unless said
    prefill_weights: RecipePrefill | None = None  # device unless said


@dataclass(frozen=True)
class Recipe:
    """A recipe with what it extends worked in. Norms and scalars always stay float32."""

    name: str
    title: str
    rules: tuple[Rule, ...]
    own_rules: int = 0  # so many first rules are the user's: each has to decide about some weight
    activations: Activations = "int8"  # what products of quantized weights compute with
    activation_scales: bool = False  # round activations as the checkpoint's static scales say
    prefill_weights: RecipePrefill = "device"  # of prompts; "device": as the profile says


@dataclass(frozen=True)
class Storage:
    """How one weight is stored."""

    bits: int
    block: int  # 0 for float
    method: Method
    reduced_from: int | None = None  # the block that was asked for, when the weight is too narrow for it

    @property
    def is_float(self) -> bool:
        return self.method == "float"


def load_recipe(name: str) -> Recipe:
    """The recipe `name` that ships with the package, or the one in the file `name` if that is a YAML path."""
    folder = recipes_folder()
    is_users = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_users else folder / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no recipe {name!r}; known: {', '.join(_known())}, or the path of a YAML file")
    file = _read(path)
    base = RecipeFile(name="", title="", rules=())
    if file.extends is not None:
        if file.extends not in _known():
            raise ConfigError(f"{path}: extends {file.extends!r}, expected one of {', '.join(_known())}")
        base = _read(folder / f"{file.extends}.yaml")
    scales = base.activation_scales if file.activation_scales is None else file.activation_scales
    return Recipe(
        name=file.name,
        title=file.title,
        rules=file.rules + base.rules,
        own_rules=len(file.rules) if is_users else 0,
        activations=file.activations or base.activations or "int8",
        activation_scales=bool(scales),
        prefill_weights=file.prefill_weights or base.prefill_weights or "device",
    )


def recipes_folder() -> Path:
    return Path(str(resources.files(__package__ or "gemma_edge.export") / "recipes"))


def decide(
    recipe: Recipe,
    profile: DeviceProfile,
    name: str,
    width: int,
    *,
    held: Held | None = None,
    is_table: bool = False,
) -> Storage:
    """How the weight `name` with rows of `width` values is stored on this device.

    held: how the checkpoint holds it, if quantized. is_table: its rows are only looked up.
    """
    rule = _rule_for(recipe, name, held)
    if rule.method == "import":
        assert held is not None
        return _imported(rule, profile, held, width, is_table)
    if held is not None and rule.method != "float":
        raise ConfigError(
            f"recipe {recipe.name}: {name} has {held.bits} bits in the checkpoint already, and rule "
            f"{rule.weights!r} would quantize it once more; expected method import: take "
            "`--recipe qat-mobile`, or a recipe that extends it"
        )
    assert rule.bits is not None
    if rule.method == "float":
        return Storage(rule.bits, 0, rule.method)
    asked = _asked(rule, profile, rule.bits)
    block = _dividing(asked, width)
    return Storage(rule.bits, block, rule.method, None if block == asked else asked)


def check_suits(recipe: Recipe, *, is_quantized: bool) -> None:
    """Check that a recipe for quantized checkpoints gets one, by its config.json. Raises ConfigError."""
    if is_quantized:
        return
    if recipe.activation_scales:
        raise ConfigError(
            f"recipe {recipe.name}: activation_scales are part of a qat-mobile checkpoint, and config.json "
            "has no quantization_config; remove them"
        )
    if any(rule.method == "import" for rule in recipe.rules):
        raise ConfigError(
            f"recipe {recipe.name} imports weights that are quantized already, and config.json has no "
            "quantization_config: this is no qat-mobile checkpoint; take `--recipe int4` or another of "
            f"{', '.join(name for name in _known() if name != recipe.name)}"
        )


def check_matches(recipe: Recipe, names: Sequence[str], held: Sequence[str]) -> None:
    """Check that every rule of the user's own decides about something. Raises ConfigError.

    names: all weights of the model; held: those that the checkpoint holds quantized.
    """
    quantized = set(held)
    left = list(names)
    for rule in recipe.rules[: recipe.own_rules]:
        matching = [name for name in names if fnmatchcase(name, rule.weights)]
        deciding = [
            name for name in left if name in matching and (rule.method != "import" or name in quantized)
        ]
        if not matching:
            near = difflib.get_close_matches(rule.weights, names, n=1, cutoff=0.0)
            raise ConfigError(
                f"recipe {recipe.name}: rule {rule.weights!r} matches no weight of this model; "
                f"names are like {near[0]!r}, and * stands for anything"
            )
        if not deciding:
            raise ConfigError(
                f"recipe {recipe.name}: rule {rule.weights!r} decides about nothing: an earlier rule has "
                f"{matching[0]} and all else that it matches; move it up or remove it"
            )
        left = [name for name in left if name not in deciding]


def _known() -> list[str]:
    return sorted(file.stem for file in recipes_folder().glob("*.yaml"))


def _read(path: Path) -> RecipeFile:
    file = decode_yaml_file(path, RecipeFile)
    for rule in file.rules:
        _check(rule, path)
    return file


def _rule_for(recipe: Recipe, name: str, held: Held | None) -> Rule:
    """The first rule that matches; `import` passes over what the checkpoint holds as floats."""
    for rule in recipe.rules:
        if fnmatchcase(name, rule.weights) and (rule.method != "import" or held is not None):
            return rule
    raise ConfigError(f"recipe {recipe.name}: no rule matches {name}; end the rules with `weights: '*'`")


def _imported(rule: Rule, profile: DeviceProfile, held: Held, width: int, is_table: bool) -> Storage:
    """Scales are the checkpoint's whatever the block, so a table that is only looked up gets the largest."""
    group = width // held.columns
    asked = 1 << (group.bit_length() - 1) if is_table else _asked(rule, profile, held.bits)
    return Storage(held.bits, _dividing(asked, group), "import")


def _asked(rule: Rule, profile: DeviceProfile, bits: int) -> int:
    if rule.block != "device":
        return rule.block
    keys: dict[int, Bits] = {2: "2", 4: "4", 8: "8"}
    if (key := keys[bits]) not in profile.block_sizes:
        raise ConfigError(f"profile {profile.name}: block_sizes has no entry for {key} bits")
    return profile.block_sizes[key]


def _dividing(block: int, width: int) -> int:
    """The block, or the largest half, quarter, … of it that divides the width; the smallest if none does."""
    while block > BLOCK_MIN and width % block:
        block //= 2
    return block


def _check(rule: Rule, path: Path) -> None:
    where = f"{path}: rule {rule.weights!r}"
    if (rule.method == "import") != (rule.bits is None):
        raise ConfigError(f"{where}: method import takes the checkpoint's bits, the others need `bits`")
    if rule.bits is not None and (rule.method == "float") != (rule.bits in FLOAT_BITS):
        raise ConfigError(f"{where}: 16 and 32 bits go with method float, 2, 4 and 8 with the others")
    if (block := rule.block) == "device":
        return
    if rule.method == "float":
        raise ConfigError(f"{where}: floats have no blocks; remove `block`")
    if block < BLOCK_MIN or block & (block - 1):
        raise ConfigError(f"{where}: block is {block}, expected a power of two from {BLOCK_MIN} up")
    if rule.bits == 2 and block > BLOCK_MAX_2_BITS:
        raise ConfigError(f"{where}: block is {block}, expected at most {BLOCK_MAX_2_BITS} for 2 bits")
