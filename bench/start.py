"""How a start goes: seconds to the first token and memory, with and without packed weights, warm and cold.

    python bench/start.py BUNDLE [--prepared DIR] [--repeats 3] [--cold] [--whole] [--long]

Each start is a process of its own, `gemma-edge ask`, timed from its creation to its end, less the steps after
the first token. Packed weights are written first, if DIR (default: a temporary folder beside the bundle) has
none that fit. A cold start follows after the system was asked to drop the files' pages (posix_fadvise); how
many stayed is printed. With --whole the same bundle also starts with its decoder in one graph, not in parts.
The question is short, so `ask` leaves the prefill graph closed; --long asks one that opens it, too.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import machine, median, print_json, print_machine, with_whole_decoder

from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.prepared import make, misfit

FIRST_TOKEN_TARGET_S = 2.0
ANONYMOUS_TARGET_BYTES = 400e6  # and the caches
PEAK_TARGET_BYTES = {"int4": 2.2e9, "qat-mobile": 1.9e9}
QUESTION = "Hello, who are you?"
LONG_QUESTION = f"{QUESTION} " + "Tell me about the greenhouse, the tank and the pump. " * 5
_STATS = re.compile(r"decode (\d+) steps.*?, ([\d.]+) tok/s; time to first token ([\d.]+) s")
_LOADED = re.compile(r"loaded in ([\d.]+) s; memory (\d+) MiB resident, (\d+) anonymous, (\d+) file-backed")


@dataclass(frozen=True)
class Start:
    """One `gemma-edge ask`."""

    first_token_s: float  # since the process was created
    load_s: float
    decode_tok_s: float
    anonymous_bytes: int  # at the end
    file_bytes: int
    peak_rss_bytes: int


def ask(
    bundle: Path, new_tokens: int, threads: int | None, options: list[str], question: str = QUESTION
) -> Start:
    command = [sys.executable, "-m", "gemma_edge.cli", "ask", str(bundle), question, "--stats"]
    command += ["--speculate", "off", "--max-tokens", str(new_tokens), *options]
    command += ["--threads", str(threads)] if threads else []
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        said = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
    stats, loaded = _STATS.search(said), _LOADED.search(said)
    if child.returncode or stats is None or loaded is None:
        raise SystemExit(f"{' '.join(command)}: status {child.returncode}\n{said}")
    steps, decode_tok_s = int(stats[1]), float(stats[2])
    decode_s = steps / decode_tok_s if decode_tok_s else 0.0
    return Start(
        wall_s - decode_s,  # the exit is in it
        float(loaded[1]),
        decode_tok_s,
        int(loaded[3]) * 2**20,
        int(loaded[4]) * 2**20,
        usage.ru_maxrss * 1024,
    )


def drop_pages(folders: list[Path]) -> float:
    """Ask the system to forget the files' pages; the share that stayed."""
    kept = total = 0
    for path in (file for folder in folders for file in folder.iterdir() if file.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            pages, resident = resident_pages(descriptor)
        finally:
            os.close(descriptor)
        kept, total = kept + resident, total + pages
    return kept / max(total, 1)


def resident_pages(descriptor: int) -> tuple[int, int]:
    """(pages, of them in memory) of a file."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0, 0
    pages = -(-size // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags)
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return pages, sum(flag & 1 for flag in flags)


def row(name: str, starts: list[Start]) -> dict[str, Any]:
    """Medians, and the best start, which other work disturbed least; printed and returned."""
    figures = {field: median([getattr(start, field) for start in starts]) for field in asdict(starts[0])} | {
        "best_first_token_s": min(start.first_token_s for start in starts)
    }
    print(
        f"| {name} | {figures['first_token_s']:.2f} ({figures['best_first_token_s']:.2f}) "
        f"| {figures['load_s']:.2f} "
        f"| {figures['decode_tok_s']:.1f} | {figures['anonymous_bytes'] / 1e6:.0f} "
        f"| {figures['file_bytes'] / 1e6:.0f} | {figures['peak_rss_bytes'] / 1e9:.2f} |",
        flush=True,
    )
    return {"start": name} | {key: round(value, 3) for key, value in figures.items()}


def measure(forms: dict[str, tuple[Bundle, Path]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every way to start, in turns. forms: by what their rows are called besides."""
    ways: dict[str, tuple[Bundle, list[str], str]] = {}
    questions = {"": QUESTION} | ({", long question": LONG_QUESTION} if args.long else {})
    for form, (bundle, prepared) in forms.items():
        for asked, question in questions.items():
            ways[f"plain{form}{asked}"] = bundle, ["--prepare", "off"], question
            for residency in args.residency:
                options = ["--prepared", str(prepared), "--residency", residency]
                ways[f"packed, {residency}{form}{asked}"] = bundle, options, question
    print(
        "| start | first token, s (best) | of it loading | decode tok/s | anonymous MB | mapped MB | peak GB|"
    )
    print("|---|---|---|---|---|---|---|")
    runs: dict[str, list[Start]] = {name: [] for name in ways}
    for turn in range(args.repeats + 1):
        for name, (bundle, options, question) in ways.items():
            start = ask(bundle.path, args.new_tokens, args.threads, options, question)
            if turn:  # the first one warms the page cache
                runs[name].append(start)
    rows = [row(name, starts) for name, starts in runs.items()]
    if args.cold:
        folders = [folder for bundle, prepared in forms.values() for folder in (bundle.path, prepared)]
        for name, (bundle, options, question) in ways.items():
            stayed = drop_pages(folders)
            cold = ask(bundle.path, args.new_tokens, args.threads, options, question)
            result = row(f"{name}, cold", [cold])
            rows.append(result | {"pages_that_stayed": round(stayed, 4)})
            print(f"  {stayed:.1%} of the pages had stayed in memory")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--prepared", type=Path, metavar="DIR")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--whole", action="store_true", help="the decoder in one graph too, for comparison")
    parser.add_argument("--long", action="store_true", help="a question of five sentences too")
    parser.add_argument("--residency", nargs="*", default=["map"], choices=["map", "prefault", "lock"])
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    manifest = bundle.manifest
    with tempfile.TemporaryDirectory(dir=args.bundle.parent, prefix="prepared-") as folder:
        prepared = args.prepared or Path(folder) / "prepared"
        pack_s = None
        if misfit(bundle, prepared) is not None:
            begin = time.perf_counter()
            size_bytes = make(bundle, prepared)
            pack_s = round(time.perf_counter() - begin, 1)
            print(f"packed: {size_bytes / 1e9:.2f} GB in {pack_s} s")
        forms = {"": (bundle, prepared)}
        if args.whole:
            if not manifest.decoder_parts:
                raise SystemExit(f"{args.bundle}: --whole: its decoder is in one graph as it is")
            whole, packed = with_whole_decoder(bundle, Path(folder) / "whole"), Path(folder) / "packed"
            make(whole, packed)
            forms[", whole"] = whole, packed
        rows = measure(forms, args)
    kv_bytes = manifest.caches.size_bytes
    peak = PEAK_TARGET_BYTES.get(manifest.recipe)
    print(
        f"{bundle.name}, {manifest.recipe}: targets, packed: first token {FIRST_TOKEN_TARGET_S} s, "
        f"anonymous {ANONYMOUS_TARGET_BYTES / 1e6:.0f} MB and caches ({kv_bytes / 1e6:.0f} MB)"
        + (f", peak {peak / 1e9} GB" if peak else "")
    )
    print_json(
        {
            "bench": "start",
            "bundle": bundle.name,
            "recipe": manifest.recipe,
            "kv_bytes": kv_bytes,
            "pack_s": pack_s,
            "rows": rows,
            "targets": {
                "first_token_s": FIRST_TOKEN_TARGET_S,
                "anonymous_bytes": ANONYMOUS_TARGET_BYTES + kv_bytes,
                "peak_rss_bytes": peak,
            },
            "machine": about,
        }
    )


if __name__ == "__main__":
    main()
