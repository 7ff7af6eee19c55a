"""What a drafter's guesses cost beside a bundle's passes, and what they gain at each rate of right ones.

python bench/drafter.py BUNDLE [--hidden 256] [--intermediate 2048] [--layers 4] [--heads 4] [--every-token]
    [--context 1024] [--repeats 15] [--threads N] [--longest 8]

BUNDLE is of any model, with float caches. A drafter of made-up weights is exported for it: Google's head
(2,048 groups of tokens, 32 of them scored), or one that scores every token. Its weights are random, so how
often it is right cannot be measured: the gain is what the engine's own choice of guesses makes of the
measured times when guesses are right as often as said, each with the probability it was given.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, median, print_json, print_machine
from safetensors.numpy import save_file

from gemma_edge.export.checkpoint import Checkpoint
from gemma_edge.export.drafter import prepare_drafter, write_drafter
from gemma_edge.export.drafter_geometry import parse_drafter
from gemma_edge.export.geometry import TextModel, read_config, read_text_model
from gemma_edge.export.plan import plan_drafter
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.source import find_checkpoint
from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.drafter import Drafter
from gemma_edge.runtime.drafts import Pace
from gemma_edge.runtime.profile import load_profile
from gemma_edge.runtime.session import Session

RATES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
TOKENS = 4000  # played for each rate


@dataclass(frozen=True)
class WithDrafter(Bundle):
    folder: Path = Path()

    @property
    def drafter(self) -> Path:
        return self.folder / "drafter.onnx"


def write_checkpoint(
    folder: Path, target: TextModel, args: argparse.Namespace, recipe: str, device: str
) -> None:
    shape = target.geometry
    text = read_config(args.bundle)
    text = text.get("text_config", text)
    fields = "vocab_size head_dim global_head_dim num_key_value_heads sliding_window per_layer_config"
    fields += " rope_parameters max_position_embeddings hidden_activation"
    own = {name: text[name] for name in fields.split() if text.get(name) is not None} | dict(
        model_type="gemma4_text",
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        layer_types=["sliding_attention"] * (args.layers - 1) + ["full_attention"],
    )
    if "per_layer_config" in own:  # of the target's layers
        sizes = next(iter(own.pop("per_layer_config").values()))
        own["global_head_dim"] = sizes["head_dim"]
    config = dict(
        model_type="gemma4_assistant",
        text_config=own,
        backbone_hidden_size=shape.hidden_size,
        use_ordered_embeddings=not args.every_token,
        num_centroids=2048,
        centroid_intermediate_top_k=32,
    )
    model = parse_drafter(config, "made up", target)
    weights, small = plan_drafter(model, load_profile(device), load_recipe(recipe), "")
    drawn = np.random.default_rng(0)
    tensors = {
        weight.name: (drawn.standard_normal(weight.shape, np.float32) * weight.shape[1] ** -0.5).astype(
            np.float16
        )
        for weight in weights
    } | {name: np.ones(of, np.float32) for name, of in small.items()}
    if model.centroids is not None:
        tensors["masked_embedding.token_ordering"] = drawn.permutation(shape.vocab_size)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median of seconds, after two that do not count."""
    spent = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return median(spent[2:])


def played(passes: list[float], drafting_s: float, rate: float, longest: int) -> tuple[float, float]:
    """(times as fast as without guesses, guesses a pass): the engine's own choice over measured times."""
    pace, drawn = Pace(longest), random.Random(1)
    spent = made = run = count = 0.0
    while made < TOKENS:
        _, most = pace.choose_between([], longest)
        odds = [rate] * most
        while odds and not pace.pays(odds[:-1], rate):
            odds.pop()
        right = 0
        while right < len(odds) and drawn.random() < rate:
            right += 1
        took = passes[len(odds)] + most * drafting_s
        if most:
            pace.learn_drafted(odds, right, took, most, most * drafting_s)
        else:
            pace.learn(0, 0, took)
        spent += took
        made += right + 1
        run += len(odds)
        count += 1
    return made * passes[0] / spent, run / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    for name, value in dict(
        hidden=256, intermediate=2048, layers=4, heads=4, context=1024, repeats=15
    ).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--longest", type=int, default=8)
    parser.add_argument("--every-token", action="store_true")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    manifest = bundle.manifest
    target = read_text_model(args.bundle)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_checkpoint(folder, target, args, manifest.recipe, manifest.device)
        source = find_checkpoint(str(folder), tokenizer=False)
        recipe, profile = load_recipe(manifest.recipe), load_profile(manifest.device)
        prepared = prepare_drafter(source, target, profile, recipe)
        described = write_drafter(
            prepared, manifest.caches, Checkpoint(folder, {}), recipe, folder, lambda name, done: None
        )
        session = Session(bundle, threads=args.threads, longest_draft=args.longest)
        drafter = Drafter(WithDrafter(bundle.path, manifest, folder=folder), session)
        length = min(args.context, manifest.caches.context - args.longest - 1)
        for first in range(0, length, session.chunk):
            ids = np.random.default_rng(first).integers(2000, 9000, min(session.chunk, length - first))
            session.prefill(ids, first, last=first + len(ids) == length)
        states = np.random.default_rng(0).standard_normal(target.geometry.hidden_size).astype(np.float32)

        def draft() -> None:
            guesses = drafter.guesses(5, length, states)
            for _ in range(args.longest):
                next(guesses)

        # In turns: the machine's pace drifts.
        runs: list[list[float]] = [[] for _ in range(args.longest + 2)]
        for _ in range(args.repeats):
            for rows in range(args.longest + 1):
                runs[rows].append(timed(lambda rows=rows: session.step(5, length, [6] * rows), 1))
            runs[-1].append(timed(draft, 1) / args.longest)
    passes, drafting_s = [median(found) for found in runs[:-1]], median(runs[-1])
    print(f"drafter: {described.weights_bytes / 2**20:.1f} MiB, {described.scored} tokens scored")
    print(
        f"a pass of one row takes {passes[0] * 1e3:.1f} ms at {length} tokens, "
        f"a guess {drafting_s * 1e3:.2f} ms"
    )
    print("rows: " + ", ".join(f"{rows}: {spent / passes[0]:.2f}" for rows, spent in enumerate(passes, 1)))
    gains = {}
    for rate in RATES:
        gain, guesses = played(passes, drafting_s, rate, args.longest)
        gains[str(rate)] = round(gain, 3)
        print(f"{rate:.0%} right: {gain:.2f} times as fast, {guesses:.1f} guesses a pass")
    print_json(
        {
            "bench": "drafter",
            "bundle": args.bundle.name,
            "recipe": manifest.recipe,
            "threads": session.threads,
            "context": length,
            "head": "every token" if args.every_token else "centroids",
            "weights_mib": round(described.weights_bytes / 2**20, 1),
            "step_ms": round(passes[0] * 1e3, 2),
            "pass_by_rows": [round(spent / passes[0], 3) for spent in passes],
            "guess_ms": round(drafting_s * 1e3, 3),
            "guess_share": round(drafting_s / passes[0], 4),
            "gain_by_rate": gains,
            "machine": about,
        }
    )


if __name__ == "__main__":
    main()
