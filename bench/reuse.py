"""Time to the first token of a second turn and of a new sensor window, with and without reuse, in turns.

python bench/reuse.py BUNDLE [--system 1000] [--window 150] [--turn 30] [--answer 40] [--repeats 5]

Prompts are random ids: a system prompt of --system tokens, then a sensor window of --window. The second turn
adds --turn tokens to the first and its answer of --answer tokens. "restart" is a new window after a new
start, with the system prompt's caches on disk (files in the page cache). Figures are medians over repeats.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine, median, print_json, print_machine

from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.prefix import ReuseSettings, default_budget_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--system", type=int, default=1000)
    parser.add_argument("--window", type=int, default=150)
    parser.add_argument("--turn", type=int, default=30)
    parser.add_argument("--answer", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    vocab, budget = bundle.manifest.geometry.vocab_size, default_budget_bytes(bundle.manifest)
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return random.integers(300, vocab - 300, count).tolist()

    system = ids(args.system)
    figures: dict[str, list[float]] = {}
    ran: dict[str, list[float]] = {}  # tokens of the prompt, without those that were reused
    with tempfile.TemporaryDirectory() as folder:
        kept = ReuseSettings(budget, Path(folder), boundary=lambda keys: len(system))

        def run(engine: Engine, prompt: list[int], name: str | None) -> list[int]:
            tokens = list(engine.generate(prompt, max_new_tokens=args.answer))
            assert engine.last_stats is not None
            if name is not None:
                stats = engine.last_stats
                figures.setdefault(name, []).append(stats.ttft_s)
                ran.setdefault(name, []).append(stats.prompt_tokens - stats.reused_tokens)
            return tokens

        engines = {"without": Engine(bundle, threads=args.threads)}
        engines["with"] = Engine(bundle, threads=args.threads, reuse=kept)
        for engine in engines.values():
            engine.eos = frozenset()
            run(engine, system + ids(args.window), None)
        for _ in range(args.repeats):
            window = system + ids(args.window)
            turn = ids(args.turn)
            for name, engine in engines.items():
                answer = run(engine, window, f"window_{name}")
                run(engine, window + answer + turn, f"turn_{name}")
        engines["with"].close()
        reuse = engines["with"]._reuse
        assert reuse is not None and reuse.snapshots is not None
        snapshot = next(one for one in reuse.snapshots if one.kind == "shared")
        engines.clear()
        for _ in range(3):
            start = time.perf_counter()
            engine = Engine(bundle, threads=args.threads, reuse=kept)
            figures.setdefault("load", []).append(time.perf_counter() - start)
            run(engine, system + ids(args.window), "window_restart")
    seconds = {name: round(median(values), 4) for name, values in figures.items()}
    for what, new in (("window", args.window), ("turn", args.turn)):
        without, reusing = seconds[f"{what}_without"], seconds[f"{what}_with"]
        print(f"{what} of {new} new tokens: {without} s, with reuse {reusing} s: 1/{without / reusing:.1f}")
    print(
        f"after a restart: {seconds['window_restart']} s; the system prompt's caches take "
        f"{snapshot.size_bytes / 2**20:.1f} MiB of {budget / 2**20:.0f}"
    )
    print_json(
        {
            "bench": "reuse",
            "bundle": bundle.name,
            "recipe": bundle.manifest.recipe,
            "system_tokens": args.system,
            "window_tokens": args.window,
            "turn_tokens": args.turn,
            "seconds": seconds,
            "tokens_run": {name: median(values) for name, values in ran.items()},
            "window_ratio": round(seconds["window_without"] / seconds["window_with"], 2),
            "turn_ratio": round(seconds["turn_without"] / seconds["turn_with"], 2),
            "snapshot_bytes": snapshot.size_bytes,
            "budget_bytes": budget,
            "machine": about,
        }
    )


if __name__ == "__main__":
    main()
