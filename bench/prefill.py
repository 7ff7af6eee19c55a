"""Prompt speed by length: the prefill graph against the decoder graph of the same bundle, in turns.

    gemma-edge export --model MODEL --device NAME --prefill-weights int8 --context 16896 --out BUNDLE
    python bench/prefill.py BUNDLE [--tokens 128 1024 4096 16384] [--chunks 256] [--repeats 5] [--only graph]
                            [--prepared DIR]

Lengths are run in turns too. A prompt's time ends when the logits after its last token are there. Figures are
medians; processor time per token is printed beside, because a busy machine changes it less. As on a lesser
processor: bench/cpuid_mask.c.
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
WARMS_UP = 1024  # tokens; longer prompts come after these


@dataclasses.dataclass(frozen=True)
class Runs:
    """Prompts of one length on one graph."""

    path: str
    chunk: int
    tokens: int
    session: Session
    seconds: list[float]
    used: list[float]  # of all processors


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
    parser.add_argument("--decoder-tokens", type=int, metavar="N", help="longest prompt of the decoder graph")
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="packed weights (`gemma-edge prepare`)")
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = dataclasses.replace(open_bundle(args.bundle), prepared=args.prepared)
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
    lengths = [tokens for tokens in args.tokens if tokens <= longest]
    if lengths != args.tokens:
        print(f"left out: {sorted(set(args.tokens) - set(lengths))} tokens, the context holds {longest}")
    runs = [
        Runs(path, chunk, tokens, session, [], [])
        for tokens in lengths
        for (path, chunk), session in sessions.items()
        if path == "graph" or tokens <= (args.decoder_tokens or tokens)
    ]
    for repeat in range(args.repeats + 1):
        for run in runs:
            if repeat or run.tokens <= WARMS_UP:
                measure(run, repeat, bundle.manifest.geometry.vocab_size)
    rows = [row(run) for run in runs]
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


def measure(run: Runs, repeat: int, vocab_size: int) -> None:
    """One prompt; that of round 0 warms up."""
    session, tokens = run.session, run.tokens
    ids = np.random.default_rng(tokens + repeat).integers(3, vocab_size, tokens)
    start, processor = time.perf_counter(), time.process_time()
    for first in range(0, tokens, session.chunk):
        part = ids[first : first + session.chunk]
        session.prefill(part, first, last=first + len(part) == tokens)
    if repeat:
        run.seconds.append(time.perf_counter() - start)
        run.used.append(time.process_time() - processor)
    if not np.isfinite(session.logits).all():
        raise SystemExit(f"{run.path}, {tokens} tokens: logits that are not finite")


def row(run: Runs) -> dict[str, Any]:
    """Medians, printed and returned."""
    tokens, seconds = run.tokens, median(run.seconds)
    figures = {
        "path": run.path,
        "chunk": run.chunk,
        "tokens": tokens,
        "tok_s": round(tokens / seconds, 1),
        "best_tok_s": round(tokens / min(run.seconds), 1),
        "ttft_s": round(seconds, 3),
        "cpu_ms_per_token": round(1e3 * median(run.used) / tokens, 3),
    }
    print(
        f"{tokens} tokens, {run.path}, chunks of {run.chunk}: {figures['tok_s']} tok/s (best "
        f"{figures['best_tok_s']}), first token {figures['ttft_s']} s, {figures['cpu_ms_per_token']} ms of "
        "processor time a token"
    )
    return figures


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
