"""Prompt speed by length: the prefill graph against the decoder graph of the same bundle, in turns.

    gemma-edge export --model MODEL --device NAME --prefill-weights int8 --context 16896 --out BUNDLE
    python bench/prefill.py BUNDLE [--tokens 128 1024 4096 16384] [--chunks 256] [--repeats 5] [--only graph]

A prompt's time ends when the logits after its last token are there. Figures are medians; processor time per
token is printed beside, because a busy machine changes it less.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from common import machine, median, print_json, print_machine

from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.session import Session
from gemma_edge.runtime.stats import memory_use

PATHS = ("graph", "decoder")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024], metavar="N")
    parser.add_argument("--chunks", type=int, nargs="+", metavar="N", help="default: the bundle's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=PATHS, help="one of the two: for its memory")
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    chunks = args.chunks or [bundle.manifest.runtime.prefill_chunk]
    paths = [args.only] if args.only else list(PATHS)
    if bundle.manifest.prefill is None:
        paths = ["decoder"]
        print("no prefill graph in this bundle; --prefill-weights int8 writes one")
    sessions = {
        (path, chunk): Session(variant(bundle, path, chunk), threads=args.threads)
        for path in paths
        for chunk in chunks
    }
    threads = next(iter(sessions.values())).threads
    print(f"{bundle.name}: recipe {bundle.manifest.recipe}, {threads} threads; loaded: {memory_use()}")
    longest = bundle.manifest.caches.context
    rows = []
    for tokens in args.tokens:
        if tokens > longest:
            print(f"{tokens} tokens: left out, the context holds {longest}")
            continue
        rows += compare(sessions, tokens, args.repeats, bundle.manifest.geometry.vocab_size)
    memory = memory_use()
    print(f"after: {memory}")
    print_json(
        {
            "bench": "prefill",
            "bundle": bundle.name,
            "recipe": bundle.manifest.recipe,
            "threads": threads,
            "prefill_weights_bytes": bundle.manifest.prefill.weights_bytes if bundle.manifest.prefill else 0,
            "rss_bytes": memory.rss_bytes,
            "anonymous_bytes": memory.anonymous_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "rows": rows,
            "machine": about,
        }
    )


def variant(bundle: Bundle, path: str, chunk: int) -> Bundle:
    manifest = bundle.manifest
    runtime = msgspec.structs.replace(manifest.runtime, prefill_chunk=chunk)
    prefill = manifest.prefill if path == "graph" else None
    return dataclasses.replace(
        bundle, manifest=msgspec.structs.replace(manifest, runtime=runtime, prefill=prefill)
    )


def compare(
    sessions: dict[tuple[str, int], Session], tokens: int, repeats: int, vocab_size: int
) -> list[dict[str, Any]]:
    random = np.random.default_rng(tokens)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
    used: dict[tuple[str, int], list[float]] = {key: [] for key in sessions}
    for repeat in range(repeats + (tokens <= 1024)):  # short ones warm up first
        for key, session in sessions.items():
            ids = random.integers(3, vocab_size, tokens)
            start, processor = time.perf_counter(), time.process_time()
            for first in range(0, tokens, session.chunk):
                part = ids[first : first + session.chunk]
                session.prefill(part, first, last=first + len(part) == tokens)
            if repeat or tokens > 1024:
                seconds[key].append(time.perf_counter() - start)
                used[key].append(time.process_time() - processor)
            if not np.isfinite(session.logits).all():
                raise SystemExit(f"{key}: logits that are not finite")
    rows = []
    for (path, chunk), times in seconds.items():
        row = {
            "path": path,
            "chunk": chunk,
            "tokens": tokens,
            "tok_s": round(tokens / median(times), 1),
            "best_tok_s": round(tokens / min(times), 1),
            "ttft_s": round(median(times), 3),
            "cpu_ms_per_token": round(1e3 * median(used[path, chunk]) / tokens, 3),
        }
        rows.append(row)
        print(
            f"{tokens} tokens, {path}, chunks of {chunk}: {row['tok_s']} tok/s (best {row['best_tok_s']}), "
            f"first token {row['ttft_s']} s, {row['cpu_ms_per_token']} ms of processor time a token"
        )
    return rows


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
