"""This project and its peers on one machine: decode and prefill of models of one shape, in turns.

    python bench/peers.py BUNDLE --work DIR [--model e2b] [--threads 2] [--rounds 3]
                          [--no-amx] [--litert-model FILE.litertlm]

BUNDLE is ours: any weights will do, speed does not depend on them, e.g.

    python -m gemma_edge.export.synthetic --model e2b DIR/checkpoint
    gemma-edge export --model DIR/checkpoint --device x86-64-generic --recipe int4 --context 4096 --out
    DIR/e2b-int4

DIR takes what the peers need, 5 GB for E2B, and is used again by the next run:
- llama.cpp, built from llama-cpp-python's source archive (cmake, ninja and a C++ compiler), native. On
  processors with AMX the build has a barrier without which it crashes; --no-amx builds without these
  units, as on boards. Its model has the same shape, random weights, everything Q4_0.
- LiteRT-LM, from PyPI, in an environment of its own, if a model for it is given.

In each round every program runs once, one after the other, with the same number of threads: a prompt of 128
and one of 1,024 tokens, then 64 tokens after no context and after 1,024. Before each round the read bandwidth
of as many threads is measured. Printed are medians and ratios, ours to the best peer's, and how much of the
bandwidth our decode steps use. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peer_litert
import peer_llama
from common import machine, median, print_json, print_machine, read_bandwidth_bytes_per_s

from gemma_edge.export.sizes import model_of
from gemma_edge.runtime.bundle import open_bundle

OURS, LLAMA, LITERT = "gemma-edge", "llama.cpp", "LiteRT-LM"
PROMPTS, DEPTHS, NEW = [128, 1024], [0, 1024], 64
# decode: of llama.cpp with everything Q4_0, and of LiteRT-LM's 2- and 4-bit mix; share: of the bandwidth.
TARGETS = {
    "int4": {"decode": (1.0, LLAMA), "share": 0.75},
    "qat-mobile": {"decode": (1.5, LITERT), "share": None},
}
# What LiteRT-LM's mix did, where no model for it is at hand: E2B, two threads (docs/performance.md).
LITERT_MIX = {"prefill": {1024: 276.0}, "decode": {1024: 10.7}}

Figures = dict[str, dict[int, float]]  # kind -> tokens -> tokens a second


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "bundles", type=Path, nargs="+", metavar="BUNDLE", help="ours; several take turns too"
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="e2b", help="e2b, e4b or a config.json: the shape")
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-amx", action="store_true")
    parser.add_argument("--litert-model", type=Path)
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    runners = prepare(args)
    rounds: dict[str, list[Figures]] = {name: [] for name in runners}
    bandwidths = []
    for number in range(args.rounds):
        bandwidths.append(read_bandwidth_bytes_per_s(args.threads))
        for name, run in runners.items():
            rounds[name].append(run())
            print(f"round {number + 1}, {name}: {_line(rounds[name][-1])}", flush=True)
    medians = {name: _medians(found) for name, found in rounds.items()}
    result = compare(medians, {path.name: path for path in args.bundles}, median(bandwidths))
    report(medians, result, bandwidths, args)
    print_json(
        {"bench": "peers", "threads": args.threads, "amx": not args.no_amx, **result, "machine": about}
        | {"bandwidths": [round(value) for value in bandwidths], "rounds": rounds}
    )
    return 0


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """By name, what runs one round of it."""
    args.work.mkdir(parents=True, exist_ok=True)
    shape = model_of(args.model)
    runners: dict[str, Any] = {}
    for path in args.bundles:
        geometry = open_bundle(path).manifest.geometry
        if geometry != shape.geometry:
            raise SystemExit(
                f"{path} does not have the shape of {args.model}; export one or name it with --model"
            )
        runners[path.name] = lambda path=path: run_ours(path, args.threads)
    program = peer_llama.build(args.work, amx=not args.no_amx)
    model = args.work / f"{Path(args.model).stem}-q4_0.gguf"
    peer_llama.write_model(model, shape, peer_llama.fetch(args.work))
    runners[LLAMA] = lambda: peer_llama.run(
        program, model, threads=args.threads, prompts=PROMPTS, new=NEW, depths=DEPTHS
    )
    if args.litert_model is None:
        print(
            f"{LITERT} is left out: no --litert-model. Making one for E2B takes 22.7 GiB of memory "
            "(docs/performance.md); its 2- and 4-bit mix did 10.7 tok/s there."
        )
    else:
        python = peer_litert.install(args.work)
        runners[LITERT] = lambda: peer_litert.run(
            python, args.litert_model, threads=args.threads, prompt=PROMPTS[-1], new=NEW
        )
    return runners


def run_ours(bundle: Path, threads: int) -> Figures:
    """bench/decode.py in a process of its own; a prompt of one token stands for no context."""
    script = Path(__file__).with_name("decode.py")
    prompts = [str(tokens) for tokens in (1, *PROMPTS)]
    out = subprocess.run(
        [
            *[sys.executable, str(script), str(bundle), "--no-tables", "--threads", str(threads)],
            *["--new-tokens", str(NEW), "--repeats", "1", "--prompt-tokens", *prompts],
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    rows = {row["prompt_tokens"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    return {
        "prefill": {tokens: rows[tokens]["prefill_tok_s"] for tokens in PROMPTS},
        "decode": {depth: rows[max(depth, 1)]["decode_tok_s"] for depth in DEPTHS},
    }


def compare(medians: dict[str, Figures], bundles: dict[str, Path], bandwidth: float) -> dict[str, Any]:
    """Ratios to the best peer that was measured, for the first bundle; shares and targets for each."""
    peers = [name for name in medians if name not in bundles]
    first = next(iter(bundles))
    ratios = {
        kind: {
            tokens: medians[first][kind][tokens] / max(medians[peer][kind].get(tokens, 0.0) for peer in peers)
            for tokens in medians[first][kind]
        }
        for kind in ("decode", "prefill")
    }
    shares = {}
    for name, path in bundles.items():
        manifest = open_bundle(path).manifest
        caches = {depth: _cache_bytes(manifest.caches, depth) for depth in DEPTHS}
        shares[name] = {
            depth: (manifest.memory.read_per_token_bytes + caches[depth]) * speed / bandwidth
            for depth, speed in medians[name]["decode"].items()
        }
    return {
        "decode_ratio": round(min(ratios["decode"].values()), 3),
        "prefill_ratio": round(ratios["prefill"][PROMPTS[-1]], 3),
        "ratios": {
            kind: {tokens: round(value, 3) for tokens, value in row.items()} for kind, row in ratios.items()
        },
        "medians": medians,
        "share_of_bandwidth": {
            name: {depth: round(value, 3) for depth, value in row.items()} for name, row in shares.items()
        },
        "recipes": {name: open_bundle(path).manifest.recipe for name, path in bundles.items()},
    }


def report(
    medians: dict[str, Figures], result: dict[str, Any], bandwidths: list[float], args: argparse.Namespace
) -> None:
    low, high = min(bandwidths) / 1e9, max(bandwidths) / 1e9
    print(
        f"\n{args.threads} threads, medians of {args.rounds} rounds; "
        f"memory reads {low:.1f} to {high:.1f} GB/s"
    )
    columns = [("prefill", tokens) for tokens in PROMPTS] + [("decode", depth) for depth in DEPTHS]
    heads = [f"prefill {tokens}" for tokens in PROMPTS] + [f"decode at {depth}" for depth in DEPTHS]
    print(f"{'tok/s':24}" + "".join(f"{head:>16}" for head in heads))
    for name, found in medians.items():
        values = [found[kind].get(tokens) for kind, tokens in columns]
        print(f"{name:24}" + "".join(f"{'-' if value is None else f'{value:.1f}':>16}" for value in values))
    print(f"decode {result['decode_ratio']} and prefill {result['prefill_ratio']} times the best peer's")
    for name, recipe in result["recipes"].items():
        share = ", ".join(
            f"{value:.0%} at {depth}" for depth, value in result["share_of_bandwidth"][name].items()
        )
        print(f"{name} ({recipe}): {share} of the bandwidth")
        for depth, met in targets(recipe, medians, name, result):
            print(f"  target at {depth}: {met}")


def targets(
    recipe: str, medians: dict[str, Figures], name: str, result: dict[str, Any]
) -> list[tuple[int, str]]:
    """Each target of a recipe, and what was reached."""
    if recipe not in TARGETS:
        return []
    least, peer = TARGETS[recipe]["decode"]
    theirs = medians.get(peer, LITERT_MIX if peer == LITERT else {"decode": {}})["decode"]
    rows = []
    for depth, speed in medians[name]["decode"].items():
        against = theirs.get(depth, theirs.get(DEPTHS[-1]))
        if against is None:
            continue
        ratio = speed / against
        source = peer if peer in medians else f"{peer}'s recorded {against}"
        rows.append(
            (depth, f"decode >= {least} x {source}: {ratio:.2f}, {'met' if ratio >= least else 'missed'}")
        )
        if wanted := TARGETS[recipe]["share"]:
            share = result["share_of_bandwidth"][name][depth]
            verdict = "met" if share >= wanted else "missed"
            rows.append((depth, f"{wanted:.0%} of the bandwidth: {share:.0%}, {verdict}"))
    return rows


def _cache_bytes(caches: Any, depth: int) -> int:
    """Rows in use of all caches, once."""
    size = {"float32": 4, "float16": 2, "int8": 1}[caches.dtype]
    return sum(
        2 * layer.kv_heads * layer.head_dim * size * min(depth + NEW // 2, layer.capacity)
        for layer in caches.layers
    )


def _medians(rounds: list[Figures]) -> Figures:
    return {
        kind: {tokens: round(median([found[kind][tokens] for found in rounds]), 2) for tokens in row}
        for kind, row in rounds[0].items()
    }


def _line(found: Figures) -> str:
    return "; ".join(
        f"{kind} " + ", ".join(f"{value:.1f} at {tokens}" for tokens, value in row.items())
        for kind, row in found.items()
    )


if __name__ == "__main__":
    raise SystemExit(main())
