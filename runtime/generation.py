"""What generations of every engine have in common: ids checked at once, one at a time, what they took."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .bundle import Manifest
from .prompt import Part, check_ids, room_after
from .sampler import SamplingParams
from .stats import EngineFinish, GenerationStats


class CancelSignal(Protocol):
    """What the engine asks between steps: a threading.Event, or anything that answers like one."""

    def is_set(self) -> bool: ...


class Generations(ABC):
    """One sequence at a time: a new generation ends the one before. Not thread-safe: one thread owns it."""

    def __init__(self, manifest: Manifest) -> None:
        self.context = manifest.caches.context  # tokens, prompt and answer together
        self.eos = frozenset(manifest.tokens.eos)
        self.last_stats: GenerationStats | None = None
        self._vocab_size = manifest.geometry.vocab_size
        self._hidden_size = manifest.geometry.hidden_size
        self._generation = 0

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]:
        """Yield new token ids. A stop id ends the iteration and is not yielded; see `last_stats.finish`.

        max_new_tokens: default what fits in the context.
        cancel: looked at between prefill chunks and between tokens.
        Raises RequestError at once: "context_length_exceeded" if prompt and new tokens do not fit, or
        "invalid_request". Going on with a generation after another one was started raises RuntimeError.
        """
        ids = self._check_ids(prompt_ids)
        self._check_room(len(ids), max_new_tokens)
        return self.generate_from([ids.tolist()], params, max_new_tokens=max_new_tokens, cancel=cancel)

    @abstractmethod
    def generate_from(
        self,
        parts: Iterable[Part],
        params: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]:
        """As `generate`, for a prompt in parts. What the iterator of `parts` raises passes through.

        Raises RequestError when a part is too much.
        """

    def _check_ids(self, ids: Sequence[int]) -> npt.NDArray[np.int64]:
        return check_ids(ids, self._vocab_size)

    def _check_room(self, length: int, max_new_tokens: int | None) -> int:
        return room_after(length, max_new_tokens, self.context)

    def _check_current(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError("another generation was started on this engine; this one cannot go on")

    def _give(
        self, token: int, tally: Tally, wanted: int, cancel: CancelSignal | None, generation: int
    ) -> Generator[int, None, bool]:
        """Yield a token unless it is a stop id; whether the generation ends with it."""
        if token in self.eos:
            tally.finish = "stop"
            return True
        tally.new_tokens += 1
        last = tally.new_tokens == wanted
        if last:
            tally.finish = "length"
        yield token
        if last:
            return True
        self._check_current(generation)
        return cancel is not None and cancel.is_set()


@dataclass
class Tally:
    """What GenerationStats is made of; its fields are explained there."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_s: float = 0.0
    complete_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    decode_steps: int = 0
    reused_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: EngineFinish = "cancelled"

    def stats(self) -> GenerationStats:
        return GenerationStats(**vars(self))
