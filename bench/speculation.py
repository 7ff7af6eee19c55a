"""What guessed tokens gain: speed and tokens a pass with and without, in turns, on sensor summaries.

python bench/speculation.py BUNDLE [--speculate 8] [--prompts 20] [--repeats 3] [--threads N]
    [--wrong] [--replay BUNDLE]

BUNDLE is the nano model's. Each window is summarised without and with guesses, in turns; answers are
compared. --wrong makes every guess a wrong one: what guessing costs at worst, in answers full of matches.
--replay has another bundle, of any model with as large a vocabulary, say what nano says: time at full size.
Figures are medians over repeats of sums over all prompts.
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, median, print_json, print_machine

from gemma_edge.examples.nano_model.windows import random_window
from gemma_edge.examples.sensor_summary.prompt import summary_messages
from gemma_edge.runtime import engine as runtime_engine
from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.drafts import Lookup
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.stats import GenerationStats
from gemma_edge.runtime.tokenizer import load_tokenizer

SEED = 77_500_000


def prompts_of(bundle: Bundle, count: int) -> list[list[int]]:
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)
    windows = [random_window(random.Random(SEED + number), held_out=True) for number in range(count)]
    return [template.encode(tokenizer, summary_messages(window)) for window in windows]


class Saying:
    """In place of a sampler: picks what was answered to this prompt before, whatever the model says."""

    def __init__(self, said: dict[tuple[int, ...], list[int]], stop: int, *sampler: Any) -> None:
        self._tokens = iter([*said[tuple(sampler[1])], stop])

    def pick(self, logits: np.ndarray) -> int:
        logits.argmax()  # takes the time of a greedy pick
        return next(self._tokens)

    def pick_from(self, session: Any) -> int:
        return self.pick(session.logits)


def answer(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[list[int], GenerationStats]:
    tokens = list(engine.generate(prompt, params, max_new_tokens=300))
    assert engine.last_stats is not None
    return tokens, engine.last_stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--replay", type=Path, metavar="BUNDLE")
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    plain = Engine(bundle, threads=args.threads)
    guessing = Engine(bundle, threads=args.threads, speculate=args.speculate)
    if guessing._drafts is None:
        raise SystemExit(f"{args.bundle}: its sliding caches have no slack; export it for another device")
    params = SamplingParams()
    if args.wrong:
        right = Lookup.after
        Lookup.after = lambda *found: [token ^ 1 for token in right(*found)]  # type: ignore[method-assign]
    prompts = prompts_of(bundle, args.prompts)
    if args.replay is not None:
        said = {tuple(prompt): answer(plain, prompt, params)[0] for prompt in prompts}
        bundle, stops = open_bundle(args.replay), plain.eos
        plain = Engine(bundle, threads=args.threads)
        guessing = Engine(bundle, threads=args.threads, speculate=args.speculate)
        plain.eos = guessing.eos = stops
        runtime_engine.Sampler = partial(Saying, said, min(stops))  # type: ignore[assignment,misc]
    answer(plain, prompts[0], params)  # warms up; the guessing engine has to learn its pace as in use
    rows: list[dict[str, float]] = []
    for _ in range(args.repeats):
        names = "tokens passes drafted accepted guessing_s plain_tokens plain_s same"
        row = dict.fromkeys(names.split(), 0.0)
        for number, prompt in enumerate(prompts):
            order = (plain, guessing) if number % 2 else (guessing, plain)
            done = {engine: answer(engine, prompt, params) for engine in order}
            (tokens, stats), (plain_tokens, plain_stats) = done[guessing], done[plain]
            row["tokens"] += stats.decode_steps + stats.accepted
            row["passes"] += stats.decode_steps
            row["drafted"] += stats.drafted
            row["accepted"] += stats.accepted
            row["guessing_s"] += stats.decode_s
            row["plain_tokens"] += plain_stats.decode_steps
            row["plain_s"] += plain_stats.decode_s
            row["same"] += tokens == plain_tokens
        rows.append(row)
        row["tok_s"] = row["tokens"] / row["guessing_s"]
        row["plain_tok_s"] = row["plain_tokens"] / row["plain_s"]
        print(
            f"{row['tokens']:.0f} tokens in {row['passes']:.0f} passes, {row['accepted']:.0f} of "
            f"{row['drafted']:.0f} right; {row['tok_s']:.0f} tok/s, {row['plain_tok_s']:.0f} without "
            f"them; {row['same']:.0f} of {len(prompts)} answers the same"
        )
    result = {
        "bench": "speculation",
        "bundle": bundle.name,
        "recipe": bundle.manifest.recipe,
        "threads": guessing._session.threads,
        "longest_draft": guessing._drafts.pace.longest,
        "all_wrong": args.wrong,
        "tokens_per_pass": round(median([row["tokens"] / row["passes"] for row in rows]), 3),
        "accepted_share": round(median([row["accepted"] / max(row["drafted"], 1) for row in rows]), 3),
        "plain_tok_s": round(median([row["plain_tok_s"] for row in rows]), 1),
        "guessing_tok_s": round(median([row["tok_s"] for row in rows]), 1),
        "ratio": round(median([row["tok_s"] / row["plain_tok_s"] for row in rows]), 3),
        "pass_ms_by_rows": [round(spent * 1e3, 3) for spent in guessing._drafts.pace._seconds[1:]],
        "same_answers": min(row["same"] for row in rows) / len(prompts),
        "machine": about,
    }
    print(
        f"{result['tokens_per_pass']} tokens a pass; {result['plain_tok_s']} tok/s without, "
        f"{result['guessing_tok_s']} with: {result['ratio']} times"
    )
    print_json(result)


if __name__ == "__main__":
    main()
