"""Token ids in, token ids out: chunked prefill, the decode loop, stop ids, cancellation; knows no text.

    prompt ids --chunks--> session.prefill … --> sampler --> token --> session.step --> sampler --> …

A generation starts at position 0 and overwrites what the last one left in the caches: their valid length
follows from the position, so nothing leaks from one request into the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .errors import RequestError
from .sampler import Sampler, SamplingParams
from .session import Session
from .stats import EngineFinish, GenerationStats

__all__ = ["CancelSignal", "Engine", "GenerationStats", "SamplingParams"]


class CancelSignal(Protocol):
    """What the engine asks between steps: a threading.Event, or anything that answers like one."""

    def is_set(self) -> bool: ...


class Engine:
    """One model, one sequence at a time. Not thread-safe: one thread owns it."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Load the bundle. threads: default what its device profile says, at most the CPUs there are."""
        self.context = bundle.manifest.caches.context  # tokens, prompt and answer together
        self.eos = frozenset(bundle.manifest.tokens.eos)
        self.last_stats: GenerationStats | None = None
        self._vocab_size = bundle.manifest.geometry.vocab_size
        self._session = Session(bundle, threads=threads)
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
        ids = self._check_prompt(prompt_ids)
        room = self.context - len(ids)
        wanted = room if max_new_tokens is None else max_new_tokens
        if wanted < 1 and max_new_tokens is not None:
            raise RequestError("invalid_request", f"max_new_tokens: expected at least 1, got {wanted}")
        if wanted > room or room < 1:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {len(ids)} tokens, {max(wanted, 1)} new ones asked for, the context holds "
                f"{self.context}; shorten the prompt, ask for fewer, or export with a larger --context",
            )
        self._generation += 1
        return self._run(ids, params or SamplingParams(), wanted, cancel, self._generation)

    def _check_prompt(self, prompt_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        ids = np.asarray(prompt_ids, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise RequestError("invalid_request", "the prompt is empty; give at least one token")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise RequestError("invalid_request", f"prompt ids must be in 0…{self._vocab_size - 1}")
        return ids

    def _run(
        self,
        ids: npt.NDArray[np.int64],
        params: SamplingParams,
        max_new_tokens: int,
        cancel: CancelSignal | None,
        generation: int,
    ) -> Iterator[int]:
        session = self._session
        sampler = Sampler(params, ids, self._vocab_size)  # type: ignore[arg-type]
        finish: EngineFinish = "cancelled"
        new_tokens = decode_steps = 0
        token = -1
        prefill_s = ttft_s = decode_s = 0.0
        start = time.perf_counter()
        try:
            done = self._prefill(ids, cancel)
            prefill_s = time.perf_counter() - start
            if not done:
                return
            position = len(ids)
            while True:
                before = time.perf_counter()
                if new_tokens:
                    session.step(token, position)
                    position += 1
                    decode_steps += 1
                token = sampler.pick(session.logits)
                now = time.perf_counter()
                if decode_steps:
                    decode_s += now - before
                else:
                    ttft_s = now - start
                if token in self.eos:
                    finish = "stop"
                    return
                new_tokens += 1
                if new_tokens == max_new_tokens:
                    finish = "length"
                yield token
                if new_tokens == max_new_tokens:
                    return
                if generation != self._generation:
                    raise RuntimeError("another generation was started on this engine; this one cannot go on")
                if cancel is not None and cancel.is_set():
                    return
        finally:
            if generation == self._generation:
                self.last_stats = GenerationStats(
                    len(ids), new_tokens, prefill_s, ttft_s, decode_s, decode_steps, finish
                )

    def _prefill(self, ids: npt.NDArray[np.int64], cancel: CancelSignal | None) -> bool:
        """Fill the caches chunk by chunk and set the logits of the last id. False if cancelled on the way."""
        chunk = self._session.chunk
        for position in range(0, len(ids), chunk):
            if cancel is not None and cancel.is_set():
                return False
            part = ids[position : position + chunk]
            self._session.prefill(part, position, last=position + len(part) == len(ids))
        return True
