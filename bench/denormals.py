"""What denormal numbers cost the thread that runs the graph: steps with and without `runtime/denormals.py`.

    python bench/denormals.py BUNDLE [--depth 1024] [--steps 40] [--threads 2]

The session is opened on one thread and run on another, as `ask` and `serve` do. Pairs of steps in turns, the
second of each pair is timed; then whole prompts in turns.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from common import machine, median, print_json, print_machine

from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.session import Session

NAMES = ("denormals", "as zero")


def run(session: Session, ids: np.ndarray, steps: int, prompts: int) -> dict[str, list[float]]:
    """Milliseconds of steps at the end of `ids`, and of prompts, by what is done about denormals."""
    prefills = {"denormals": Session.prefill.__wrapped__, "as zero": Session.prefill}
    runs = {"denormals": Session.step.__wrapped__, "as zero": Session.step}
    took: dict[str, list[float]] = {f"{what} {name}": [] for what in ("step", "prompt") for name in NAMES}
    for turn in range(2 * max(1, prompts)):
        name = NAMES[turn % 2]
        start = time.perf_counter()
        for first in range(0, len(ids), session.chunk):
            chunk = ids[first : first + session.chunk]
            prefills[name](session, chunk, first, last=first + session.chunk >= len(ids))
        took[f"prompt {name}"].append(1e3 * (time.perf_counter() - start))
    for turn in range(2 * steps):
        name = NAMES[turn % 2]
        for _ in range(2):
            start = time.perf_counter()
            runs[name](session, int(ids[-1]), len(ids))
            spent = 1e3 * (time.perf_counter() - start)
        took[f"step {name}"].append(spent)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--depth", type=int, default=1024, help="tokens in the caches")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    with ThreadPoolExecutor(1) as opener:
        session = opener.submit(Session, bundle, threads=args.threads).result()
    if session.moving is not None:
        session.moving.join()
    ids = np.random.default_rng(0).integers(1_000, bundle.manifest.geometry.vocab_size, args.depth)
    took = run(session, ids, args.steps, args.prompts)
    medians = {name: round(median(values), 2) for name, values in took.items()}
    for name, value in medians.items():
        print(f"{name:20} {value:10.2f} ms")
    ratios = {
        what: round(medians[f"{what} denormals"] / medians[f"{what} as zero"], 3)
        for what in ("step", "prompt")
    }
    print(f"times as fast: step {ratios['step']}, prompt {ratios['prompt']}")
    print_json(
        {
            "bundle": args.bundle.name,
            "depth": args.depth,
            "ms": medians,
            "ratio": ratios,
            "threads": session.threads,
            "machine": about,
        }
    )


if __name__ == "__main__":
    main()
