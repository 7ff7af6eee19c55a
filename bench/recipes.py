"""What recipes read for a token and how large their files are, for E2B and E4B: the table of docs/recipes.md.

    python bench/recipes.py [--device x86-64-generic]

Worked out from the plan of an export, so that no weights are needed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import machine, print_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import msgspec  # noqa: E402

from gemma_edge.export.geometry import parse_text_model  # noqa: E402
from gemma_edge.export.plan import DECODER_DATA, EMBEDDINGS_DATA, make_plan  # noqa: E402
from gemma_edge.export.recipes import load_recipe  # noqa: E402
from gemma_edge.export.synthetic import known_config  # noqa: E402
from gemma_edge.runtime.profile import DeviceProfile, load_profile  # noqa: E402

MODELS = ("e2b", "e4b")
RECIPES = ("fp32", "fp16", "int8", "int4-head8", "int4", "qat-mobile")
HEADER = "| recipe | E2B: read for a token | data files | E4B: read for a token | data files |"
ENOUGH_MIB = 1 << 20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="x86-64-generic", help="whose block sizes count")
    args = parser.parse_args()
    rows = figures(args.device)
    print("\n".join(table(rows)))
    print()
    print_json({"bench": "recipes", "device": args.device, "rows": rows, "machine": machine()})
    return 0


def figures(device: str) -> list[dict[str, Any]]:
    """One row for each recipe and model; sizes in bytes."""
    profile = roomy(load_profile(device))
    rows = []
    for recipe_name in RECIPES:
        for name in MODELS:
            layout = "qat-mobile" if recipe_name == "qat-mobile" else "bf16"
            model = parse_text_model(known_config(name, layout), name)
            plan = make_plan(
                model,
                profile,
                load_recipe(recipe_name),
                context=512,
                head_is_table=layout == "qat-mobile",  # Google's are
            )
            sizes = {
                file: sum(weight.size_bytes for weight in plan.weights if weight.file == file)
                for file in (DECODER_DATA, EMBEDDINGS_DATA)
            }
            rows.append(
                dict(
                    recipe=recipe_name,
                    model=name,
                    read_per_token_bytes=plan.memory.read_per_token_bytes,
                    file_bytes=plan.file_bytes,
                    files=sizes,
                )
            )
    return rows


def roomy(profile: DeviceProfile) -> DeviceProfile:
    """The profile without a limit to its memory: float32 fits no device."""
    memory = msgspec.structs.replace(profile.memory, total_mib=2 * ENOUGH_MIB, budget_mib=ENOUGH_MIB)
    return msgspec.structs.replace(profile, memory=memory)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, sizes in GB."""
    lines = [HEADER, "|---" * 5 + "|"]
    for recipe in RECIPES:
        cells = [f"`{recipe}`"]
        for name in MODELS:
            row = next(row for row in rows if (row["recipe"], row["model"]) == (recipe, name))
            keys = ("read_per_token_bytes", "file_bytes")
            cells += [f"{row[key] / 1e9:.2f} GB" for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
