"""Sizes of bundles and the memory they take, for every model, recipe and device: from plans, without weights.

python -m gemma_edge.export.sizes > docs/sizes.md
python -m gemma_edge.export.sizes --model CONFIG.json --recipe int4 --device NAME --context 4096
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.profile import DeviceProfile, load_profile, load_profiles
from .geometry import TextModel, parse_text_model
from .plan import BudgetError, Plan, make_plan, rope_bytes, total_bytes
from .recipes import load_recipe
from .synthetic import MODELS, Layout, known_config

RECIPES = ("int4", "int4-head8", "qat-mobile", "int8", "fp16")
TITLES = {"e2b": "E2B", "e4b": "E4B"}

HEAD = """\
# Sizes
Written by `python -m gemma_edge.export.sizes`, from the models' shapes alone.

- **bundle**: the data files. Tokenizer and graphs add some 40 MB, the audio encoder some 300 MB.
- **memory**: what counts against the device's budget: weights (repacked by ONNX Runtime, so anonymous),
  caches, activations of one prefill chunk, Python and libraries. The audio encoder's comes on top.
- **prompt**: the int8 copy of the lower layers' weights for prompts, where the profile asks and the budget
  has room ([performance.md](performance.md#prefill)); bundle and memory have it in them.
- **mapped**: embedding and rotary tables, of which a token touches a few rows. The system drops their pages
  when it needs the memory.
- **context** is the profile's, or, in *italics*, the largest that fits the budget where that is less.
- **read** for each decoded token; memory bandwidth divided by it bounds the speed.
"""


@dataclass(frozen=True)
class Row:
    """One bundle."""

    profile: DeviceProfile
    recipe: str
    plan: Plan | None  # None: no context fits
    bundle_bytes: int
    asked: int  # tokens of context


def model_of(name: str, layout: Layout = "bf16") -> TextModel:
    """`name`: e2b, e4b, or the path of a config.json."""
    config: dict[str, Any]
    if name in MODELS:
        config = known_config(name, layout)
    else:
        config = json.loads(Path(name).read_text(encoding="utf-8"))
    return parse_text_model(config, name)


def row_of(model: TextModel, recipe: str, profile: DeviceProfile, context: int | None = None) -> Row:
    """The plan for the context that is asked for (by default the profile's), or the largest that fits."""
    asked = min(context or profile.context, model.geometry.max_position_embeddings)
    rules = load_recipe(recipe)
    plan: Plan | None
    try:
        plan = make_plan(model, profile, rules, context=asked)
    except BudgetError as error:
        plan = make_plan(model, profile, rules, context=error.fits) if error.fits else None
    bundle_bytes = 0 if plan is None else plan.file_bytes + rope_bytes(model, plan.caches.context)
    return Row(profile, recipe, plan, bundle_bytes, asked)


def table(rows: Iterator[Row]) -> Iterator[str]:
    """Lines of Markdown."""
    columns = [
        *("device", "recipe", "cache", "context", "bundle GB", "memory MiB", "of budget", "caches MiB"),
        *("prompt MiB", "mapped MiB", "read MiB"),
    ]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        start = f"| {row.profile.name} | {row.recipe} | {row.profile.kv_cache.dtype} |"
        if row.plan is None:
            yield f"{start} does not fit | | over {row.profile.memory.budget_mib} | | | | | |"
            continue
        memory, tokens = row.plan.memory, row.plan.caches.context
        context = f"{tokens:,}" if tokens == row.asked else f"*{tokens:,}*"
        share = total_bytes(memory) / (row.profile.memory.budget_mib << 20)
        figures = [
            _mib(total_bytes(memory)),
            f"{share:.0%}",
            _mib(memory.kv_bytes),
            _mib(row.plan.prefill_bytes),
            _mib(memory.mapped_bytes),
        ]
        figures.append(_mib(memory.read_per_token_bytes))
        yield f"{start} {context} | {row.bundle_bytes / 1e9:.2f} | {' | '.join(figures)} |"


def page() -> Iterator[str]:
    """docs/sizes.md."""
    yield HEAD
    for name in MODELS:
        yield f"## {TITLES[name]}"
        yield from table(
            row_of(model_of(name, "qat-mobile" if recipe == "qat-mobile" else "bf16"), recipe, profile)
            for profile in load_profiles()
            for recipe in RECIPES
        )
        yield ""


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):,.0f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="e2b|e4b|CONFIG", help="one model; without it, the whole page")
    parser.add_argument("--recipe", metavar="NAME", help="default: all that suit the model")
    parser.add_argument("--device", metavar="NAME", help="default: all")
    parser.add_argument("--context", type=int, metavar="N", help="default: the profile's")
    args = parser.parse_args(arguments)
    if args.model is None:
        print("\n".join(page()).rstrip())
        return 0
    rows = (
        row_of(
            model_of(args.model, "qat-mobile" if recipe == "qat-mobile" else "bf16"),
            recipe,
            profile,
            args.context,
        )
        for profile in ([load_profile(args.device)] if args.device else load_profiles())
        for recipe in ([args.recipe] if args.recipe else RECIPES)
        if args.recipe or args.model in MODELS or recipe != "qat-mobile"
    )
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
