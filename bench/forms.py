"""One bundle in its forms: how long each takes to load and to begin, and its steps, in turns in one process.

    python bench/forms.py BUNDLE [--forms "parts" "whole, packed" …] [--opens 3] [--depths 16 1024]

    parts, whole             the decoder in parts, and in one graph, from the bundle's own weights
    parts, packed; whole, …  the same from packed weights, which are made first, beside the bundle
    … no prefill             the prefill graph left closed, as `ask` leaves it for a short question

Loading is of the model's sessions alone (bench/start.py times whole commands), each in a process of its own,
the forms in turns: the seconds it took, and processor time since the process began; the first prompt after
it, and a later one; the process's peak memory. Then all forms are open in one process, huge pages in place,
and take four steps each, in turns. The first of them is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import ERROR_CHARACTERS, machine, median, print_json, print_machine, with_whole_decoder

from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.prepared import make
from gemma_edge.runtime.session import Session

PARTS, WHOLE = "parts", "whole"
PACKED, NO_PREFILL = ", packed", ", no prefill"
FORMS = [
    f"{graphs}{weights}{prompts}"
    for graphs in (PARTS, WHOLE)
    for weights in ("", PACKED)
    for prompts in ("", NO_PREFILL)
]
STEPS = 4  # of a form, one after the other; one more goes before them


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--forms", nargs="+", choices=FORMS, metavar="FORM", help=f"of {FORMS}")
    parser.add_argument("--opens", type=int, default=3, help="times that each is loaded; 0: not at all")
    parser.add_argument("--prompt", type=int, default=28, help="tokens of the first prompt")
    parser.add_argument("--rounds", type=int, default=24, help=f"of {STEPS} steps a form; 0: none")
    parser.add_argument("--depths", type=int, nargs="+", default=[16, 1024])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--open", nargs=2, metavar=("DIR", "FORM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        print_json(opened(form_of(open_bundle(args.bundle), Path(args.open[0]), args.open[1]), args))
        return

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    forms = args.forms or possible(bundle)
    if missing := [form for form in forms if form not in possible(bundle)]:
        raise SystemExit(f"{args.bundle}: has no {missing}; it has {possible(bundle)}")
    with tempfile.TemporaryDirectory(dir=args.bundle.parent, prefix="forms-") as name:
        folder = Path(name)
        whole = with_whole_decoder(bundle, folder / WHOLE)
        for graphs, one in ((PARTS, bundle), (WHOLE, whole)):
            if any(form.startswith(f"{graphs}{PACKED}") for form in forms):
                make(one, folder / f"{graphs}-packed")
        loads = load_in_turns(args, folder, forms) if args.opens else []
        steps = step_in_turns(bundle, folder, forms, args) if args.rounds else []
    print_json(
        {
            "bench": "forms",
            "bundle": bundle.name,
            "recipe": bundle.manifest.recipe,
            "loads": loads,
            "steps": steps,
            "machine": about,
        }
    )


def possible(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    return [
        form
        for form in FORMS
        if (manifest.decoder_parts or not form.startswith(PARTS))
        and (manifest.prefill is not None or not form.endswith(NO_PREFILL))
    ]


def form_of(bundle: Bundle, folder: Path, form: str) -> Bundle:
    """folder: where packed weights are, and the bundle on one graph."""
    graphs = PARTS if form.startswith(PARTS) else WHOLE
    one = bundle if graphs == PARTS else open_bundle(folder / WHOLE)
    if PACKED in form:
        one = replace(one, prepared=folder / f"{graphs}-packed")
    return one.without_prefill() if form.endswith(NO_PREFILL) else one


def opened(bundle: Bundle, args: argparse.Namespace) -> dict[str, float]:
    """This process's first session and its prompts."""
    begin = time.perf_counter()
    session = Session(bundle, threads=args.threads)
    load_s, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    ids = np.random.default_rng(1).integers(3, bundle.manifest.geometry.vocab_size, args.prompt)
    prompts = []
    for _ in range(4):
        begin = time.perf_counter()
        session.prefill(ids, 0, last=True)
        prompts.append(time.perf_counter() - begin)
        session.step(5, args.prompt)
    return {
        "load_s": load_s,
        "load_cpu_s": used.ru_utime + used.ru_stime,
        "first_prompt_s": prompts[0],
        "later_prompt_s": median(prompts[1:]),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def load_in_turns(args: argparse.Namespace, folder: Path, forms: list[str]) -> list[dict[str, Any]]:
    options = ["--prompt", str(args.prompt), *(["--threads", str(args.threads)] if args.threads else [])]
    runs: dict[str, list[dict[str, float]]] = {form: [] for form in forms}
    for turn in range(args.opens + 1):
        for form in forms:
            command = [sys.executable, __file__, str(args.bundle), "--open", str(folder), form, *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{form}: status {done.returncode}\n{done.stderr[-ERROR_CHARACTERS:]}")
            if turn:  # the first one warms the page cache
                runs[form].append(json.loads(done.stdout.splitlines()[-1]))
    print(
        f"\n| {args.prompt} tokens | loads in, s (best) | processor s | first prompt, s | later, s "
        "| both, s (best) | peak GB |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for form, given in runs.items():
        figures = {name: median([run[name] for run in given]) for name in given[0]}
        both = [run["load_s"] + run["first_prompt_s"] for run in given]
        figures |= {
            "best_load_s": min(run["load_s"] for run in given),
            "both_s": median(both),
            "best_both_s": min(both),
        }
        print(
            f"| {form} | {figures['load_s']:.2f} ({figures['best_load_s']:.2f}) "
            f"| {figures['load_cpu_s']:.2f} | {figures['first_prompt_s']:.2f} "
            f"| {figures['later_prompt_s']:.2f} | {figures['both_s']:.2f} ({figures['best_both_s']:.2f}) "
            f"| {figures['peak_rss_bytes'] / 1e9:.2f} |",
            flush=True,
        )
        rows.append({"form": form} | {name: round(value, 3) for name, value in figures.items()})
    return rows


def step_in_turns(
    bundle: Bundle, folder: Path, forms: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Forms that differ in their prompts alone take the same steps: only one of them is open."""
    names = list(dict.fromkeys(form.removesuffix(NO_PREFILL) for form in forms))
    sessions = {name: Session(form_of(bundle, folder, name), threads=args.threads) for name in names}
    for session in sessions.values():
        if session.moving is not None:
            session.moving.join()
    rows = []
    print("\n| a step, ms | depth | median | to the first | quickest fifth | to the first |")
    print("|---|---|---|---|---|---|")
    for depth in args.depths:
        ids = np.random.default_rng(depth).integers(3, bundle.manifest.geometry.vocab_size, depth)
        for session in sessions.values():
            for first in range(0, depth, session.chunk):
                chunk = ids[first : first + session.chunk]
                session.prefill(chunk, first, last=first + len(chunk) == depth)
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(args.rounds + 1):
            for name in names if turn % 2 else reversed(names):
                begun = [time.perf_counter()]
                for step in range(1 + STEPS):
                    sessions[name].step(5 + step, depth + step)
                    begun.append(time.perf_counter())
                if turn:
                    times[name] += np.diff(begun)[1:].tolist()
        medians = {name: median(values) for name, values in times.items()}
        fifths = {name: float(np.quantile(values, 0.2)) for name, values in times.items()}
        for name in names:
            ratios = medians[name] / medians[names[0]], fifths[name] / fifths[names[0]]
            print(
                f"| {name} | {depth} | {medians[name] * 1e3:.1f} | {ratios[0]:.3f} "
                f"| {fifths[name] * 1e3:.1f} | {ratios[1]:.3f} |",
                flush=True,
            )
            rows.append(
                {
                    "form": name,
                    "depth": depth,
                    "step_ms": round(medians[name] * 1e3, 2),
                    "ratio": round(ratios[0], 4),
                    "quickest_fifth_ms": round(fifths[name] * 1e3, 2),
                    "quickest_fifth_ratio": round(ratios[1], 4),
                }
            )
    return rows


if __name__ == "__main__":
    main()
