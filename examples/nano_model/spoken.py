"""Dialogues in which the user speaks: transcripts, commands, and questions about a sensor window.

A spoken part of a message is {"type": "audio", "say": text}; its words are those of the lists, since nobody
can spell a word that has never been heard. `held_out=True` takes the sixteenth of all sentences that training
never says.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import Any

from ...runtime.transcribe import INSTRUCTION
from ..sensor_summary.window import render_window
from .commands import ACTIONS, random_commands, random_sentence
from .windows import random_question, speakable_window
from .words import known_text

Messages = list[dict[str, Any]]

# How often each kind comes; the rest: questions about a window.
TRANSCRIPTS, COMMANDS = 0.5, 0.38

# What the daemon asks, and shorter ways to say it.
TRANSCRIBE = (
    INSTRUCTION.format(language="English"),
    "Transcribe this.",
    "Transcribe the speech.",
    "What did I say?",
    "Write down what is said.",
)
_GREETINGS = (
    """
Hello|Good morning|Good evening|How are you|Who are you|What can you do|Thank you very much|Please help me
What is the weather like|Tell me a joke|Are you there|Good night|See you tomorrow|Yes please|No thanks|Stop
Wait a moment|Say that again please|What time is it|Turn everything off
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
_QUESTION_WORDS = ("what", "which", "how", "is", "are", "who", "was", "any", "did", "does", "why")


def spoken_dialogue(rng: random.Random, *, held_out: bool = False) -> tuple[Messages, list[dict[str, Any]]]:
    """(messages, tools) of one dialogue with at least one spoken turn."""
    kind = rng.random()
    if kind < TRANSCRIPTS:
        return transcript_dialogue(rng, held_out=held_out), []
    if kind < TRANSCRIPTS + COMMANDS:
        return spoken_commands(rng, held_out=held_out)
    return spoken_questions(rng, held_out=held_out), []


def transcript_dialogue(rng: random.Random, *, held_out: bool = False) -> Messages:
    """One sentence and its transcript."""
    text = _sentence(rng, held_out)
    prompt = TRANSCRIBE[0] if rng.random() < 0.4 else rng.choice(TRANSCRIBE)
    return [
        {"role": "user", "content": [{"type": "text", "text": prompt}, {"type": "audio", "say": text}]},
        {"role": "assistant", "content": text},
    ]


def spoken_commands(rng: random.Random, *, held_out: bool = False) -> tuple[Messages, list[dict[str, Any]]]:
    """A dialogue of commands, most of them spoken."""
    messages, tools = random_commands(
        rng, source="spoken", accept=lambda text: is_held_out(written(text)) == held_out
    )
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    always = rng.choice(turns)
    for turn in turns:
        if turn == always or rng.random() < 0.6:
            messages[turn]["content"] = [{"type": "audio", "say": written(messages[turn]["content"])}]
    return messages, tools


def spoken_questions(rng: random.Random, *, held_out: bool = False) -> Messages:
    """A window as text, then one to three spoken questions about it."""
    window = speakable_window(rng)
    messages: Messages = []
    for turn in range(rng.randint(1, 3)):
        while True:
            question, answer = random_question(rng, window, spoken=True)
            if is_held_out(written(question)) == held_out:
                break
        parts: list[dict[str, Any]] = [{"type": "audio", "say": written(question)}]
        if turn == 0:
            parts.insert(0, {"type": "text", "text": f"{render_window(window)}\n\n"})
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return messages


def _sentence(rng: random.Random, held_out: bool) -> str:
    while True:
        kind = rng.random()
        if kind < 0.6:
            text = random_sentence(rng, rng.choice(ACTIONS))
        elif kind < 0.75:
            text = random_question(rng, speakable_window(rng), spoken=True)[0]
        elif kind < 0.8:
            text = rng.choice(_GREETINGS)
            if not held_out:  # too few to hold any out
                return written(text)
        else:
            text = known_text(rng, rng.randint(2, 7))
        text = written(text)
        if is_held_out(text) == held_out:
            return text


def is_held_out(text: str) -> bool:
    """Whether training never says this sentence."""
    return zlib.crc32(text.lower().encode()) % 16 == 0


def written(text: str) -> str:
    """The one way in which a sentence is spelled in a transcript: no signs that cannot be heard."""
    text = re.sub(r"\bmin$", "minutes", text.replace("%", " percent").replace("°C", "degrees"))
    text = re.sub(r"[,!:;?.'](?!\d)", " ", text)
    text = " ".join(text.split())
    mark = "?" if text.split(" ")[0].lower() in _QUESTION_WORDS else "."
    return text[:1].upper() + text[1:] + mark
