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
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from ...runtime.prompt import Part, Soft
from ..sensor_summary.facts import untrue
from ..sensor_summary.prompt import Summary, summary_messages
from ..sensor_summary.window import Window
from .batches import silence, spoken_texts
from .commands import random_commands
from .corpus import Encoder, Messages, question_dialogue
from .hearing import soft_tokens
from .rooms import disturb
from .speech import RATE_HZ, random_speaker, say
from .spoken import spoken_commands, transcript_dialogue
from .windows import random_window

if TYPE_CHECKING:
    from ...runtime.sounds import Ears

HELD_OUT_SEED = 77_000_000
MAX_NEW_TOKENS = 800


@dataclass(frozen=True)
class Prompt:
    """Token ids with one placeholder run for each clip, and the clips: (samples,) float32 at 16 kHz."""

    ids: list[int]
    clips: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Case:
    """One prompt, and the judge of its answer: problems in words, none when it is right."""

    task: str
    prompt: Prompt
    judge: Callable[[str], list[str]]
    words: tuple[str, ...] = ()  # of a transcript


def cases(encoder: Encoder, count: int, *, spoken: bool = False) -> Iterator[Case]:
    """`count` windows, tool calls and questions each, none of them from the training distribution's seeds.

    spoken: transcripts and spoken commands as well, of sentences, voices and rates that training never had.
    """
    for number in range(count):
        rng = random.Random(HELD_OUT_SEED + number)
        window = random_window(rng, held_out=True)
        text = encoder.render(summary_messages(window), [], prompt=True)
        yield Case("summary", Prompt(encoder.ids(text)), _summary_judge(window))
        yield from _question_case(encoder, rng)
        yield from _command_case(encoder, rng)
        if spoken:
            yield from _transcript_case(encoder, rng)
            yield from _spoken_command_case(encoder, rng)


def _transcript_case(encoder: Encoder, rng: random.Random) -> Iterator[Case]:
    messages = transcript_dialogue(rng, held_out=True)
    prompt = _spoken_prompt(encoder, rng, messages[:1], [])
    text = messages[-1]["content"]
    yield Case("transcript", prompt, _exact_judge(text), tuple(plain_words(text)))


def _spoken_command_case(encoder: Encoder, rng: random.Random) -> Iterator[Case]:
    """A tool call that answers a spoken turn."""
    while True:
        messages, tools = spoken_commands(rng, held_out=True)
        calls = [
            i
            for i, message in enumerate(messages)
            if message.get("tool_calls") and isinstance(messages[i - 1]["content"], list)
        ]
        if calls:
            break
    at = rng.choice(calls)
    prompt = _spoken_prompt(encoder, rng, messages[:at], tools)
    yield Case("spoken_command", prompt, _exact_judge(_answer(encoder, messages, tools, at)))


def _spoken_prompt(encoder: Encoder, rng: random.Random, messages: Messages, tools: list[Any]) -> Prompt:
    """The prompt as a microphone hears it: one speaker, another disturbance for each clip."""
    speaker = random_speaker(rng, held_out=True)
    clips = []
    for text in spoken_texts(messages):
        clean = torch.from_numpy(np.pad(say(text, speaker).samples, silence(rng)))
        heard = disturb(clean[None], torch.tensor([len(clean)]), rng.getrandbits(31))
        clips.append(heard[0].numpy())
    text = encoder.render(messages, tools, prompt=True)
    return Prompt(encoder.ids(text, [soft_tokens(len(clip)) for clip in clips]), tuple(clips))


def plain_words(text: str) -> list[str]:
    """The words of a text as word error rates count them: small letters, no marks."""
    return re.sub(r"[^a-z0-9: ]", " ", text.lower()).split()


def word_errors(expected: Sequence[str], got: Sequence[str]) -> int:
    """Words put in, left out or replaced, at least (Levenshtein)."""
    row = list(range(len(got) + 1))
    for i, word in enumerate(expected, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(got, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


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
    ids = encoder.ids(encoder.render(before, [], prompt=True))
    yield Case("question", Prompt(ids), _exact_judge(last["content"]))


def _command_case(encoder: Encoder, rng: random.Random) -> Iterator[Case]:
    messages, tools = random_commands(rng, held_out=True)
    calls = [i for i, message in enumerate(messages) if message.get("tool_calls")]
    if not calls:
        messages, tools = random_commands(rng, held_out=True)
        calls = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    at = rng.choice(calls)
    ids = encoder.ids(encoder.render(messages[:at], tools, prompt=True))
    yield Case("command", Prompt(ids), _exact_judge(_answer(encoder, messages, tools, at)))


def _answer(encoder: Encoder, messages: Messages, tools: list[Any], at: int) -> str:
    """What the model should write as message `at`, up to its stop."""
    prompt = encoder.render(messages[:at], tools, prompt=True)
    whole = encoder.render(messages[: at + 1], tools)
    return whole.removeprefix(prompt).removesuffix("\n").removesuffix("<turn|>")


def _exact_judge(expected: str) -> Callable[[str], list[str]]:
    return lambda answer: [] if answer == expected else [f"{answer!r}, expected {expected!r}"]


Generate = Callable[[list[Prompt]], Iterator[list[int]]]


def transformers_generate(folder: Path, stops: list[int]) -> Generate:
    """Greedy generation by transformers, in bf16, many prompts at a time."""
    from transformers import Gemma4AudioFeatureExtractor, Gemma4ForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Gemma4ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    batch = 256 if device == "cuda" else 16

    def generate(prompts: list[Prompt]) -> Iterator[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: (bool(prompts[i].clips), len(prompts[i].ids)))
        answers: dict[int, list[int]] = {}
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = max(len(prompts[i].ids) for i in chosen)
            padding = [longest - len(prompts[i].ids) for i in chosen]
            ids = torch.tensor(
                [[0] * n + prompts[i].ids for n, i in zip(padding, chosen, strict=True)], device=device
            )
            mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
            sound = {}
            if clips := [clip for i in chosen for clip in prompts[i].clips]:
                features = Gemma4AudioFeatureExtractor()(clips, return_tensors="pt")
                sound = {
                    "input_features": features.input_features.to(device, torch.bfloat16),
                    "input_features_mask": features.input_features_mask.to(device).bool(),
                }
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=stops,
                    **sound,
                )
            for i, row in zip(chosen, out[:, longest:].tolist(), strict=True):
                answers[i] = row
        yield from (answers[i] for i in range(len(prompts)))

    return generate


def bundle_generate(folder: Path) -> Generate:
    """Greedy generation by our engine."""
    from ...runtime.bundle import open_bundle
    from ...runtime.engine import Engine, SamplingParams
    from ...runtime.sounds import open_ears

    bundle = open_bundle(folder)
    engine, ears = Engine(bundle), open_ears(bundle)

    def generate(prompts: list[Prompt]) -> Iterator[list[int]]:
        for prompt in prompts:
            room = min(MAX_NEW_TOKENS, engine.context - len(prompt.ids))
            parts: list[Part] = [prompt.ids]
            if prompt.clips:
                assert ears is not None, f"{folder} hears nothing"
                parts = _with_clips(prompt, ears)
            yield list(engine.generate_from(parts, SamplingParams(), max_new_tokens=room))

    return generate


def _with_clips(prompt: Prompt, ears: Ears) -> list[Part]:
    """The prompt's ids, and its clips' soft tokens where their placeholders are."""
    parts: list[Part] = []
    clips = iter(prompt.clips)
    for heard, run in groupby(prompt.ids, lambda token: token == ears.tokens.placeholder):
        ids = list(run)
        if heard:
            soft = ears.encoder.encode(next(clips), RATE_HZ)
            if len(soft) != len(ids):
                raise AssertionError(f"{len(soft)} soft tokens for {len(ids)} placeholders")
            parts.append(Soft(soft))
        else:
            parts.append(ids)
    return parts


def evaluate(
    encoder: Encoder, generate: Generate, count: int, show: int, *, spoken: bool = False
) -> dict[str, Any]:
    """Accuracy for each task, in percent; the word error rate of transcripts."""
    asked = list(cases(encoder, count, spoken=spoken))
    stops = set(encoder.stops)
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    words = errors = 0
    started = time.time()
    for case, ids in zip(asked, generate([case.prompt for case in asked]), strict=True):
        kept = ids[: next((i for i, token in enumerate(ids) if token in stops), len(ids))]
        answer = encoder.tokenizer.decode(kept, skip_special_tokens=False)
        problems = case.judge(answer)
        total[case.task] = total.get(case.task, 0) + 1
        right[case.task] = right.get(case.task, 0) + (not problems)
        words += len(case.words)
        errors += word_errors(case.words, plain_words(answer)) if case.words else 0
        if problems and show > 0:
            show -= 1
            print(f"--- {case.task}: {'; '.join(problems)[:600]}", flush=True)
    result: dict[str, Any] = {f"{task}_percent": round(100 * right[task] / total[task], 2) for task in total}
    if words:
        result["word_error_percent"] = round(100 * errors / words, 2)
    return result | {"cases_each": count, "seconds": round(time.time() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="checkpoint folder, run by transformers in bf16")
    where.add_argument("--bundle", type=Path, help="bundle folder, run by our engine")
    parser.add_argument("--count", type=int, default=500, help="held-out cases of each task")
    parser.add_argument("--spoken", action="store_true", help="speech too, for a model that hears")
    parser.add_argument("--show", type=int, default=5, help="print so many wrong answers")
    args = parser.parse_args()
    folder = args.model or args.bundle
    encoder = Encoder(folder)
    generate = transformers_generate(folder, encoder.stops) if args.model else bundle_generate(folder)
    print(
        json.dumps(
            {"evaluated": folder.name}
            | evaluate(encoder, generate, args.count, args.show, spoken=args.spoken)
        )
    )


if __name__ == "__main__":
    main()
