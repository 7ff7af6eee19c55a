"""The model within this process: a service on an opened bundle, and how many tokens a conversation takes.

In process, not a daemon's client: the sound goes to the encoder as it comes from the microphone, without a
protocol between, an answer is cancelled at the next token, and what was heard is not encoded a second time.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runtime.bundle import open_bundle
from ...runtime.chat import load_template
from ...runtime.engine import Engine
from ...runtime.errors import GemmaEdgeError, RequestError
from ...runtime.prefix import ReuseSettings, default_budget_bytes
from ...runtime.service import Service
from ...runtime.sounds import Ears, open_ears, take_sounds
from ...runtime.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

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


@contextmanager
def open_brain(
    folder: Path,
    *,
    hears: bool,
    head: Sequence[Message] = (),
    tools: Sequence[dict[str, Any]] = (),
    threads: int | None = None,
) -> Iterator[Brain]:
    """Load a bundle; hears: with its audio encoder. Raises GemmaEdgeError.

    head, tools: what every prompt begins with; it is run now, and kept.
    """
    bundle = open_bundle(folder)
    ears = open_ears(bundle, threads=threads) if hears else None
    if hears and ears is None:
        raise GemmaEdgeError(
            f"{folder}: this model hears nothing: its bundle has no audio encoder. Type instead (--text, "
            "make voice TYPED=1), or export a model with an audio_config, without --no-audio"
        )
    # A turn's prompt begins with the last one's: only what is new is run.
    reuse = ReuseSettings(default_budget_bytes(bundle.manifest))
    engine = Engine(bundle, threads=threads, reuse=reuse)
    tokenizer, template = load_tokenizer(bundle), load_template(bundle)

    def encode(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        return template.encode(tokenizer, messages, tools)

    _prepare(engine, encode, head, tools)
    with Service(engine, tokenizer, template, model_name=bundle.name, ears=ears) as service:
        yield make_brain(service, engine.context, encode, ears)


def _prepare(
    engine: Engine,
    encode: Callable[[Sequence[Message], Sequence[dict[str, Any]]], list[int]],
    head: Sequence[Message],
    tools: Sequence[dict[str, Any]],
) -> None:
    """Run what all prompts have in common, so that the first turn is as fast as the others."""
    one, other = (encode([*head, {"role": "user", "content": text}], tools) for text in ("Yes", "No"))
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    common = [token for token, _ in pairs]
    try:
        engine.remember(common, "the system message and the tools")
    except RequestError as error:  # the device has no memory for it
        log.info("%s", error)
        for _ in engine.generate(one[: engine.context - 1], max_new_tokens=1):
            pass


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
