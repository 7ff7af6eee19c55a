"""Bundles of tiny checkpoints for tests, exported in seconds; every knob of an export as an argument."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from transformers import Gemma4ForCausalLM

from gemma_edge.export.bundle import Job, Prepared, prepare, write_bundle
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.source import find_checkpoint
from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.profile import DeviceProfile, load_profile

from .tiny_checkpoint import write_tiny_checkpoint


@dataclass(frozen=True)
class TinyBundle:
    """An opened bundle and the checkpoint it was made from."""

    bundle: Bundle
    checkpoint: Path

    @property
    def path(self) -> Path:
        return self.bundle.path

    def reference(self) -> Gemma4ForCausalLM:
        """The same model in transformers, float32."""
        return Gemma4ForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()


def tiny_profile(
    *,
    kv: str = "float32",
    slack: int = 4,
    block: int = 32,
    chunk: int = 16,
    budget_mib: int = 1024,
    prefill_weights: str = "shared",
) -> DeviceProfile:
    """A device small enough for tests: one thread, all block sizes the same."""
    base = load_profile("x86-64-generic")
    change = msgspec.structs.replace
    return change(
        base,
        name="tiny-device",
        memory=change(base.memory, budget_mib=budget_mib),
        cpu=change(base.cpu, threads=1),
        kv_cache=change(base.kv_cache, dtype=kv, sliding_slack=slack),
        prefill_chunk=chunk,
        prefill_weights=prefill_weights,
        block_sizes={"2": block, "4": block, "8": block},
    )


def prepare_tiny(
    checkpoint: Path,
    out: Path,
    *,
    recipe: str = "fp32",
    context: int | None = 128,
    force: bool = False,
    prefill: Literal["shared", "int8"] | None = None,
    drafter: Path | None = None,
    parts: bool = False,
    **device: Any,
) -> Prepared:
    """Everything before the work. prefill: whatever recipe and device say. parts: of the decoder, small as
    it is. `device`: see `tiny_profile`.
    """
    source, rules = find_checkpoint(str(checkpoint)), load_recipe(recipe)
    if prefill is not None:
        rules = replace(rules, prefill_weights=prefill)
    guessing = None if drafter is None else find_checkpoint(str(drafter), tokenizer=False)
    cut = dict(parts_from_bytes=0) if parts else {}
    return prepare(Job(source, tiny_profile(**device), rules, context, out, force, drafter=guessing, **cut))


def export_tiny(
    folder: Path, *, checkpoint: Path | None = None, model: dict[str, Any] | None = None, **options: Any
):
    """Write `folder`/checkpoint (unless one is given) and `folder`/bundle.

    model: arguments of `write_tiny_checkpoint`; options: those of `prepare_tiny`.
    """
    checkpoint = checkpoint or write_tiny_checkpoint(folder / "checkpoint", **(model or {}))
    write_bundle(prepare_tiny(checkpoint, folder / "bundle", **options))
    return TinyBundle(open_bundle(folder / "bundle"), checkpoint)
