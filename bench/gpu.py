"""Speed of a bundle on CUDA: decode with and without captured steps, prefill, kernels, gaps, bandwidth.

    python bench/random_bundle.py fill SKELETON /tmp/e2b && python bench/gpu.py /tmp/e2b [--json OUT.json]

Greedy decoding after a prompt; times are medians over steps and hold everything from id to id: rows looked up
on the CPU, copies, the decoder, the pick on the GPU. Each variant (how attention and products are computed)
runs in its own session, and one that fails is reported and left out. Kernels are counted by torch's profiler,
if torch is there; time between them, while the GPU waits, is what is left of a step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from common import machine, median, print_json, print_machine

from gemma_edge.runtime.bundle import GREEDY, Bundle, open_bundle
from gemma_edge.runtime.cuda_session import CudaSession, CudaSettings

FPA = {"ep.cuda.fpa_intb_gemm": "1"}
MEA = {"sdpa_kernel": "0"}  # whatever ONNX Runtime takes: memory-efficient attention for heads of 512
# name -> settings; the first is what others are compared with
VARIANTS: dict[str, dict[str, Any]] = {
    "ONNX Runtime's kernels, launched one by one": dict(own_kernels=False, capture=False),
    "ONNX Runtime's kernels, captured": dict(own_kernels=False),
    "ONNX Runtime's, captured, memory-efficient attention": dict(own_kernels=False, provider_options=MEA),
    "ONNX Runtime's, captured, weight-only products": dict(own_kernels=False, config=FPA),
    "own kernels, launched one by one": dict(capture=False),
    "own kernels, captured": dict(),
}
BRIEF = ("ONNX Runtime's kernels, captured", "own kernels, captured")


class Clock:
    """Adds up the time that calls of a session take."""

    def __init__(self, session: Any) -> None:
        self.spent_s = 0.0
        self._session = session

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        if name not in ("run", "run_with_iobinding"):
            return found

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = found(*args)
            self.spent_s += time.perf_counter() - start
            return result

        return timed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cuda_bundle", type=Path, help="a bundle made for CUDA")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="before decoding")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, nargs="+", default=(128, 512, 1024, 3072))
    parser.add_argument("--brief", action="store_true", help="captured variants alone, kernels of the best")
    parser.add_argument("--json", type=Path, help="write the last line here too")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script")
    args = parser.parse_args()
    bundle = open_bundle(args.cuda_bundle)
    about = machine() | {"gpu": gpu_line(), "providers": ort.get_available_providers()}
    print_machine(about)
    print(f"GPU: {about['gpu']}")
    read_bytes = bundle.manifest.memory.read_per_token_bytes
    print(f"{bundle.name}: recipe {bundle.manifest.recipe}, {read_bytes / 1e6:.1f} MB of weights a token\n")
    result: dict[str, Any] = {"bench": "cuda", "bundle": bundle.name, "recipe": bundle.manifest.recipe}
    result |= {"read_per_token_bytes": read_bytes, "prompt_tokens": args.prompt_tokens, "machine": about}
    result["gpu_copy_gb_s"] = attempt(
        "bandwidth", lambda: copy_bandwidth_gb_s() if args.device == "cuda" else 0
    )
    variants: dict[str, Any] = {}
    result["variants"] = variants
    first: list[int] | None = None
    for name, settings in VARIANTS.items():
        if args.brief and name not in BRIEF:
            continue
        row = attempt(name, lambda settings=settings: run_variant(bundle, args, settings))
        if row is None:
            continue
        tokens = row.pop("tokens")
        first = first or tokens
        row["same_tokens_as_first"] = next(
            (i for i, (a, b) in enumerate(zip(first, tokens, strict=True)) if a != b), len(tokens)
        )
        row["read_gb_s"] = (read_bytes + row["cache_bytes"]) / row["decode_ms"] / 1e6
        variants[name] = row
        print(
            f"{name:42} decode {row['decode_ms']:.3f} ms = {1e3 / row['decode_ms']:.0f} tok/s "
            f"({row['read_gb_s']:.0f} GB/s; {row['parts_ms']}), prefill "
            + ", ".join(f"{n}: {v:,.0f}" for n, v in row["prefill_tok_s"].items())
            + f" tok/s; same tokens {row['same_tokens_as_first']}/{len(tokens)}; open {row['open_s']:.1f} s, "
            f"{row['gpu_mib']} MiB",
            flush=True,
        )
    captured = {name: row for name, row in variants.items() if "captured" in name}
    if captured:
        best = min(captured, key=lambda name: captured[name]["decode_ms"])
        result["best"] = best
        for name in dict.fromkeys((best,) if args.brief else (BRIEF[0], best)):
            found = attempt(
                f"kernels of {name}", lambda name=name: count_kernels(bundle, args, VARIANTS[name])
            )
            if found:
                result.setdefault("kernels", {})[name] = found
                print(
                    f"\n{name}: {found['kernels']:.0f} kernels and {found['copies']:.0f} copies a step, busy "
                    f"{found['busy_ms']:.3f} of {found['step_ms']:.3f} ms"
                )
                for name, copy in found["copied"].items():
                    print(f"  {copy['ms']:.4f} ms  {copy['count']:5.1f} x  {name}")
                for kernel in found["top"]:
                    print(f"  {kernel['ms']:.4f} ms  {kernel['count']:5.1f} x  {kernel['name'][:110]}")
    nodes = None if args.brief else attempt("nodes", lambda: count_nodes(bundle, args))
    if nodes:
        result["nodes"] = nodes
        print(f"\nnodes of a step by ONNX Runtime's profile: {nodes['by_provider']}")
        for op, row in list(nodes["by_op"].items())[:14]:
            print(f"  {row['ms']:.4f} ms  {row['count']:5.1f} x  {op}")
    print()
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    print_json(result)
    return 0 if variants else 1


def attempt(name: str, what: Any) -> Any:
    try:
        return what()
    except Exception as error:  # one part that fails leaves the others
        print(f"{name}: FAILED: {type(error).__name__}: {str(error)[:1500]}", flush=True)
        traceback.print_exc(limit=-4)
        return None
    finally:
        gc.collect()


def open_session(bundle: Bundle, args: argparse.Namespace, settings: dict[str, Any]) -> CudaSession:
    return CudaSession(bundle, settings=CudaSettings(device=args.device, **settings))


def run_variant(bundle: Bundle, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    session = open_session(bundle, args, settings)
    open_s = time.perf_counter() - start
    tokens = decode(session, args, args.new_tokens)[1]  # warms up, too
    clocks = {"decoder": Clock(session.decoder), "pick": Clock(session._pickers[GREEDY])}
    clocks["embeddings"] = Clock(session.embeddings)
    session.decoder, session._pickers[GREEDY] = clocks["decoder"], clocks["pick"]  # type: ignore[assignment]
    session.embeddings = session._inputs._embeddings = clocks["embeddings"]  # type: ignore[assignment]
    if session._own is not None:
        clocks["own kernels"] = Clock(session._own)
        session._own = clocks["own kernels"]  # type: ignore[assignment]
    for clock in clocks.values():
        clock.spent_s = 0.0
    steps, again = decode(session, args, args.new_tokens, clocks)
    assert again == tokens, "a second run gives other tokens"
    parts = {name: round(clock.spent_s / len(steps) * 1e3, 3) for name, clock in clocks.items()}
    prefill = {}
    random = np.random.default_rng(1)
    for count in args.prefill:
        if count >= bundle.manifest.caches.context:
            continue
        ids = random.integers(3, session._vocab_size, count)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            prefill_all(session, ids)
            times.append(time.perf_counter() - start)
        prefill[str(count)] = count / min(times[1:])
    return dict(
        decode_ms=median(steps) * 1e3,
        fastest_ms=min(steps) * 1e3,
        parts_ms=parts,
        prefill_tok_s=prefill,
        open_s=open_s,
        gpu_mib=gpu_used_mib(),
        cache_bytes=cache_bytes(bundle, args.prompt_tokens),
        tokens=tokens,
    )


def prefill_all(session: CudaSession, ids: np.ndarray) -> None:
    for first in range(0, len(ids), session.chunk):
        part = ids[first : first + session.chunk]
        session.prefill(part, first, last=first + len(part) == len(ids))


def decode(
    session: CudaSession, args: argparse.Namespace, count: int, clocks: dict[str, Clock] | None = None
) -> tuple[list[float], list[int]]:
    """Seconds of each step, and the ids."""
    ids = np.random.default_rng(0).integers(3, session._vocab_size, args.prompt_tokens)
    prefill_all(session, ids)
    token = session.best()
    for clock in (clocks or {}).values():
        clock.spent_s = 0.0
    steps, tokens = [], [token]
    for position in range(args.prompt_tokens, args.prompt_tokens + count):
        start = time.perf_counter()
        session.step(token, position)
        token = session.best()
        steps.append(time.perf_counter() - start)
        tokens.append(token)
    return steps, tokens


def cache_bytes(bundle: Bundle, tokens: int) -> int:
    """Of keys and values that a step reads: KV-shared layers read their source's."""
    manifest = bundle.manifest
    shape, caches = manifest.geometry, manifest.caches
    per_type = {
        layer.layer_type: 2 * layer.kv_heads * layer.head_dim * 2 * min(tokens, layer.capacity)
        for layer in caches.layers
    }
    return sum(per_type[layer_type] for layer_type in shape.layer_types)


def count_kernels(bundle: Bundle, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Kernels of a step, and how long the GPU is at work: by torch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    session = open_session(bundle, args, settings)
    decode(session, args, 4)
    activities = [ProfilerActivity.CUDA] if args.device == "cuda" else [ProfilerActivity.CPU]
    torch.zeros(1, device=args.device)
    count = 16
    ids = np.random.default_rng(0).integers(3, session._vocab_size, args.prompt_tokens)
    prefill_all(session, ids)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        for position in range(args.prompt_tokens, args.prompt_tokens + count):
            session.step(5, position)
            session.best()
        wall = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        by_name[event["name"]].append(event["dur"])
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:40]
    copied: dict[str, list[float]] = defaultdict(list)
    for event in copies:
        size = event.get("args", {}).get("bytes", "?")
        copied[f"{event['name']} {size} bytes"].append(event["dur"])
    busy = sum(event["dur"] for event in (*kernels, *copies)) / 1e3 / count
    return dict(
        kernels=len(kernels) / count,
        copies=len(copies) / count,
        busy_ms=busy,
        step_ms=wall / count * 1e3,
        gap_ms=wall / count * 1e3 - busy,
        top=[dict(name=name, count=len(times) / count, ms=sum(times) / count / 1e3) for name, times in top],
        copied={name: dict(count=len(t) / count, ms=sum(t) / count / 1e3) for name, t in copied.items()},
    )


def count_nodes(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """Nodes of a step and their provider, by ONNX Runtime's own profile of a session without capture."""
    session = open_session(bundle, args, dict(own_kernels=False, capture=False))
    options = ort.SessionOptions()
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/ort"
        providers = ["CPUExecutionProvider"]
        if args.device == "cuda":
            providers.insert(0, "CUDAExecutionProvider")
        session.decoder = ort.InferenceSession(str(bundle.cuda_decoder), options, providers=providers)
        exact = type(session._exact)(session, 1, None)
        for position in range(12):
            session._inputs.set(5, position)
            exact.run(position + 1)
        events = json.loads(Path(session.decoder.end_profiling()).read_text())
    by_op: dict[str, dict[str, float]] = defaultdict(lambda: {"count": 0.0, "ms": 0.0})
    by_provider: dict[str, float] = defaultdict(float)
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            row = by_op[arguments["op_name"]]
            row["count"] += 1 / 12
            row["ms"] += event["dur"] / 1e3 / 12
            by_provider[arguments.get("provider", "?")] += 1 / 12
    ordered = dict(sorted(by_op.items(), key=lambda item: -item[1]["ms"]))
    return dict(by_op=ordered, by_provider=dict(by_provider))


def copy_bandwidth_gb_s() -> float:
    """Bytes read and written by a copy of 1 GiB on the GPU, each second."""
    import torch

    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start) / 1e9)
    del source, target
    torch.cuda.empty_cache()
    return best


def gpu_line() -> str:
    return _smi("name,driver_version,memory.total")


def gpu_used_mib() -> str:
    return _smi("memory.used").removesuffix(" MiB")


def _smi(query: str) -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    except OSError:
        return "unknown"


if __name__ == "__main__":
    raise SystemExit(main())
