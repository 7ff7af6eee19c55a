"""This project and its peers on one machine: decode and prefill of models of one shape, in turns.

    python bench/peers.py BUNDLE [BUNDLE ...] --work DIR [--model e2b] [--threads 2] [--rounds 3] [--no-amx]

Bundles are ours: any weights will do, speed does not depend on them, e.g.

    python -m gemma_edge.export.synthetic --model e2b DIR/checkpoint
    gemma-edge export --model DIR/checkpoint --device x86-64-generic --recipe int4 --context 4096 --out
    DIR/e2b-int4

DIR takes what the peers need, for E2B 3 GB and with LiteRT-LM 16, and is used again by the next run:
- llama.cpp, built from llama-cpp-python's source archive (cmake, ninja and a C++ compiler), native. On
  processors with AMX the build has a barrier without which it crashes; --no-amx builds without these
  units, as on boards. Its model has the same shape, random weights, everything Q4_0.
- LiteRT-LM, from PyPI, in an environment of its own, with the models of it that are there. Before, once:
  `python bench/peer_litert.py DIR/checkpoint --work DIR`; without, it is left out, which is said.

Ours run twice: with the bundle's own weights, and ("packed") with the weights packed for this processor in a
file beside it, as `gemma-edge prepare` does once (here in DIR) and LiteRT-LM by itself.

In each round every program runs once, one after the other, with the same number of threads: a prompt of 128
and one of 1,024 tokens, then 64 tokens after no context and after 1,024. Before each round the read bandwidth
of as many threads is measured. Printed are medians and ratios, ours to each peer's, and how much of the
bandwidth our decode steps use. The last line is JSON; its decode_ratio and prefill_ratio are the first
bundle's to the best peer's.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import peer_litert
import peer_llama
from common import (
    machine,
    measured_process,
    median,
    print_json,
    print_machine,
    read_bandwidth_bytes_per_s,
)

from gemma_edge.export.sizes import model_of
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.prepared import make, misfit

LLAMA = "llama.cpp"
PACKED = ", packed"  # after a bundle's name
PROMPTS, DEPTHS, NEW = [128, 1024], [0, 1024], 64

Figures = dict[str, Any]  # "prefill", "decode": tokens -> tokens a second; "peak_bytes": one number


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
    bundles = {f"{path.name}{form}": path for path in args.bundles for form in ("", PACKED)}
    result = compare(medians, bundles, median(bandwidths))
    report(medians, result, bandwidths, args)
    print_json(
        {"bench": "peers", "threads": args.threads, "amx": not args.no_amx, **result, "machine": about}
        | {"bandwidths": [round(value) for value in bandwidths], "rounds": rounds}
        | {"peer_versions": {LLAMA: peer_llama.SOURCE, "LiteRT-LM": peer_litert.VERSION}}
    )
    return 0


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """By name, what runs one round of it."""
    args.work.mkdir(parents=True, exist_ok=True)
    shape = model_of(args.model)
    runners: dict[str, Any] = {}
    for path in args.bundles:
        bundle = open_bundle(path)
        if bundle.manifest.geometry != shape.geometry:
            raise SystemExit(
                f"{path} does not have the shape of {args.model}; export one or name it with --model"
            )
        if path.name in runners:
            raise SystemExit(f"{path}: there is a bundle of that name already; results go by name")
        packed = args.work / f"{path.name}-packed"
        if misfit(bundle, packed) is not None:
            print(f"packing the weights of {path} into {packed}")
            make(bundle, packed)
        runners[path.name] = partial(run_ours, path, args.threads)
        runners[f"{path.name}{PACKED}"] = partial(run_ours, path, args.threads, packed)
    program = peer_llama.build(args.work, amx=not args.no_amx)
    model = args.work / f"{Path(args.model).stem}-q4_0.gguf"
    peer_llama.write_model(model, shape, peer_llama.fetch(args.work))
    runners[LLAMA] = lambda: peer_llama.run(
        program, model, threads=args.threads, prompts=PROMPTS, new=NEW, depths=DEPTHS
    )
    for mix, name in peer_litert.MIXES.items():
        file = args.work / f"{mix}.litertlm"
        if not file.is_file():
            print(
                f"{name} is left out: no {file}. python bench/peer_litert.py CHECKPOINT "
                f"--work {args.work} makes it, of a checkpoint of this shape"
            )
            continue
        python = peer_litert.install(args.work, peer_litert.RUNTIME, "litert_lm")
        runners[name] = lambda python=python, file=file: peer_litert.run(
            python, file, threads=args.threads, prompts=PROMPTS, depths=DEPTHS, new=NEW
        )
    return runners


def run_ours(bundle: Path, threads: int, packed: Path | None = None) -> Figures:
    """bench/decode.py in a process of its own; a prompt of one token stands for no context."""
    script = Path(__file__).with_name("decode.py")
    prompts = [str(tokens) for tokens in (1, *PROMPTS)]
    command = [sys.executable, str(script), str(bundle), "--no-tables", "--threads", str(threads)]
    # Its own measurement of the bandwidth would be in the peak of memory; the share is worked out here.
    command += ["--prepared", str(packed)] if packed else []
    command += ["--bandwidth", "1", "--new-tokens", str(NEW), "--repeats", "1", "--prompt-tokens", *prompts]
    out, peak_bytes = measured_process(command)
    rows = {row["prompt_tokens"]: row for row in json.loads(out.splitlines()[-1])["rows"]}
    return {
        "prefill": {tokens: rows[tokens]["prefill_tok_s"] for tokens in PROMPTS},
        "decode": {depth: rows[max(depth, 1)]["decode_tok_s"] for depth in DEPTHS},
        "peak_bytes": peak_bytes,
    }


def compare(medians: dict[str, Figures], bundles: dict[str, Path], bandwidth: float) -> dict[str, Any]:
    """Ratios of each bundle to each peer; the first one's to the best peer; shares of the bandwidth."""
    against = {name: ratios(medians, name, bundles) for name in bundles}
    manifests = {name: open_bundle(path).manifest for name, path in bundles.items()}
    best = {
        kind: [min(peer[kind][tokens] for peer in against[next(iter(bundles))].values()) for tokens in listed]
        for kind, listed in (("decode", DEPTHS), ("prefill", PROMPTS[-1:]))
    }
    shares = {
        name: {
            depth: round(
                (manifest.memory.read_per_token_bytes + _cache_bytes(manifest.caches, depth))
                * medians[name]["decode"][depth]
                / bandwidth,
                3,
            )
            for depth in DEPTHS
        }
        for name, manifest in manifests.items()
    }
    return {
        "decode_ratio": min(best["decode"]),
        "prefill_ratio": best["prefill"][0],
        "against": against,
        "medians": medians,
        "share_of_bandwidth": shares,
        "recipes": {name: manifest.recipe for name, manifest in manifests.items()},
    }


def ratios(medians: dict[str, Figures], ours: str, bundles: dict[str, Path]) -> dict[str, Figures]:
    """Peer -> "decode", "prefill": tokens -> ours to theirs; "peak_bytes": ours to theirs."""
    return {
        peer: {
            kind: {
                tokens: round(speed / theirs[kind][tokens], 3)
                for tokens, speed in medians[ours][kind].items()
            }
            for kind in ("decode", "prefill")
        }
        | {"peak_bytes": round(medians[ours]["peak_bytes"] / theirs["peak_bytes"], 3)}
        for peer, theirs in medians.items()
        if peer not in bundles
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
    print(f"| tok/s | {' | '.join(heads)} | peak GB |\n|---|{'---|' * (len(heads) + 1)}")
    for name, found in medians.items():
        values = [f"{found[kind][tokens]:.1f}" for kind, tokens in columns]
        print(f"| {name} | {' | '.join(values)} | {found['peak_bytes'] / 1e9:.2f} |")
    for name, peers in result["against"].items():
        for peer, found in peers.items():
            values = [f"{found[kind][tokens]:.2f}" for kind, tokens in columns]
            print(f"| {name} to {peer} | {' | '.join(values)} | {found['peak_bytes']:.2f} |")
    print(f"decode {result['decode_ratio']} and prefill {result['prefill_ratio']} times the best peer's")
    for name, recipe in result["recipes"].items():
        share = ", ".join(
            f"{value:.0%} at {depth}" for depth, value in result["share_of_bandwidth"][name].items()
        )
        print(f"{name} ({recipe}): {share} of the bandwidth")


def _cache_bytes(caches: Any, depth: int) -> int:
    """Rows in use of all caches, once."""
    size = {"float32": 4, "float16": 2, "int8": 1}[caches.dtype]
    return sum(
        2 * layer.kv_heads * layer.head_dim * size * min(depth + NEW // 2, layer.capacity)
        for layer in caches.layers
    )


def _medians(rounds: list[Figures]) -> Figures:
    return {
        kind: {
            tokens: round(median([found[kind][tokens] for found in rounds]), 2) for tokens in rounds[0][kind]
        }
        for kind in ("prefill", "decode")
    } | {"peak_bytes": round(median([found["peak_bytes"] for found in rounds]))}


def _line(found: Figures) -> str:
    speeds = "; ".join(
        f"{kind} " + ", ".join(f"{value:.1f} at {tokens}" for tokens, value in found[kind].items())
        for kind in ("prefill", "decode")
    )
    return f"{speeds}; peak {found['peak_bytes'] / 1e9:.2f} GB"


if __name__ == "__main__":
    raise SystemExit(main())
