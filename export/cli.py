"""`gemma-edge export`: finds profile, recipe and checkpoint; progress on stderr, the result on stdout."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ..runtime.aside import terminated_as_interrupted
from ..runtime.bundle import Manifest
from ..runtime.detect import resolve_profile
from .bundle import Job, Prepared, prepare, write_bundle
from .recipes import load_recipe
from .report import report
from .source import find_checkpoint

BUNDLES = Path("bundles")


def run_export(args: argparse.Namespace) -> int:
    """Export as the command line says; see `arguments`. Raises GemmaEdgeError."""
    with terminated_as_interrupted():
        profile = resolve_profile(args.device)
        recipe = load_recipe(args.recipe or profile.default_recipe)
        if args.prefill_weights is not None:
            recipe = replace(recipe, prefill_weights=args.prefill_weights)
        source = find_checkpoint(
            args.model or profile.default_model, revision=args.revision, offline=args.offline
        )
        out = args.out or BUNDLES / f"{source.name}-{profile.name}-{recipe.name}"
        drafter = None
        if args.drafter is not None:
            drafter = find_checkpoint(args.drafter, offline=args.offline, tokenizer=False)
        job = Job(
            source, profile, recipe, args.context, out, args.force, audio=not args.no_audio, drafter=drafter
        )
        prepared = prepare(job)
        try:
            manifest = write_with_progress(prepared)
        except KeyboardInterrupt:
            print(f"gemma-edge: {out}: not finished, nothing of it is kept", file=sys.stderr)
            raise
    print(report(out, prepared, manifest))
    return 0


def write_with_progress(prepared: Prepared) -> Manifest:
    """`write_bundle` with a bar on stderr: the tensor at hand, weights done, time left."""
    with tqdm(
        total=prepared.weight_count,
        unit=" weights",
        unit_scale=True,
        file=sys.stderr,
        dynamic_ncols=True,
        leave=False,
    ) as bar:

        def progress(name: str, weights: int) -> None:
            bar.set_description(name, refresh=False)
            bar.update(weights)

        return write_bundle(prepared, progress)
