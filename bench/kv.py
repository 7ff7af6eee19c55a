"""Cache types: what float16 and int8 caches cost in accuracy and gain in speed and memory.

    python bench/kv.py [--recipes fp32 int4] [--texts 6] [--tokens 160]       # the nano model, exported here
    python bench/kv.py FLOAT32_BUNDLE INT8_BUNDLE --positions 128 1024 4000   # speed of bundles of one model

Accuracy: the texts of `gemma-edge verify`, token by token, against the same recipe with float32 caches: mean
Kullback-Leibler divergence of the next token, and how often the likeliest is another one. Sizes: E2B's caches
at 32,768 tokens, from its shape. Speed: decode steps
at far positions of caches filled with made-up keys and values, bundles in turns.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import machine, median, print_json, print_machine
from context import cache_bytes_read, fill_caches
from recipes import roomy

from gemma_edge.export.bundle import Job, prepare, write_bundle
from gemma_edge.export.plan import make_plan
from gemma_edge.export.recipes import load_recipe
from gemma_edge.export.sizes import model_of
from gemma_edge.export.source import find_checkpoint
from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.profile import load_profile
from gemma_edge.runtime.session import Session
from gemma_edge.runtime.stats import memory_use
from gemma_edge.runtime.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "export" / "verify" / "texts.jsonl"
TYPES = ("float32", "float16", "int8")


def export_nano(folder: Path, recipe: str, kv: str) -> Bundle:
    base = load_profile("x86-64-generic")
    replace = msgspec.structs.replace
    profile = replace(base, name="bench", kv_cache=replace(base.kv_cache, dtype=kv))
    source = find_checkpoint(str(ROOT / "models" / "nano"))
    out = folder / f"{recipe}-{kv}"
    write_bundle(prepare(Job(source, profile, load_recipe(recipe), 512, out, audio=False)))
    return open_bundle(out)


def sizes(context: int = 32768) -> dict[str, int]:
    """Bytes of E2B's caches by type, worked out as an export does it."""
    base, found = roomy(load_profile("x86-64-generic")), {}
    for kv in TYPES:
        profile = msgspec.structs.replace(base, kv_cache=msgspec.structs.replace(base.kv_cache, dtype=kv))
        plan = make_plan(model_of("e2b"), profile, load_recipe("int4"), context=context)
        found[kv] = plan.caches.size_bytes
        print(f"E2B, context {context}, {kv} caches: {found[kv] / 1e6:.1f} MB", flush=True)
    return found


def read_texts(bundle: Bundle, count: int, tokens: int) -> list[list[int]]:
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)
    lines = TEXTS.read_text(encoding="utf-8").splitlines()[:count]
    messages = [json.loads(line)["messages"] for line in lines]
    return [template.encode(tokenizer, m, [], add_generation_prompt=False)[:tokens] for m in messages]


def log_probabilities(bundle: Bundle, texts: list[list[int]]) -> np.ndarray:
    """Of the next token, after each token of each text: (tokens, vocab) float64."""
    session, rows = Session(bundle, threads=1), []
    for ids in texts:
        for position, token in enumerate(ids):
            session.step(token, position)
            logits = session.logits.astype(np.float64)
            rows.append(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
    return np.array(rows)


def accuracy(recipes: list[str], texts: int, tokens: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for recipe in recipes:
            exact = None
            for kv in TYPES:
                bundle = export_nano(Path(name), recipe, kv)
                found = log_probabilities(bundle, read_texts(bundle, texts, tokens))
                exact = found if exact is None else exact
                divergence = float((np.exp(exact) * (exact - found)).sum(-1).mean())
                other = float((exact.argmax(-1) != found.argmax(-1)).mean())
                rows.append({"recipe": recipe, "kv": kv, "kl": divergence, "other_token": other})
                print(
                    f"nano {recipe}, {kv} caches, {len(found)} tokens: KL {divergence:.2e}, "
                    f"other token {other:.2%}",
                    flush=True,
                )
    return rows


def speed(paths: list[Path], positions: list[int], steps: int, threads: int | None) -> list[dict[str, Any]]:
    bundles = [open_bundle(path) for path in paths]
    sessions = [Session(bundle, threads=threads) for bundle in bundles]
    for bundle, session in zip(bundles, sessions, strict=True):
        fill_caches(bundle, session)
    rows = []
    for position in positions:
        times: list[list[float]] = [[] for _ in bundles]
        for offset in range(steps + 1):
            for number, session in enumerate(sessions):
                times[number].append(timed_step(session, position + offset))
        for bundle, spent in zip(bundles, times, strict=True):
            caches = bundle.manifest.caches
            row = {
                "bundle": bundle.name,
                "kv": caches.dtype,
                "kv_bytes": caches.size_bytes,
                "position": position,
                "step_ms": round(median(spent[1:]) * 1e3, 2),
                "cache_read_bytes": cache_bytes_read(bundle, position),
            }
            rows.append(row)
            print(
                f"{caches.dtype} caches ({caches.size_bytes / 1e6:.0f} MB) at {position}: "
                f"{row['step_ms']} ms a step, {row['cache_read_bytes'] / 1e6:.0f} MB of caches read",
                flush=True,
            )
    print(f"all together: {memory_use()}")
    return rows


def timed_step(session: Session, position: int) -> float:
    start = time.perf_counter()
    session.step(5, position)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE")
    parser.add_argument("--recipes", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=160, help="of each text")
    parser.add_argument("--positions", type=int, nargs="+", default=[128, 1024, 4000])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    found: dict[str, int] = {}
    if args.bundles:
        rows = speed(args.bundles, args.positions, args.steps, args.threads)
    else:
        rows, found = accuracy(args.recipes, args.texts, args.tokens), sizes()
    print_json({"bench": "kv", "rows": rows, "sizes": found, "machine": about})


if __name__ == "__main__":
    main()
