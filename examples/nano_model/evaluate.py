"""Held-out accuracy of the nano model: other seeds, unseen sites and names, unseen values.

    python -m gemma_edge.examples.nano_model.evaluate --model models/nano
    python -m gemma_edge.examples.nano_model.evaluate --bundle bundles/nano-x86-64-generic-int4

The first runs the checkpoint in transformers (bf16), the second an exported bundle in our engine. Both answer
the same questions. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..sensor_summary.facts import untrue
from ..sensor_summary.prompt import Summary, summary_messages
from ..sensor_summary.window import Window
from .commands import random_commands
from .corpus import Encoder, question_dialogue
from .windows import random_window

HELD_OUT_SEED = 77_000_000
MAX_NEW_TOKENS = 800


@dataclass(frozen=True)
class Case:
    """One prompt, and the judge of its answer: problems in words, none when it is right."""

    task: str
    prompt: str
    judge: Callable[[str], list[str]]


def cases(encoder: Encoder, count: int) -> Iterator[Case]:
    """`count` windows, tool calls and questions each, none of them from the training distribution's seeds."""
    for number in range(count):
        rng = random.Random(HELD_OUT_SEED + number)
        window = random_window(rng, held_out=True)
        yield Case(
            "summary", encoder.render(summary_messages(window), [], prompt=True), _summary_judge(window)
        )
        yield from _question_case(encoder, rng)
        yield from _command_case(encoder, rng)


def _summary_judge(window: Window) -> Callable[[str], list[str]]:
    def judge(answer: str) -> list[str]:
        try:
            summary = msgspec.json.decode(answer, type=Summary)
        except msgspec.MsgspecError as error:
            return [f"not the JSON asked for: {error}"]
        return untrue(window, summary)

    return judge


def _question_case(encoder: Encoder, rng: random.Random) -> Iterator[Case]:
    dialogue = question_dialogue(rng, random_window(rng, held_out=True))
    *before, last = dialogue
    yield Case("question", encoder.render(before, [], prompt=True), _exact_judge(last["content"]))


def _command_case(encoder: Encoder, rng: random.Random) -> Iterator[Case]:
    messages, tools = random_commands(rng, held_out=True)
    calls = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    if not calls:
        messages, tools = random_commands(rng, held_out=True)
        calls = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    at = rng.choice(calls)
    prompt = encoder.render(messages[:at], tools, prompt=True)
    whole = encoder.render(messages[: at + 1], tools)
    expected = whole.removeprefix(prompt).removesuffix("\n").removesuffix("<turn|>")
    yield Case("command", prompt, _exact_judge(expected))


def _exact_judge(expected: str) -> Callable[[str], list[str]]:
    return lambda answer: [] if answer == expected else [f"{answer!r}, expected {expected!r}"]


Generate = Callable[[list[list[int]]], Iterator[list[int]]]


def transformers_generate(folder: Path, stops: list[int]) -> Generate:
    """Greedy generation by transformers, in bf16, many prompts at a time."""
    import torch
    from transformers import Gemma4ForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    batch = 256 if device == "cuda" else 16

    def generate(prompts: list[list[int]]) -> Iterator[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers: dict[int, list[int]] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = max(len(prompts[i]) for i in chosen)
            ids = torch.tensor(
                [[0] * (longest - len(prompts[i])) + prompts[i] for i in chosen], device=device
            )
            mask = torch.tensor(
                [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=device
            )
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=stops,
                )
            for i, row in zip(chosen, out[:, longest:].tolist(), strict=True):
                answers[i] = row
        yield from (answers[i] for i in range(len(prompts)))

    return generate


def bundle_generate(folder: Path) -> Generate:
    """Greedy generation by our engine."""
    from ...runtime.bundle import open_bundle
    from ...runtime.engine import Engine, SamplingParams

    engine = Engine(open_bundle(folder))

    def generate(prompts: list[list[int]]) -> Iterator[list[int]]:
        for prompt in prompts:
            room = min(MAX_NEW_TOKENS, engine.context - len(prompt))
            yield list(engine.generate(prompt, SamplingParams(), max_new_tokens=room))

    return generate


def evaluate(encoder: Encoder, generate: Generate, count: int, show: int) -> dict[str, Any]:
    """Accuracy for each task, in percent."""
    asked = list(cases(encoder, count))
    prompts = [encoder.tokenizer.encode(case.prompt, add_special_tokens=False).ids for case in asked]
    stops = set(encoder.stops)
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    started = time.time()
    for case, ids in zip(asked, generate(prompts), strict=True):
        kept = ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
        problems = case.judge(encoder.tokenizer.decode(kept, skip_special_tokens=False))
        total[case.task] = total.get(case.task, 0) + 1
        right[case.task] = right.get(case.task, 0) + (not problems)
        if problems and show > 0:
            show -= 1
            print(f"--- {case.task}: {'; '.join(problems)[:600]}", flush=True)
    result: dict[str, Any] = {f"{task}_percent": round(100 * right[task] / total[task], 2) for task in total}
    return result | {"cases_each": count, "seconds": round(time.time() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="checkpoint folder, run by transformers in bf16")
    where.add_argument("--bundle", type=Path, help="bundle folder, run by our engine")
    parser.add_argument("--count", type=int, default=500, help="held-out cases of each task")
    parser.add_argument("--show", type=int, default=5, help="print so many wrong answers")
    args = parser.parse_args()
    folder = args.model or args.bundle
    encoder = Encoder(folder)
    generate = transformers_generate(folder, encoder.stops) if args.model else bundle_generate(folder)
    print(json.dumps({"evaluated": folder.name} | evaluate(encoder, generate, args.count, args.show)))


if __name__ == "__main__":
    main()
