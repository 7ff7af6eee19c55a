"""What a long context costs: prompt speed and memory chunk by chunk, and decode steps at far positions.

    gemma-edge export --model MODEL --device DEVICE --context 131072 --out BUNDLE
    python bench/context.py BUNDLE --prompt 16384 --positions 1024 32768 131000

Decode steps do not wait for a prompt that long: the caches are filled with made-up keys and values, which
cost what real ones cost. What the model says then means nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, median, print_json, print_machine, read_bandwidth_bytes_per_s

from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.session import Session
from gemma_edge.runtime.stats import memory_use

FILL_VALUES = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prompt", type=int, default=0, metavar="N", help="tokens of prompt to run")
    parser.add_argument("--positions", type=int, nargs="*", default=[], metavar="P")
    parser.add_argument("--steps", type=int, default=8, help="decode steps at each position")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    manifest = bundle.manifest
    session = Session(bundle, threads=args.threads)
    caches = manifest.caches
    print(
        f"{bundle.name}: context {caches.context}, caches {caches.dtype} "
        f"{caches.size_bytes / 2**20:.0f} MiB, chunks of {session.chunk}; loaded: {memory_use()}"
    )
    loaded = memory_use()
    prompt = run_prompt(session, args.prompt, manifest.geometry.vocab_size) if args.prompt else []
    positions = []
    if args.positions:
        fill_caches(bundle, session)
        bandwidth = read_bandwidth_bytes_per_s(session.threads)
        positions = [
            run_steps(bundle, session, position, args.steps, bandwidth) for position in args.positions
        ]
    print_json(
        {
            "bench": "context",
            "bundle": bundle.name,
            "recipe": manifest.recipe,
            "context": caches.context,
            "kv_dtype": caches.dtype,
            "kv_bytes": caches.size_bytes,
            "threads": session.threads,
            "loaded_anonymous_bytes": loaded.anonymous_bytes,
            "peak_rss_bytes": peak_rss_bytes(),
            "prompt": prompt,
            "positions": positions,
            "machine": about,
        }
    )


def run_prompt(session: Session, tokens: int, vocab_size: int) -> list[dict[str, Any]]:
    """Prompt in chunks; a line each time the number of tokens has doubled."""
    ids = np.random.default_rng(0).integers(3, vocab_size, tokens)
    lines, mark, done, since = [], 1024, 0, 0
    forget_peak()
    start = time.perf_counter()
    while done < tokens:
        end = min(done + session.chunk, tokens)
        session.prefill(ids[done:end], done, last=end == tokens)
        done = end
        if done >= mark or done == tokens:
            seconds, peak = time.perf_counter() - start, peak_rss_bytes()
            line = {
                "tokens": done,
                "tok_s": round((done - since) / seconds, 1),  # of the tokens since the last line
                "peak_rss_bytes": peak,
                "anonymous_bytes": memory_use().anonymous_bytes,
            }
            print(
                f"prompt to {done}: {line['tok_s']} tok/s, peak {peak / 2**20:.0f} MiB resident, "
                f"then {memory_use()}"
            )
            lines.append(line)
            mark, since = 2 * done, done
            forget_peak()
            start = time.perf_counter()
    return lines


def fill_caches(bundle: Bundle, session: Session) -> None:
    """Made-up keys and values everywhere, in place."""
    random = np.random.default_rng(1)
    dtype = np.dtype(bundle.manifest.caches.dtype)
    noise = random.standard_normal(FILL_VALUES).astype(np.float32)
    block = np.clip(np.rint(noise * 20), -127, 127).astype(dtype) if dtype == np.int8 else noise.astype(dtype)
    for value in session.caches.values.values():
        count = int(np.prod(value.shape()))
        memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(value.data_ptr())
        values = np.frombuffer(memory, dtype)
        for first in range(0, count, FILL_VALUES):
            values[first : first + FILL_VALUES] = block[: min(FILL_VALUES, count - first)]


def run_steps(
    bundle: Bundle, session: Session, position: int, steps: int, bandwidth: float
) -> dict[str, Any]:
    """Decode steps from `position` on; the first one warms up."""
    forget_peak()
    times = []
    for offset in range(steps + 1):
        start = time.perf_counter()
        session.step(5 + offset, position + offset)
        times.append(time.perf_counter() - start)
        if not np.isfinite(session.logits).all():
            raise SystemExit(f"position {position + offset}: logits that are not finite")
    step_s = median(times[1:])
    read_bytes = bundle.manifest.memory.read_per_token_bytes + cache_bytes_read(bundle, position)
    memory = memory_use()
    print(
        f"position {position}: {step_s * 1e3:.1f} ms a step, {1 / step_s:.2f} tok/s; "
        f"reads {read_bytes / 2**20:.0f} MiB, {read_bytes / step_s / bandwidth:.0%} of "
        f"{bandwidth / 1e9:.1f} GB/s; {memory}"
    )
    return {
        "position": position,
        "step_ms": round(step_s * 1e3, 2),
        "read_bytes": read_bytes,
        "share_of_bandwidth": round(read_bytes / step_s / bandwidth, 3),
        "peak_rss_bytes": peak_rss_bytes(),
        "anonymous_bytes": memory.anonymous_bytes,
    }


def cache_bytes_read(bundle: Bundle, position: int) -> int:
    """Keys and values that a step reads: every layer reads a cache, KV-shared layers their source's."""
    manifest = bundle.manifest
    geometry, item = manifest.geometry, np.dtype(manifest.caches.dtype).itemsize
    size = {layer.layer_type: 2 * layer.kv_heads * layer.head_dim * item for layer in manifest.caches.layers}
    seen = {"sliding_attention": min(position, geometry.sliding_window), "full_attention": position}
    return sum(size[kind] * seen[kind] for kind in geometry.layer_types)


def forget_peak() -> None:
    """Make the kernel count the peak from here on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
