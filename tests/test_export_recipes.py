"""Recipes are data: rules in order, strict files, blocks of the device's size or narrower."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemma_edge.export.recipes import Storage, decide, load_recipe, recipes_folder
from gemma_edge.runtime.errors import ConfigError

from .support.tiny_bundles import prepare_tiny, tiny_profile
from .support.tiny_checkpoint import write_tiny_checkpoint


def write_recipe(folder: Path, rules: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\ntitle: A test\nrules:\n{rules}")
    return str(path)


def test_shipped_recipes_load_and_are_named_after_their_files():
    names = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
    assert {"fp32", "int4", "int8"} <= set(names)
    for name in names:
        assert load_recipe(name).name == name


def test_the_first_rule_that_matches_decides(tmp_path: Path):
    recipe = load_recipe(
        write_recipe(
            tmp_path,
            '  - {weights: "layers.*.mlp.*", bits: 8, method: nearest, block: 16}\n'
            '  - {weights: "*", bits: 4, method: search}\n',
        )
    )
    profile = tiny_profile(block=64)
    assert decide(recipe, profile, "layers.3.mlp.up_proj.weight", 128) == Storage(8, 16, "nearest")
    assert decide(recipe, profile, "layers.3.self_attn.q_proj.weight", 128) == Storage(4, 64, "search")
    # Rows of 96 weights are no multiple of 64: the block is halved, and that is recorded.
    assert decide(recipe, profile, "lm_head.weight", 96) == Storage(4, 32, "search", reduced_from=64)
    # Nothing divides 100; MatMulNBits pads the last block.
    assert decide(recipe, profile, "lm_head.weight", 100) == Storage(4, 16, "search", reduced_from=64)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ('  - {weights: "*", bits: 4, method: serach}', "serach"),
        ('  - {weights: "*", bits: 5, method: search}', "5"),
        ('  - {wieghts: "*", bits: 4, method: search}', "did you mean `weights`"),
        ('  - {weights: "*", bits: 4, method: float}', "32 bits go with method float"),
        ('  - {weights: "*", bits: 32, method: search}', "32 bits go with method float"),
        ('  - {weights: "*", bits: 4, method: search, block: 24}', "block is 24, expected a power of two"),
        ('  - {weights: "*", bits: 4, method: search, block: 8}', "block is 8, expected a power of two"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, rules: str, named: str):
    with pytest.raises(ConfigError, match=re.escape(named)):
        load_recipe(write_recipe(tmp_path, rules))


def test_tables_are_quantized_in_whole_blocks_only(tmp_path: Path):
    """A row that would need padding: products can, tables cannot."""
    checkpoint = write_tiny_checkpoint(
        tmp_path / "checkpoint",
        hidden_size=40,
        num_hidden_layers=1,
        layer_types=["full_attention"],
        num_kv_shared_layers=0,
    )
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight has rows of 40 values.*multiple of 16"):
        prepare_tiny(checkpoint, tmp_path / "out", recipe="int4")
    mixed = write_recipe(
        tmp_path,
        '  - {weights: "embed_tokens.weight", bits: 32, method: float}\n'
        '  - {weights: "*", bits: 4, method: search}\n',
    )
    plan = prepare_tiny(checkpoint, tmp_path / "out", recipe=mixed).plan
    stored = {weight.name: (weight.storage.block, weight.row_bytes) for weight in plan.weights}
    assert stored["layers.0.mlp.up_proj.weight"] == (16, 24)  # three blocks of 16, the last padded
    assert stored["embed_tokens.weight"] == (0, 160)


def test_a_weight_without_a_rule_and_an_unknown_recipe_are_named(tmp_path: Path):
    recipe = load_recipe(write_recipe(tmp_path, '  - {weights: "embed*", bits: 4, method: search}'))
    with pytest.raises(ConfigError, match=r"no rule matches norm"):
        decide(recipe, tiny_profile(), "norm", 64)
    with pytest.raises(ConfigError, match=r"no recipe 'int5'; known: .*int4"):
        load_recipe("int5")
