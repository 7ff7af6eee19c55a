"""Time and memory of exporting a full-size model; one JSON object on the last line.

    python bench/export.py --model e2b|e4b --recipe int4 [--device NAME] [--checkpoint DIR] [--out DIR]

Runs `gemma-edge export` as a user would. Without --checkpoint a synthetic one is written first, which is not
timed (10 GB for e2b, 16 GB for e4b; 2.4 and 3.5 GB for recipe qat-mobile), and removed afterwards; so is the
bundle unless --out says where to keep it. Memory is what the command and its workers have resident together,
looked at 20 times a second: pages that they share count more than once, the page cache does not count.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from common import machine, print_json, print_machine

from gemma_edge.export.synthetic import MODELS, known_config, write_checkpoint
from gemma_edge.runtime.bundle import open_bundle

SAMPLE_S = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--device", default="raspberry-pi-5-8gb")
    parser.add_argument("--context", type=int)
    parser.add_argument("--checkpoint", type=Path, help="export this one")
    parser.add_argument(
        "--work", type=Path, help="for what is removed afterwards (default: the temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="keep the bundle here")
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        checkpoint = args.checkpoint or write_synthetic(Path(work) / "checkpoint", args.model, args.recipe)
        out = args.out or Path(work) / "bundle"
        seconds, cpu_seconds, peak_rss_bytes = measure(export_command(args, checkpoint, out))
        manifest = open_bundle(out).manifest
        bundle_bytes = sum(path.stat().st_size for path in out.iterdir())
    print_json(
        dict(
            bench="export",
            model=args.model,
            recipe=args.recipe,
            device=args.device,
            context=manifest.caches.context,
            seconds=round(seconds, 1),
            cpu_seconds=round(cpu_seconds, 1),
            peak_rss_bytes=peak_rss_bytes,
            bundle_bytes=bundle_bytes,
            bytes_read_per_token=manifest.memory.read_per_token_bytes,
            machine=about,
        )
    )
    return 0


def write_synthetic(folder: Path, model: str, recipe: str) -> Path:
    started = time.perf_counter()
    write_checkpoint(folder, known_config(model, "qat-mobile" if recipe == "qat-mobile" else "bf16"))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"checkpoint: {size / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return folder


def export_command(args: argparse.Namespace, checkpoint: Path, out: Path) -> list[str]:
    command = [sys.executable, "-m", "gemma_edge.cli", "export", "--model", str(checkpoint)]
    command += ["--device", args.device, "--recipe", args.recipe, "--out", str(out), "--force"]
    return command + (["--context", str(args.context)] if args.context else [])


def measure(command: list[str]) -> tuple[float, float, int]:
    """Seconds, seconds of CPU, and the most bytes resident at once in the process and its children."""
    before = os.times()
    started = time.perf_counter()
    process = psutil.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident(process))
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"bench/export.py: {' '.join(command)} ended with {process.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - started, cpu, peak


def resident(process: Any) -> int:
    total = 0
    try:
        command = process.cmdline()
        total += process.memory_info().rss
        for child in process.children(recursive=True):
            if child.cmdline() != command:  # else it is about to start, and still has its parent's memory
                total += child.memory_info().rss
    except psutil.NoSuchProcess:  # it has just ended
        pass
    return total


if __name__ == "__main__":
    sys.exit(main())
