"""The table of sizes: what docs/sizes.md says is so, and the models fit where they have to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gemma_edge.export.plan import BudgetError, make_plan, total_bytes
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.sizes import RECIPES, main, model_of, row_of, table
from gemma_edge.export.synthetic import MODELS
from gemma_edge.runtime.profile import load_profile, load_profiles

PAGE = Path(__file__).parent.parent / "docs" / "sizes.md"


def row(model: str, recipe: str, device: str, context: int | None = None):
    layout = "qat-mobile" if recipe == "qat-mobile" else "bf16"
    return row_of(model_of(model, layout), recipe, load_profile(device), context)


def test_the_page_has_every_device_and_is_up_to_date():
    page = PAGE.read_text()
    for profile in load_profiles():
        assert page.count(f"| {profile.name} |") == len(RECIPES) * len(MODELS)
    for model, device in (
        ("e2b", "raspberry-pi-5-8gb"),
        ("e4b", "jetson-orin-nano-8gb"),
        ("e2b", "x86-64-generic"),
    ):
        lines = list(table(row(model, recipe, device) for recipe in RECIPES))
        missing = [line for line in lines if line not in page]
        assert not missing, f"{missing}: run `python -m gemma_edge.export.sizes > docs/sizes.md`"


@pytest.mark.parametrize(("recipe", "gigabytes"), [("int4", 1.9), ("qat-mobile", 1.3)])
def test_e2b_at_4k_is_planned_below_its_target(recipe: str, gigabytes: float):
    plan = row("e2b", recipe, "raspberry-pi-4-4gb", 4096).plan
    assert plan is not None and total_bytes(plan.memory) < gigabytes * 1e9


@pytest.mark.parametrize("device", ["raspberry-pi-4-8gb", "raspberry-pi-5-8gb", "jetson-orin-nano-8gb"])
def test_e4b_int4_fits_8_gb_with_8k(device: str):
    plan = row("e4b", "int4", device, 8192).plan
    assert plan is not None and plan.caches.context == 8192


@pytest.mark.parametrize("device", ["raspberry-pi-4-4gb", "raspberry-pi-5-4gb"])
def test_e2b_qat_mobile_fits_4_gb_with_32k(device: str):
    plan = row("e2b", "qat-mobile", device, 32768).plan
    assert plan is not None and plan.caches.context == 32768


def test_a_context_beyond_the_budget_is_cut_to_what_fits(capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", "e4b", "--recipe", "qat-mobile", "--device", "raspberry-pi-4-4gb"]
    assert main([*arguments, "--context", "8192"]) == 0
    cut = capsys.readouterr().out.splitlines()[-1].split(" | ")[3]
    assert cut.startswith("*") and 64 <= int(cut.strip("*").replace(",", "")) < 8192
    assert main(["--model", "e4b", "--recipe", "fp16", "--device", "raspberry-pi-4-4gb"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_the_copy_for_prompts_is_there_where_it_fits():
    """The device's wish gives way to the context; a recipe's does not."""
    with_copy, without = (row(model, "int4", "x86-64-generic").plan for model in ("e2b", "e4b"))
    assert with_copy is not None and with_copy.prefill_bytes > 500e6
    assert without is not None and not without.prefill and without.caches.context == 8192
    profile, model = load_profile("x86-64-generic"), model_of("e4b")
    asked = replace(load_recipe("int4"), prefill_weights="int8")
    with pytest.raises(BudgetError) as refused:
        make_plan(model, profile, asked, context=8192)
    assert make_plan(model, profile, asked, context=refused.value.fits).prefill
    assert refused.value.fits < 8192
