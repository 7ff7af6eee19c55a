"""Speed of one bundle: prefill, decode, first token, and where a decode step spends its time.

    python bench/decode.py BUNDLE [--prompt-tokens 128 1024] [--depths 0 1024] [--threads N]

Figures are medians over repeats (for a step: over all steps). A decode step cannot be faster than reading
the weights and the caches in use once, so its speed is also given as a share of that: of the bandwidth with
which as many threads read memory here. For each depth a table has the step by operator: bytes read, time,
bandwidth (bench/operators.py, which needs the onnx package).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import operators
from common import machine, median, print_json, print_machine, read_bandwidth_bytes_per_s

from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.stats import memory_use

STEPS = 24  # of a table by operator


class RunClock:
    """Adds up the time spent inside a session, or a decoder of several, without changing it."""

    def __init__(self, session: Any) -> None:
        self.spent_s = 0.0
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run_with_iobinding(self, *args: Any) -> None:
        self._timed(self._session.run_with_iobinding, *args)

    def run(self, *args: Any) -> None:
        self._timed(self._session.run, *args)

    def _timed(self, run: Callable[..., None], *args: Any) -> None:
        start = time.perf_counter()
        run(*args)
        self.spent_s += time.perf_counter() - start


def measure(engine: Engine, prompt: list[int], new_tokens: int, params: SamplingParams) -> dict[str, Any]:
    """One generation that no stop id ends: times in seconds."""
    session = engine._session
    clocks = [session.decoder, session.embeddings]
    steps: list[float] = []
    outside: list[float] = []
    start = time.perf_counter()
    tokens = engine.generate(prompt, params, max_new_tokens=new_tokens)
    next(tokens)
    first_s = time.perf_counter() - start
    while True:
        inside = sum(clock.spent_s for clock in clocks)
        before = time.perf_counter()
        if next(tokens, None) is None:
            break
        steps.append(time.perf_counter() - before)
        outside.append(steps[-1] - (sum(clock.spent_s for clock in clocks) - inside))
    stats = engine.last_stats
    assert stats is not None
    return {"prefill_s": stats.prefill_s, "ttft_s": first_s, "steps": steps, "outside": outside}


def measure_depth(session: Any, bundle: Bundle, depth: int, steps: int, bandwidth: float) -> dict[str, Any]:
    """The step by operator after `depth` tokens, and how fast a whole one is without the profile."""
    random = np.random.default_rng(0)
    vocab = bundle.manifest.geometry.vocab_size
    ids = random.integers(3, vocab, depth)
    for first in range(0, depth, session.chunk):
        chunk = ids[first : first + session.chunk]
        session.prefill(chunk, first, last=first + len(chunk) == depth)
    times = []
    for step in range(operators.WARM_UP + steps):
        start = time.perf_counter()
        session.step(int(random.integers(3, vocab)), depth + step)
        times.append(time.perf_counter() - start)
    step_s = median(times[operators.WARM_UP :])
    rows = operators.profile_steps(session, bundle, depth, steps)
    caches = sum(row.read_bytes for row in rows if row.operator.startswith("attention"))
    read_bytes = bundle.manifest.memory.read_per_token_bytes + caches
    share = read_bytes / step_s / bandwidth
    print(
        f"\ndepth {depth}: {step_s * 1e3:.2f} ms a step, {1 / step_s:.2f} tok/s, "
        f"{read_bytes / 1e6:.0f} MB read"
    )
    print(f"= {read_bytes / step_s / 1e9:.1f} GB/s, {share:.0%} of {bandwidth / 1e9:.1f} GB/s; profiled:")
    print(f"  {'operator':36}{'calls':>6}{'ms':>9}{'MB':>9}{'GB/s':>7}")
    for row in rows:
        read = f"{row.read_bytes / 1e6:9.1f}{row.gb_s:7.1f}" if row.read_bytes else ""
        print(f"  {row.operator:36}{row.calls:6}{row.ms:9.3f}{read}")
    return {
        "depth": depth,
        "step_ms": round(step_s * 1e3, 3),
        "decode_tok_s": round(1 / step_s, 2),
        "read_bytes": read_bytes,
        "share_of_bandwidth": round(share, 3),
        "operators": [
            {
                "operator": row.operator,
                "calls": row.calls,
                "ms": round(row.ms, 3),
                "read_bytes": row.read_bytes,
            }
            for row in rows
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--depths", type=int, nargs="*", default=[0, 1024], help="of the steps by operator")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--prepared", type=Path, metavar="DIR", help="packed weights (`gemma-edge prepare`)")
    parser.add_argument("--no-tables", action="store_true", help="no steps by operator")
    parser.add_argument("--bandwidth", type=float, metavar="GB_S", help="of memory, if it is known already")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    start = time.perf_counter()
    bundle = dataclasses.replace(open_bundle(args.bundle), prepared=args.prepared)
    engine = Engine(bundle, threads=args.threads)
    load_s = time.perf_counter() - start
    engine.eos = frozenset()  # a random prompt may stop at once
    engine._session.decoder = RunClock(engine._session.decoder)
    engine._session.embeddings = RunClock(engine._session.embeddings)
    operators.move(bundle)
    threads = engine._session.threads
    bandwidth = args.bandwidth * 1e9 if args.bandwidth else read_bandwidth_bytes_per_s(threads)
    read_bytes = bundle.manifest.memory.read_per_token_bytes
    print(
        f"{bundle.name}: recipe {bundle.manifest.recipe}, {threads} threads, loaded in {load_s:.2f} s; "
        f"{read_bytes / 2**20:.1f} MiB read per token, memory reads {bandwidth / 1e9:.1f} GB/s"
    )

    params = SamplingParams(temperature=args.temperature, top_p=args.top_p, seed=0)
    random = np.random.default_rng(0)
    rows = []
    for prompt_tokens in args.prompt_tokens:
        runs = []
        for _ in range(args.repeats + 1):
            prompt = random.integers(3, bundle.manifest.geometry.vocab_size, prompt_tokens).tolist()
            runs.append(measure(engine, prompt, args.new_tokens, params))
        runs = runs[1:]  # the first one warms up
        step_s = median([step for run in runs for step in run["steps"]])
        outside_s = median([step for run in runs for step in run["outside"]])
        prefill_s = median([run["prefill_s"] for run in runs])
        row = {
            "prompt_tokens": prompt_tokens,
            "prefill_tok_s": round(prompt_tokens / prefill_s, 1),
            "ttft_s": round(median([run["ttft_s"] for run in runs]), 4),
            "decode_tok_s": round(1 / step_s, 2),
            "step_ms": round(step_s * 1e3, 3),
            "outside_run_us": round(outside_s * 1e6, 1),
            "share_of_bandwidth": round(read_bytes / step_s / bandwidth, 3),
        }
        rows.append(row)
        print(
            f"prompt {prompt_tokens}: prefill {row['prefill_tok_s']} tok/s, first token {row['ttft_s']} s, "
            f"decode {row['decode_tok_s']} tok/s ({row['step_ms']} ms a step, {row['outside_run_us']} us "
            f"of it outside session.run, {row['share_of_bandwidth']:.0%} of bandwidth)"
        )
    memory = memory_use()
    print(f"memory: {memory}")
    depths = [] if args.no_tables else args.depths
    if too_deep := [depth for depth in depths if depth + 2 * STEPS > bundle.manifest.caches.context]:
        print(
            f"left out: depths {too_deep}, beyond this bundle's context of {bundle.manifest.caches.context}"
        )
    by_depth = [
        measure_depth(engine._session, bundle, depth, STEPS, bandwidth)
        for depth in depths
        if depth not in too_deep
    ]
    print_json(
        {
            "bench": "decode",
            "bundle": bundle.name,
            "recipe": bundle.manifest.recipe,
            "threads": threads,
            "load_s": round(load_s, 3),
            "read_per_token_bytes": read_bytes,
            "read_bandwidth_bytes_per_s": round(bandwidth),
            "rss_bytes": memory.rss_bytes,
            "anonymous_bytes": memory.anonymous_bytes,
            "file_bytes": memory.file_bytes,
            "rows": rows,
            "depths": by_depth,
            "machine": about,
        }
    )


if __name__ == "__main__":
    main()
