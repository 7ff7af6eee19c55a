"""Quantization recipes: data that says for each weight how many bits, which block and which method."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Literal

from ..runtime.bundle import Struct
from ..runtime.errors import ConfigError
from ..runtime.profile import DeviceProfile
from ..runtime.strict import decode_yaml_file

Method = Literal["float", "nearest", "search"]

BLOCK_MIN = 16  # of MatMulNBits and GatherBlockQuantized


class Rule(Struct, frozen=True):
    """How the weights whose canonical name matches `weights` are stored."""

    weights: str  # shell pattern: * and ?
    bits: Literal[4, 8, 32]
    method: Method
    block: Literal["device"] | int = (
        "device"  # weights that share a scale; "device": the profile's for these bits
    )


class Recipe(Struct, frozen=True):
    """Rules in order: the first that matches a weight decides. Norms and scalars always stay float32."""

    name: str
    title: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Storage:
    """How one weight is stored."""

    bits: int
    block: int  # 0 for float
    method: Method
    reduced_from: int | None = None  # the block that was asked for, when the weight is too narrow for it


def load_recipe(name: str) -> Recipe:
    """The recipe `name` that ships with the package, or the one in the file `name` if that is a YAML path."""
    folder = recipes_folder()
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
        raise ConfigError(f"no recipe {name!r}; known: {known}, or the path of a YAML file")
    recipe = decode_yaml_file(path, Recipe)
    for rule in recipe.rules:
        _check(rule, path)
    return recipe


def recipes_folder() -> Path:
    return Path(str(resources.files(__package__ or "gemma_edge.export") / "recipes"))


def decide(recipe: Recipe, profile: DeviceProfile, name: str, width: int) -> Storage:
    """How the weight `name` with rows of `width` values is stored on this device."""
    rule = next((rule for rule in recipe.rules if fnmatchcase(name, rule.weights)), None)
    if rule is None:
        raise ConfigError(f"recipe {recipe.name}: no rule matches {name}; end the rules with `weights: '*'`")
    if rule.method == "float":
        return Storage(rule.bits, 0, rule.method)
    asked = rule.block
    if asked == "device":
        key: Literal["4", "8"] = "4" if rule.bits == 4 else "8"
        if key not in profile.block_sizes:
            raise ConfigError(f"profile {profile.name}: block_sizes has no entry for {key} bits")
        asked = profile.block_sizes[key]
    block = asked
    while block > BLOCK_MIN and width % block:
        block //= 2
    return Storage(rule.bits, block, rule.method, None if block == asked else asked)


def _check(rule: Rule, path: Path) -> None:
    if (rule.method == "float") != (rule.bits == 32):
        raise ConfigError(
            f"{path}: rule {rule.weights!r}: 32 bits go with method float, 4 and 8 with the others"
        )
    if (block := rule.block) != "device" and (block < BLOCK_MIN or block & (block - 1)):
        raise ConfigError(
            f"{path}: rule {rule.weights!r}: block is {block}, expected a power of two from {BLOCK_MIN} up"
        )
