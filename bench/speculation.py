"""What guessed tokens gain: speed and tokens a pass with and without, in turns, on sensor summaries.

python bench/speculation.py BUNDLE [--speculate 8] [--prompts 20] [--repeats 3] [--threads N]
    [--taught 0] [--wrong] [--replay BUNDLE | --steps ROWS:STEPS ...]

BUNDLE is the nano model's. Each window is summarised without and with guesses, in turns; answers are
compared. Every repeat is of other windows and begins with nothing learned from answers, or from those to
--taught windows more. --wrong makes every guess a wrong one: what guessing costs at worst, in answers full of
matches. That is a few hundredths, so two engines answer at the same time, some tokens each in turns, and
change places after every answer. --replay has another bundle, of any model with as large a vocabulary, say
what nano says: time at full size. --steps times nothing: nano's answers are gone through as if a pass of so
many rows took so many steps of one token, those between in proportion, so the figures are the same on every
machine. Figures are medians over repeats of sums over all prompts.

Times as fast = tokens a pass / time of a pass with guesses, in steps of one token.
"""

from __future__ import annotations

import argparse
import random
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, median, print_json, print_machine

from gemma_edge.examples.nano_model.windows import random_window
from gemma_edge.examples.sensor_summary.prompt import summary_messages
from gemma_edge.runtime import engine as runtime_engine
from gemma_edge.runtime.bundle import Bundle, open_bundle
from gemma_edge.runtime.chat import load_template
from gemma_edge.runtime.drafts import Drafts
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.lookup import Memory, Text
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.stats import GenerationStats
from gemma_edge.runtime.tokenizer import load_tokenizer

SEED = 77_500_000
TAUGHT = 77_600_000

TURN = 16  # tokens; a turn is 40 ms of nano
NO_SLACK = "{}: its sliding caches have no slack; export it for another device"

Said = list[tuple[list[int], list[int]]]  # prompts and their answers


def prompts_of(bundle: Bundle, seed: int, count: int) -> list[list[int]]:
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)
    windows = [random_window(random.Random(seed + number), held_out=True) for number in range(count)]
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


def time_wrong(bundle: Bundle, args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """Speed with guesses that are all wrong, beside the speed without."""
    right = Text.guesses
    Text.guesses = lambda text: ((token ^ 1, chance) for token, chance in right(text))  # type: ignore[method-assign]
    pair = [Engine(bundle, threads=args.threads, speculate=args.speculate) for _ in range(2)]
    drafts, params = pair[0]._drafts, SamplingParams()
    if drafts is None:
        raise SystemExit(NO_SLACK.format(args.bundle))
    for engine in pair:
        engine._drafts = None
        answer(engine, prompts[0], params)
    rows: list[dict[str, float]] = []
    for repeat in range(args.repeats):
        row = dict.fromkeys("guessing_tokens plain_tokens guessing_s plain_s drafted accepted".split(), 0.0)
        for number, prompt in enumerate(prompts[repeat * args.prompts :][: args.prompts]):
            guessing, plain = pair if number % 2 else pair[::-1]
            guessing._drafts, plain._drafts = drafts, None
            roles = {"guessing": guessing, "plain": plain}
            going = {
                role: engine.generate(prompt, params, max_new_tokens=300) for role, engine in roles.items()
            }
            for tokens in going.values():
                next(tokens)  # after the prompt
            turn = 0
            while going:
                turn += 1
                for role in sorted(going, reverse=turn % 2 == 0):
                    start = time.perf_counter()
                    said = list(islice(going[role], TURN))
                    row[f"{role}_s"] += time.perf_counter() - start
                    if len(said) < TURN:
                        del going[role]
            for role, engine in roles.items():
                assert engine.last_stats is not None
                row[f"{role}_tokens"] += engine.last_stats.new_tokens - 1
                row["drafted"] += engine.last_stats.drafted
                row["accepted"] += engine.last_stats.accepted  # of wrong ones one may be right by chance
        rows.append(row)
        row["tok_s"] = row["guessing_tokens"] / row["guessing_s"]
        row["plain_tok_s"] = row["plain_tokens"] / row["plain_s"]
        print(
            f"{row['guessing_tokens']:.0f} tokens, {row['accepted']:.0f} of {row['drafted']:.0f} right; "
            f"{row['tok_s']:.1f} tok/s, {row['plain_tok_s']:.1f} without them: "
            f"{row['tok_s'] / row['plain_tok_s']:.3f} times",
            flush=True,
        )
    return {
        "bench": "speculation",
        "bundle": bundle.name,
        "recipe": bundle.manifest.recipe,
        "threads": pair[0]._session.threads,
        "longest_draft": drafts.pace.longest,
        "all_wrong": True,
        "drafted_share": round(median([row["drafted"] / row["guessing_tokens"] for row in rows]), 4),
        "plain_tok_s": round(median([row["plain_tok_s"] for row in rows]), 1),
        "guessing_tok_s": round(median([row["tok_s"] for row in rows]), 1),
        "ratio": round(median([row["tok_s"] / row["plain_tok_s"] for row in rows]), 3),
        "machine": machine(),
    }


def walk(drafts: Drafts, said: Said, eos: frozenset[int], steps: np.ndarray) -> dict[str, float]:
    """As the engine would answer to these prompts, if a pass of r rows took steps[r - 1]."""
    row = dict.fromkeys("tokens passes drafted accepted spent".split(), 0.0)
    for prompt, tokens in said:
        guesser = drafts.begin(prompt, eos)
        at, last = 1, tokens[:1]
        while at < len(tokens):
            guesser.extend(last)
            draft = guesser.guess(drafts.pace.longest) if guesser.may_guess else []
            right = 0
            while right < min(len(draft), len(tokens) - at - 1) and draft[right] == tokens[at + right]:
                right += 1
            guesser.learn(len(draft), right, steps[len(draft)])
            last = tokens[at : at + right + 1]
            at += right + 1
            for name, value in zip(row, (right + 1, 1, len(draft), right, steps[len(draft)]), strict=True):
                row[name] += value
        guesser.extend(last)
        guesser.end()
    return row


def print_walks(args: argparse.Namespace, prompts: list[list[int]], taught: Said, plain: Engine) -> None:
    """What guesses gain with pass times as given."""
    given = {1: 1.0, **{int(rows): float(steps) for rows, steps in (pair.split(":") for pair in args.steps)}}
    steps = np.interp(
        np.arange(1, args.speculate + 2), sorted(given), [given[rows] for rows in sorted(given)]
    )
    said = [(prompt, [*answer(plain, prompt, SamplingParams())[0], min(plain.eos)]) for prompt in prompts]
    rows = []
    for repeat in range(args.repeats):
        drafts = Drafts(args.speculate)
        drafts.memory = memory_of(taught)
        row = walk(drafts, said[repeat * args.prompts :][: args.prompts], plain.eos, steps)
        rows.append(row)
        print(
            f"{row['tokens']:.0f} tokens in {row['passes']:.0f} passes, {row['accepted']:.0f} of "
            f"{row['drafted']:.0f} right; {row['tokens'] / row['spent']:.2f} times"
        )
    print_json(
        {
            "bench": "speculation",
            "steps": [round(value, 3) for value in steps.tolist()],
            "prompts": args.prompts,
            "taught": args.taught,
            "tokens_per_pass": round(median([row["tokens"] / row["passes"] for row in rows]), 3),
            "accepted_share": round(median([row["accepted"] / max(row["drafted"], 1) for row in rows]), 3),
            "pass_steps": round(median([row["spent"] / row["passes"] for row in rows]), 3),
            "ratio": round(median([row["tokens"] / row["spent"] for row in rows]), 3),
        }
    )


def memory_of(answers: Said) -> Memory:
    """What a guesser has learned from these prompts and answers."""
    memory = Memory()
    for prompt, tokens in answers:
        Text(memory, prompt).extend(tokens)
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--taught", type=int, default=0, metavar="WINDOWS")
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--replay", type=Path, metavar="BUNDLE")
    parser.add_argument("--steps", nargs="+", metavar="ROWS:STEPS")
    args = parser.parse_args()

    about = machine()
    print_machine(about)
    bundle = open_bundle(args.bundle)
    prompts = prompts_of(bundle, SEED, args.prompts * args.repeats)
    if args.wrong:
        print_json(time_wrong(bundle, args, prompts))
        return
    plain = Engine(bundle, threads=args.threads)
    guessing = Engine(bundle, threads=args.threads, speculate=args.speculate)
    drafts = guessing._drafts
    if drafts is None:
        raise SystemExit(NO_SLACK.format(args.bundle))
    params = SamplingParams()
    stop = min(plain.eos)
    taught = [
        (prompt, [*answer(plain, prompt, params)[0], stop])
        for prompt in prompts_of(bundle, TAUGHT, args.taught)
    ]
    if args.steps:
        print_walks(args, prompts, taught, plain)
        return
    if args.replay is not None:
        said = {tuple(prompt): answer(plain, prompt, params)[0] for prompt in prompts}
        bundle, stops = open_bundle(args.replay), plain.eos
        plain = Engine(bundle, threads=args.threads)
        guessing = Engine(bundle, threads=args.threads, speculate=args.speculate)
        drafts = guessing._drafts
        assert drafts is not None
        plain.eos = guessing.eos = stops
        runtime_engine.Sampler = partial(Saying, said, stop)  # type: ignore[assignment,misc]
    answer(plain, prompts[0], params)  # warms up; the guessing engine has to learn its pace as in use
    rows: list[dict[str, float]] = []
    for repeat in range(args.repeats):
        drafts.memory = memory_of(taught)
        names = "tokens passes drafted accepted guessing_s plain_tokens plain_s same"
        row = dict.fromkeys(names.split(), 0.0)
        for number, prompt in enumerate(prompts[repeat * args.prompts :][: args.prompts]):
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
        row["pass_steps"] = row["guessing_s"] / row["passes"] * row["plain_tok_s"]
        print(
            f"{row['tokens']:.0f} tokens in {row['passes']:.0f} passes, {row['accepted']:.0f} of "
            f"{row['drafted']:.0f} right; {row['tok_s']:.1f} tok/s, {row['plain_tok_s']:.1f} without "
            f"them; a pass takes {row['pass_steps']:.2f} steps; "
            f"{row['same']:.0f} of {args.prompts} answers the same",
            flush=True,
        )
    pace = drafts.pace
    one = pace._seconds[1]
    result = {
        "bench": "speculation",
        "bundle": bundle.name,
        "recipe": bundle.manifest.recipe,
        "threads": guessing._session.threads,
        "longest_draft": pace.longest,
        "all_wrong": False,
        "taught": args.taught,
        "tokens_per_pass": round(median([row["tokens"] / row["passes"] for row in rows]), 3),
        "accepted_share": round(median([row["accepted"] / max(row["drafted"], 1) for row in rows]), 3),
        "pass_steps": round(median([row["pass_steps"] for row in rows]), 3),
        "plain_tok_s": round(median([row["plain_tok_s"] for row in rows]), 1),
        "guessing_tok_s": round(median([row["tok_s"] for row in rows]), 1),
        "ratio": round(median([row["tok_s"] / row["plain_tok_s"] for row in rows]), 3),
        "pass_ms_by_rows": [round(spent * 1e3, 3) for spent in pace._seconds[1:]],
        "same_answers": min(row["same"] for row in rows) / args.prompts,
        "machine": about,
    }
    print(
        f"{result['tokens_per_pass']} tokens a pass; {result['plain_tok_s']} tok/s without, "
        f"{result['guessing_tok_s']} with: {result['ratio']} times"
    )
    print(
        "a pass of so many rows takes, in steps of one: "
        + ", ".join(f"{rows}: {spent / one:.2f}" for rows, spent in enumerate(pace._seconds) if spent)
    )
    print_json(result)


if __name__ == "__main__":
    main()
