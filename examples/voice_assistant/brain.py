"""The model within this process: a service on an opened bundle, and how many tokens a conversation takes.

In process, not a daemon's client: the sound goes to the encoder as it comes from the microphone, without a
protocol between, an answer is cancelled at the next token, and what was heard is not encoded a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.bundle import open_bundle
from ...runtime.chat import load_template
from ...runtime.engine import Engine
from ...runtime.errors import GemmaEdgeError
from ...runtime.service import ChatRequest, Service
from ...runtime.sounds import Ears, open_ears, take_sounds
from ...runtime.tokenizer import load_tokenizer

Message = dict[str, Any]
Count = Callable[[Sequence[Message], Sequence[dict[str, Any]]], int]  # of messages and tools


@dataclass(frozen=True)
class Brain:
    """What the assistant needs of a model."""

    service: Service
    context: int  # tokens
    count: Count  # tokens of a prompt; sounds that were not heard yet count as none
    max_s: float = 0.0  # of one sound; 0: it hears nothing
    tokens_per_s: float = 0.0  # of sound

    @property
    def hears(self) -> bool:
        return self.max_s > 0

    def warm_up(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Run the beginning of every prompt once, so that the first turn is as fast as the others."""
        request = ChatRequest([*messages, {"role": "user", "content": "Hello"}], tools, max_tokens=1)
        for _ in self.service.submit(request).events():
            pass


@contextmanager
def open_brain(folder: Path, *, hears: bool, threads: int | None = None) -> Iterator[Brain]:
    """Load a bundle; hears: with its audio encoder. Raises GemmaEdgeError."""
    bundle = open_bundle(folder)
    ears = open_ears(bundle, threads=threads) if hears else None
    if hears and ears is None:
        raise GemmaEdgeError(
            f"{folder}: this model hears nothing: its bundle has no audio encoder. Type instead (--text, "
            "make voice TYPED=1), or export a model with an audio_config, without --no-audio"
        )
    engine = Engine(bundle, threads=threads)
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)

    def encode(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        return template.encode(tokenizer, messages, tools)

    with Service(engine, tokenizer, template, model_name=bundle.name, ears=ears) as service:
        yield make_brain(service, engine.context, encode, ears)


def make_brain(
    service: Service,
    context: int,
    encode: Callable[[Sequence[Message], Sequence[dict[str, Any]]], Sequence[int]],
    ears: Ears | None,
) -> Brain:
    """encode: messages and tools to prompt ids."""

    def count(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> int:
        taken, sounds = take_sounds(messages)
        return len(encode(taken, tools)) + sum(ears.check(sound) for sound in sounds if ears is not None)

    if ears is None:
        return Brain(service, context, count)
    return Brain(service, context, count, ears.encoder.max_s, ears.encoder.audio.tokens_per_s)
