"""A prompt in, token ids out: chunked prefill, the decode loop, stop ids, cancellation; knows no text.

    prompt --chunks--> session.prefill … --> sampler --> token --> session.step --> sampler --> …

A generation overwrites what the last one left in the caches: their valid length follows from the position, so
nothing leaks from one request into the next. It starts at position 0, or, if the engine was opened with
`reuse`, where the prompt differs from what the caches hold or held (`prefix`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .bundle import Bundle
from .errors import RequestError
from .prefix import Reuse, ReuseSettings, open_reuse
from .prompt import Chunk, Chunks, Part, Start
from .sampler import Sampler, SamplingParams
from .session import Session
from .stats import EngineFinish, GenerationStats

__all__ = ["CancelSignal", "Engine", "GenerationStats", "SamplingParams"]


class CancelSignal(Protocol):
    """What the engine asks between steps: a threading.Event, or anything that answers like one."""

    def is_set(self) -> bool: ...


class Engine:
    """One model, one sequence at a time. Not thread-safe: one thread owns it."""

    def __init__(
        self, bundle: Bundle, *, threads: int | None = None, reuse: ReuseSettings | None = None
    ) -> None:
        """Load the bundle.

        threads: default what its device profile says, at most the CPUs there are.
        reuse: what is kept of earlier prompts; by default every prompt is run whole.
        """
        self.context = bundle.manifest.caches.context  # tokens, prompt and answer together
        self.eos = frozenset(bundle.manifest.tokens.eos)
        self.last_stats: GenerationStats | None = None
        self._vocab_size = bundle.manifest.geometry.vocab_size
        self._hidden_size = bundle.manifest.geometry.hidden_size
        self._pad = bundle.manifest.tokens.pad
        audio = bundle.manifest.audio
        self._placeholder = self._pad if audio is None else audio.tokens.placeholder
        self._session = Session(bundle, threads=threads)
        self._reuse = open_reuse(bundle, self._session.caches, reuse) if reuse is not None else None
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
        self._check_room(len(ids), max_new_tokens)
        return self.generate_from([ids.tolist()], params, max_new_tokens=max_new_tokens, cancel=cancel)

    def generate_from(
        self,
        parts: Iterable[Part],
        params: SamplingParams | None = None,
        *,
        max_new_tokens: int | None = None,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]:
        """As `generate`, for a prompt in parts that are run as they arrive.

        What the iterator of `parts` raises passes through. Raises RequestError when a part is too much.
        """
        if max_new_tokens is not None and max_new_tokens < 1:
            raise RequestError(
                "invalid_request", f"max_new_tokens: expected at least 1, got {max_new_tokens}"
            )
        chunks = self._begin(parts)
        return self._run(chunks, params or SamplingParams(), max_new_tokens, cancel, self._generation)

    def remember(self, prompt_ids: Sequence[int], name: str) -> None:
        """Run the beginning of later prompts now, and keep it ready for as long as the engine is there.

        Raises RequestError if it does not fit into the context or the prefix cache.
        """
        keys = self._check_prompt(prompt_ids)
        snapshots = self._reuse.snapshots if self._reuse is not None else None
        if snapshots is None:
            raise RequestError("invalid_request", f"{name}: there is no prefix cache to keep it in")
        self._check_room(len(keys), 1)
        if snapshots.pin(keys, name):
            return
        chunks = self._begin([keys.tolist()])
        for chunk in chunks:
            self._prefill(chunk, chunks)
        snapshots.add(keys, "shared")
        snapshots.pin(keys, name)

    def close(self) -> None:
        """Wait until what is kept on disk is there. The engine can go on."""
        if self._reuse is not None and self._reuse.snapshots is not None:
            self._reuse.snapshots.close()

    def _begin(self, parts: Iterable[Part]) -> Chunks:
        """A new generation's prompt."""
        self._generation += 1
        return Chunks(
            parts,
            size=self._session.chunk,
            pad=self._pad,
            placeholder=self._placeholder,
            hidden=self._hidden_size,
            resume=_Resume(self, self._generation) if self._reuse is not None else None,
        )

    def _check_room(self, length: int, max_new_tokens: int | None) -> int:
        """How many new tokens there may be after a prompt of `length`."""
        room = self.context - length
        wanted = room if max_new_tokens is None else max_new_tokens
        if wanted > room or room < 1:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {length} tokens, {max(wanted, 1)} new ones asked for, the context holds "
                f"{self.context}; shorten the prompt, ask for fewer, or export with a larger --context",
            )
        return wanted

    def _check_prompt(self, prompt_ids: Sequence[int]) -> npt.NDArray[np.int64]:
        ids = np.asarray(prompt_ids, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise RequestError("invalid_request", "the prompt is empty; give at least one token")
        if ids.min() < 0 or ids.max() >= self._vocab_size:
            raise RequestError("invalid_request", f"prompt ids must be in 0…{self._vocab_size - 1}")
        return ids

    def _run(
        self,
        chunks: Chunks,
        params: SamplingParams,
        max_new_tokens: int | None,
        cancel: CancelSignal | None,
        generation: int,
    ) -> Iterator[int]:
        finish: EngineFinish = "cancelled"
        new_tokens = decode_steps = 0
        token = -1
        prefill_s = complete_s = ttft_s = decode_s = 0.0
        start = time.perf_counter()
        try:
            for chunk in chunks:
                before = time.perf_counter()
                complete_s = before - start
                self._check_current(generation)
                self._check_room(chunks.length, max_new_tokens)
                if cancel is not None and cancel.is_set():
                    return
                self._prefill(chunk, chunks)
                prefill_s += time.perf_counter() - before
            wanted = self._check_room(chunks.length, max_new_tokens)
            sampler = Sampler(params, chunks.ids, self._vocab_size)
            position = chunks.length
            while True:
                before = time.perf_counter()
                if new_tokens:
                    self._step(token, position)
                    position += 1
                    decode_steps += 1
                token = sampler.pick(self._session.logits)
                now = time.perf_counter()
                if decode_steps:
                    decode_s += now - before
                else:
                    ttft_s = now - start
                if token in self.eos:
                    finish = "stop"
                    return
                new_tokens += 1
                if new_tokens == wanted:
                    finish = "length"
                yield token
                if new_tokens == wanted:
                    return
                self._check_current(generation)
                if cancel is not None and cancel.is_set():
                    return
        finally:
            if generation == self._generation:
                self.last_stats = GenerationStats(
                    chunks.length,
                    new_tokens,
                    prefill_s,
                    ttft_s,
                    decode_s,
                    decode_steps,
                    finish,
                    complete_s,
                    chunks.reused,
                )
                if self._reuse is not None and finish != "cancelled":
                    self._reuse.finished()

    def _prefill(self, chunk: Chunk, chunks: Chunks) -> None:
        if self._reuse is not None:
            self._reuse.running()
        self._session.prefill(chunk.ids, chunk.position, last=chunk.last, heard=chunk.heard)
        if self._reuse is not None:
            self._reuse.ran(chunks.keys[chunk.position : chunk.position + len(chunk.ids)], chunk.position)

    def _step(self, token: int, position: int) -> None:
        if self._reuse is not None:
            self._reuse.running()
        self._session.step(token, position)
        if self._reuse is not None:
            self._reuse.ran((token,), position)

    def _check_current(self, generation: int) -> None:
        if generation != self._generation:
            raise RuntimeError("another generation was started on this engine; this one cannot go on")


class _Resume:
    """Lets a prompt reuse what the engine has kept, unless another one was begun in the meantime."""

    def __init__(self, engine: Engine, generation: int) -> None:
        self._engine, self._generation = engine, generation

    def expects(self, keys: Sequence[int]) -> bool:
        return self._reuse().expects(keys)

    def start(self, keys: Sequence[int]) -> Start:
        return self._reuse().start(keys)

    def _reuse(self) -> Reuse:
        self._engine._check_current(self._generation)
        assert self._engine._reuse is not None
        return self._engine._reuse
