"""The built-in engine and onnxruntime-genai on one bundle, in turns: prefill, decode, memory, same tokens.

python bench/engines.py BUNDLE [--prompt 128] [--answer 64] [--repeats 5] [--threads N]
    [--engines builtin,genai]

Each engine lives in a process of its own, so that its memory is its own; one works while the other waits.
Prompts are random ids, other ones in each repeat. No prefix cache and no guesses, which genai lacks. The
provider (CPU, CUDA) is the bundle's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from common import PACKAGES, _version, machine, median, print_json, print_machine

from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.stats import memory_use

ENGINES = ("builtin", "genai")
MIB = 2**20


class Worker:
    """An engine in its process."""

    def __init__(self, name: str, bundle: Path, threads: int | None) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(name, bundle, threads, theirs), daemon=True)
        self._process.start()
        self.loaded: dict[str, Any] = self._pipe.recv()

    def answer(self, prompt: list[int], count: int) -> dict[str, Any]:
        self._pipe.send((prompt, count))
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _work(name: str, path: Path, threads: int | None, pipe: Connection) -> None:
    bundle = open_bundle(path)
    start = time.perf_counter()
    if name == "genai":
        from gemma_edge.runtime.genai_engine import GenaiEngine

        engine: Any = GenaiEngine(bundle, threads=threads)
    else:
        from gemma_edge.runtime.engine import Engine

        engine = Engine(bundle, threads=threads)
    used = engine.threads if name == "genai" else engine._session.threads
    pipe.send(dict(load_s=time.perf_counter() - start, threads=used))
    while (request := pipe.recv()) is not None:
        prompt, count = request
        tokens = list(engine.generate(prompt, max_new_tokens=count))
        stats = engine.last_stats
        pipe.send(
            dict(
                tokens=tokens,
                prefill=stats.prefill_tokens_per_s,
                decode=stats.decode_tokens_per_s,
                ttft_s=stats.ttft_s,
                memory=asdict(memory_use()),
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--engines", default=",".join(ENGINES))
    args = parser.parse_args()

    about = machine()
    about["versions"] = {name: _version(name) for name in (*PACKAGES, "onnxruntime-genai")}
    print_machine(about)
    manifest = open_bundle(args.bundle).manifest
    workers = [Worker(name, args.bundle, args.threads) for name in args.engines.split(",")]
    random = np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    same = 0
    for repeat in range(args.repeats + 1):  # the first one warms up
        prompt = random.integers(2000, manifest.geometry.vocab_size, args.prompt).tolist()
        turn = workers if repeat % 2 else workers[::-1]
        done = {worker.name: worker.answer(prompt, args.answer) for worker in turn}
        if repeat:
            same += len({tuple(row["tokens"]) for row in done.values()}) == 1
            for name, row in done.items():
                rows[name].append(row)
    result: dict[str, Any] = {
        "bench": "engines",
        "bundle": args.bundle.name,
        "recipe": manifest.recipe,
        "provider": manifest.runtime.execution_provider,
        "kv": manifest.caches.dtype,
        "prompt": args.prompt,
        "answer": args.answer,
        "repeats": args.repeats,
        "threads": workers[0].loaded["threads"],
        "same_answers": same / args.repeats,
    }
    for worker in workers:
        found = rows[worker.name]
        memory = found[-1]["memory"]
        figures = {
            name: round(median([row[name] for row in found]), 4) for name in ("prefill", "decode", "ttft_s")
        }
        figures |= {
            "load_s": round(worker.loaded["load_s"], 2),
            "rss_mib": memory["rss_bytes"] // MIB,
            "anonymous_mib": (memory["anonymous_bytes"] or 0) // MIB,
        }
        result[worker.name] = figures
        print(
            f"{worker.name}: prefill {figures['prefill']:.1f} tok/s, decode {figures['decode']:.2f} tok/s, "
            f"first token {figures['ttft_s']:.3f} s; loaded in {figures['load_s']} s; "
            f"{figures['rss_mib']} MiB resident, {figures['anonymous_mib']} anonymous"
        )
        worker.close()
    if len(workers) > 1:
        first, second = (result[worker.name] for worker in workers[:2])
        for name in ("prefill", "decode"):
            result[f"{name}_ratio"] = round(first[name] / second[name], 3)
        print(
            f"{workers[0].name} is {result['prefill_ratio']} times as fast in prefill, "
            f"{result['decode_ratio']} in decode; {same} of {args.repeats} answers the same"
        )
    result["machine"] = about
    print_json(result)


if __name__ == "__main__":
    main()
