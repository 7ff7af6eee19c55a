"""Recipes are data: rules in order, strict files, blocks of the device's size or narrower."""

from __future__ import annotations

import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gemma_edge.export.recipes import Storage, decide, load_recipe, recipes_folder
from gemma_edge.runtime.errors import ConfigError, GemmaEdgeError

from .support.graph_runner import GraphRunner
from .support.onnx_graphs import load_graph
from .support.tiny_bundles import export_tiny, prepare_tiny, tiny_profile
from .support.tiny_checkpoint import write_tiny_checkpoint


def write_recipe(folder: Path, rules: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\ntitle: A test\nrules:\n{rules}")
    return str(path)


def test_shipped_recipes_load_and_are_named_after_their_files():
    names = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
    assert {"fp32", "fp16", "int4", "int4-head8", "int8", "qat-mobile"} <= set(names)
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
        ('  - {weights: "*", bits: 4, method: float}', "16 and 32 bits go with method float"),
        ('  - {weights: "*", bits: 32, method: search}', "16 and 32 bits go with method float"),
        ('  - {weights: "*", method: search}', "the others need `bits`"),
        ('  - {weights: "*", bits: 4, method: import}', "method import takes the checkpoint's bits"),
        ('  - {weights: "*", bits: 32, method: float, block: 32}', "floats have no blocks"),
        ('  - {weights: "*", bits: 2, method: search, block: 512}', "expected at most 256 for 2 bits"),
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("recipes") / "checkpoint")


def storage_by(recipe: str, checkpoint: Path, out: Path) -> dict[str, Storage]:
    plan = prepare_tiny(checkpoint, out, recipe=recipe, block=64).plan
    return {weight.name: weight.storage for weight in plan.weights}


def test_a_recipe_extends_another(checkpoint: Path, tmp_path: Path):
    """Own rules come first, the rest is the other recipe's."""
    own = write_recipe(
        tmp_path,
        '  - {weights: "embed_tokens.weight", bits: 8, method: nearest, block: 32}\n'
        '  - {weights: "layers.0.*_proj.weight", bits: 2, method: search, block: 16}\nextends: int4\n',
    )
    mine = storage_by(own, checkpoint, tmp_path / "out")
    base = storage_by("int4", checkpoint, tmp_path / "out")
    changed = {name for name in base if mine[name] != base[name]}
    assert mine["embed_tokens.weight"] == Storage(8, 32, "nearest")
    assert mine["layers.0.mlp.up_proj.weight"] == Storage(2, 16, "search")
    assert changed == {"embed_tokens.weight"} | {
        name for name in base if fnmatch(name, "layers.0.*_proj.weight")
    }


def test_settings_are_kept_or_replaced(tmp_path: Path):
    recipe = load_recipe(write_recipe(tmp_path, "  []\nextends: qat-mobile\nactivations: float32\n"))
    assert (recipe.activations, recipe.activation_scales) == ("float32", False)
    assert recipe.rules == load_recipe("qat-mobile").rules
    assert load_recipe("int4").activations == "int8"
    with pytest.raises(ConfigError, match=r"extends 'int5', expected one of .*int4"):
        load_recipe(write_recipe(tmp_path, "  []\nextends: int5\n"))
    with pytest.raises(ConfigError, match="int16"):
        load_recipe(write_recipe(tmp_path, "  []\nextends: int4\nactivations: int16\n"))


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (
            '  - {weights: "layers.*.mpl.*", bits: 8, method: nearest}\nextends: int4\n',
            r"rule 'layers\.\*\.mpl\.\*' matches no weight of this model; names are like 'layers\.\d\.mlp\.",
        ),
        (
            '  - {weights: "model.layers.*", bits: 8, method: nearest}\nextends: int4\n',
            r"matches no weight",
        ),
        (
            '  - {weights: "*", bits: 8, method: nearest}\n  - {weights: "*mlp*", bits: 4, method: search}\n',
            r"rule '\*mlp\*' decides about nothing: an earlier rule has layers\.0\.mlp\.",
        ),
        ('  - {weights: "*", method: import}\n', r"imports weights .* no quantization_config"),
    ],
)
def test_rules_that_decide_about_nothing_are_named(checkpoint: Path, tmp_path: Path, rules: str, named: str):
    with pytest.raises(ConfigError, match=named):
        prepare_tiny(checkpoint, tmp_path / "out", recipe=write_recipe(tmp_path, rules))


def test_float16_halves_the_file_and_changes_little(tiny_bundle):
    """Weights are widened when the graph is loaded: products are float32's, of rounded weights."""
    half, full = (tiny_bundle(recipe=name, model=dict(seed=2)) for name in ("fp16", "fp32"))
    files = [bundle.bundle.manifest.files["decoder.onnx.data"].size_bytes for bundle in (half, full)]
    assert files[0] < 0.6 * files[1]
    memories = [bundle.bundle.manifest.memory for bundle in (half, full)]
    assert memories[0].weights_bytes == memories[1].weights_bytes
    assert memories[0].mapped_bytes < memories[1].mapped_bytes
    ids = list(range(100, 120))
    first, second = (GraphRunner(bundle.path).run(ids) for bundle in (half, full))
    assert 0 < np.abs(first - second).max() < 0.1 * second.std()


def test_a_weight_beyond_float16_is_named(tmp_path: Path):
    folder = write_tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=2, num_kv_shared_layers=0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 7e4
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        GemmaEdgeError, match=r"layers\.1\.mlp\.up_proj\.weight: a weight of 7e\+04 is beyond"
    ):
        export_tiny(tmp_path, checkpoint=folder, recipe="fp16")


def test_two_bits_of_a_users_own(checkpoint: Path, tmp_path: Path):
    """Coarse, but what the recipe says: four levels, and the graph runs."""
    own = write_recipe(tmp_path, '  - {weights: "*mlp*", bits: 2, method: search}\nextends: int8\n')
    bundle = export_tiny(tmp_path, checkpoint=checkpoint, recipe=own)
    entries = {entry.tensor: entry for entry in bundle.bundle.manifest.quantization}
    assert entries["layers.0.mlp.up_proj.weight"].bits == 2
    assert 0.2 < entries["layers.0.mlp.up_proj.weight"].relative_error < 0.6
    weights = load_graph(bundle.path / "decoder.onnx").dequantized()["layers.0.mlp.up_proj.weight"]
    assert max(len(np.unique(row[:32])) for row in weights) == 4
    assert np.isfinite(GraphRunner(bundle.path).run([5, 6, 7])).all()


def test_the_documents_table_is_the_commands(monkeypatch: pytest.MonkeyPatch):
    """docs/recipes.md says what `python bench/recipes.py` prints."""
    root = Path(__file__).parent.parent
    monkeypatch.syspath_prepend(str(root / "bench"))
    spec = importlib.util.spec_from_file_location("bench_recipes", root / "bench" / "recipes.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    rows = bench.figures("x86-64-generic")
    assert "\n".join(bench.table(rows)) in (root / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {row["recipe"] for row in rows} == {path.stem for path in recipes_folder().glob("*.yaml")}
