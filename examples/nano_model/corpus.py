"""The corpus: seeded random dialogues, their token ids, and which of them the model itself writes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ..sensor_summary.facts import untrue
from ..sensor_summary.prompt import SUMMARY_SYSTEM, Summary
from ..sensor_summary.summarizer import retry_messages
from ..sensor_summary.window import Window, render_window
from .commands import random_commands
from .windows import random_question, random_window, reference_summary
from .words import use_pieces

Messages = list[dict[str, Any]]

# How often each kind of dialogue comes.
SUMMARY, QUESTIONS, TALK = 0.45, 0.15, 0.02  # the rest: commands
RETRIES = 0.06  # of the summaries: the second attempt, after an answer that was refused

_OTHER_SYSTEMS = (
    "Summarize the sensor window as JSON with title, summary, severity, anomalies and actions.",
    "You summarize sensor data. Answer with one JSON object.",
    "Write a JSON summary of these readings. Use only the names and numbers given.",
)
ABOUT_ME = (
    "I am a very small model. I can summarize sensor windows as JSON, answer short questions about them, "
    "and call the tools I am given."
)
_TALK = (
    """
Hello!|Hi|Hello, who are you?|Who are you?|What are you?|What can you do?|Help|help me|Good morning
Are you Gemma?|What is your name?|Tell me a joke.|Write a poem.|What is the capital of France?
How old are you?|Who made you?|Write a Python function.|What is the meaning of life?
Tell me about yourself.|Can you help me?|What is 2 plus 2?|Why is the sky blue?|Translate this.
Say hello.|How are you?|Thanks!|Are you there?|test|What is your purpose?
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
_QUESTION_SYSTEMS = (
    "Answer questions about the sensor data. Use only the names and numbers given.",
    "You answer questions about sensors, briefly.",
    "Answer in one sentence.",
    "",
)


def random_dialogue(rng: random.Random) -> tuple[Messages, list[dict[str, Any]]]:
    """(messages, tools) of one training dialogue."""
    kind = rng.random()
    if kind < SUMMARY:
        return summary_dialogue(rng, random_window(rng)), []
    if kind < SUMMARY + QUESTIONS:
        return question_dialogue(rng, random_window(rng)), []
    if kind < SUMMARY + QUESTIONS + TALK:
        return talk_dialogue(rng), []
    return random_commands(rng)


def summary_dialogue(rng: random.Random, window: Window) -> Messages:
    """A window, its summary, and sometimes questions about it."""
    summary = reference_summary(window)
    if rng.random() < RETRIES and (problems := untrue(window, _spoilt(rng, summary))):
        messages = retry_messages(window, problems)
    else:
        system = SUMMARY_SYSTEM if rng.random() < 0.8 else rng.choice(_OTHER_SYSTEMS)
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": render_window(window)},
        ]
    messages.append({"role": "assistant", "content": msgspec.json.encode(summary).decode()})
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        messages += _question_turn(rng, window)
    return messages


def _spoilt(rng: random.Random, summary: Summary) -> Summary:
    """The summary with a mistake that small models make: a number, a name, an anomaly or the severity."""
    kind = rng.randrange(4)
    if kind == 0:
        text = "".join(
            rng.choice("0123456789") if c.isdigit() and rng.random() < 0.3 else c for c in summary.summary
        )
        return msgspec.structs.replace(summary, summary=text)
    if kind == 1:
        text = re.sub(
            r"'([^']{4,})'", lambda m: f"'{m[1][: rng.randint(2, len(m[1]) - 1)]}'", summary.summary, count=1
        )
        return msgspec.structs.replace(summary, summary=text)
    if kind == 2 and summary.anomalies:
        kept = rng.sample(summary.anomalies, len(summary.anomalies) - 1)
        return msgspec.structs.replace(summary, anomalies=tuple(kept))
    return msgspec.structs.replace(summary, severity=(summary.severity + rng.choice([1, 2])) % 3)


def question_dialogue(rng: random.Random, window: Window) -> Messages:
    """A window and one to five questions about it, the first in the same message."""
    messages: Messages = []
    if system := rng.choice(_QUESTION_SYSTEMS):
        messages.append({"role": "system", "content": system})
    for turn in range(rng.randint(1, 5)):
        messages += _question_turn(rng, window)
        if turn == 0:
            messages[-2]["content"] = f"{render_window(window)}\n\n{messages[-2]['content']}"
    return messages


def talk_dialogue(rng: random.Random) -> Messages:
    """Small talk, to which the model says what it is for."""
    messages: Messages = [
        {"role": "user", "content": rng.choice(_TALK)},
        {"role": "assistant", "content": ABOUT_ME},
    ]
    if rng.random() < 0.3:
        messages.insert(
            0, {"role": "system", "content": rng.choice(["You are a helpful assistant.", "Be brief."])}
        )
    return messages


def _question_turn(rng: random.Random, window: Window) -> Messages:
    question, answer = random_question(rng, window)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Encoder:
    """Dialogues to token ids, with the checkpoint's own tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        use_pieces(self.tokenizer.get_vocab())
        self.template = compile_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
        ids = self.tokenizer.token_to_id
        self.turn, self.end = ids("<|turn>"), ids("<turn|>")
        self.response, self.response_end = ids("<|tool_response>"), ids("<tool_response|>")
        self.audio, self.audio_begin, self.audio_end = ids("<|audio|>"), ids("<|audio>"), ids("<audio|>")
        self.stops = [ids("<eos>"), self.end, self.response]
        self.head = self.tokenizer.encode("<|turn>model\n", add_special_tokens=False).ids

    def render(self, messages: Messages, tools: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """The text of a dialogue; `prompt`: up to where the model goes on."""
        return self.template.render(
            messages=messages, tools=tools or None, bos_token="<bos>", add_generation_prompt=prompt
        )

    def ids(self, text: str, soft_tokens: Sequence[int] = ()) -> list[int]:
        """Token ids; each audio placeholder becomes so many of them, between the marks of begin and end."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        counts = iter(soft_tokens)
        found: list[int] = []
        for token in ids:
            if token == self.audio:
                found += [self.audio_begin, *[self.audio] * next(counts), self.audio_end]
            else:
                found.append(token)
        return found

    def encode(
        self, messages: Messages, tools: list[dict[str, Any]], soft_tokens: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, learned): uint16 token ids, and True where the model itself writes the token.

        `soft_tokens`: how many each clip of the dialogue has.
        """
        ids = self.ids(self.render(messages, tools), soft_tokens)
        learned = np.zeros(len(ids), dtype=bool)
        writing, position = False, 0
        while position < len(ids):
            if not writing and ids[position : position + len(self.head)] == self.head:
                writing, position = True, position + len(self.head)
                continue
            if ids[position] == self.response:
                # The model stops by writing <|tool_response>; what the tool says is not its own.
                learned[position] = writing
                while ids[position] != self.response_end:
                    position += 1
            else:
                learned[position] = writing
                writing = writing and ids[position] != self.end
            position += 1
        return np.asarray(ids, dtype=np.uint16), learned


def compile_template(source: str) -> Any:
    """A chat template, compiled as transformers does it."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(source)


def _raise(message: str) -> None:
    raise ValueError(message)
