"""A prompt in, token ids out: chunked prefill, the decode loop, stop ids, cancellation; knows no text.

    prompt --chunks--> session.prefill … --> sampler --> token, guesses --> session.step --> sampler --> …

A generation overwrites what the last one left in the caches: their valid length follows from the position, so
nothing leaks from one request into the next. It starts at position 0, or, if the engine was opened with
`reuse`, where the prompt differs from what the caches hold or held (`prefix`). A step runs one token and, if
the engine was opened with `speculate`, guesses at those that follow (`drafts`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from .bundle import Bundle, Manifest
from .drafter import open_drafter
from .drafts import MOST_DRAFT, Drafts, Guesser
from .errors import RequestError
from .generation import CancelSignal, Generations, Tally
from .prefix import Reuse, ReuseSettings, open_reuse
from .prompt import Chunk, Chunks, Part, Start, check_wanted
from .sampler import Sampler, SamplingParams
from .sessions import open_session
from .stats import GenerationStats

__all__ = ["CancelSignal", "Engine", "GenerationStats", "SamplingParams"]


class Engine(Generations):
    """One model on our own session."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        reuse: ReuseSettings | None = None,
        speculate: int = 0,
        drafter: bool = True,
    ) -> None:
        """Load the bundle.

        threads: default what its device profile says, at most the CPUs there are.
        reuse: what is kept of earlier prompts; by default every prompt is run whole.
        speculate: the most guesses at tokens that a step runs. Fewer if the bundle's sliding caches have less
        slack, none if they have none; and only as many as have paid off.
        drafter: whether the bundle's drafter, if it has one, guesses too.
        """
        super().__init__(bundle.manifest)
        self._pad = bundle.manifest.tokens.pad
        audio = bundle.manifest.audio
        self._placeholder = self._pad if audio is None else audio.tokens.placeholder
        guesses = min(speculate, MOST_DRAFT, longest_draft(bundle.manifest))
        self._session = open_session(bundle, threads=threads, longest_draft=guesses)
        self._drafts = Drafts(guesses) if guesses else None
        self._drafter = open_drafter(bundle, self._session) if guesses and drafter else None
        self._reuse = open_reuse(bundle, self._session.caches, reuse) if reuse is not None else None

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
        check_wanted(max_new_tokens)
        chunks = self._begin(parts)
        return self._run(chunks, params or SamplingParams(), max_new_tokens, cancel, self._generation)

    def remember(self, prompt_ids: Sequence[int], name: str) -> None:
        """Run the beginning of later prompts now, and keep it ready for as long as the engine is there.

        Raises RequestError if it does not fit into the context or the prefix cache.
        """
        keys = self._check_ids(prompt_ids)
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

    def _run(
        self,
        chunks: Chunks,
        params: SamplingParams,
        max_new_tokens: int | None,
        cancel: CancelSignal | None,
        generation: int,
    ) -> Iterator[int]:
        tally = Tally()
        guesser: Guesser | None = None
        picked: list[int] = []
        start = time.perf_counter()
        try:
            for chunk in chunks:
                before = time.perf_counter()
                tally.complete_s = before - start
                self._check_current(generation)
                self._check_room(chunks.length, max_new_tokens)
                if cancel is not None and cancel.is_set():
                    return
                self._prefill(chunk, chunks)
                tally.prefill_s += time.perf_counter() - before
            wanted = self._check_room(chunks.length, max_new_tokens)
            sampler = Sampler(params, chunks.ids, self._vocab_size)
            picked = [sampler.pick_from(self._session)]
            tally.ttft_s = time.perf_counter() - start
            if self._drafts is not None:
                guesser = self._drafts.begin(chunks.ids, self.eos)
                tally.decode_s += time.perf_counter() - start - tally.ttft_s
            position = chunks.length  # of the last token picked, which has not been run
            while True:
                for token in picked:
                    if (yield from self._give(token, tally, wanted, cancel, generation)):
                        return
                picked = self._step(picked, position, sampler, guesser, wanted - tally.new_tokens - 1, tally)
                position += len(picked)
        finally:
            if guesser is not None:
                guesser.extend(picked)
                guesser.end()
            if generation == self._generation:
                tally.prompt_tokens, tally.reused_tokens = chunks.length, chunks.reused
                self.last_stats = tally.stats()
                if self._reuse is not None and tally.finish != "cancelled":
                    self._reuse.finished()

    def _prefill(self, chunk: Chunk, chunks: Chunks) -> None:
        if self._reuse is not None:
            self._reuse.running()
        self._session.prefill(chunk.ids, chunk.position, last=chunk.last, heard=chunk.heard)
        if self._reuse is not None:
            self._reuse.ran(chunks.keys[chunk.position : chunk.position + len(chunk.ids)], chunk.position)

    def _step(
        self,
        last: Sequence[int],
        position: int,
        sampler: Sampler,
        guesser: Guesser | None,
        most: int,
        tally: Tally,
    ) -> list[int]:
        """Run the last of the tokens picked `last`, and up to `most` guesses; what is picked after them.

        The sampler picks at each row as it would without guesses, and the first pick that is not the guess
        run after it is the last that counts.
        """
        before = time.perf_counter()
        token, draft = last[-1], list[int]()
        if guesser is not None:
            guesser.extend(last)
            if guesser.may_guess:
                most = min(most, self._session.caches.ahead(position + 1))  # what can be taken back
                if self._drafter is None:
                    draft = guesser.guess(most)
                else:
                    states = self._drafter.session.states_after(len(last) - 1)
                    draft = guesser.guess(most, self._drafter.guesses(token, position, states))
        if self._reuse is not None:
            self._reuse.running()
        self._session.step(token, position, draft)
        picked = [sampler.pick_from(self._session)]
        for right, guess in enumerate(draft, 1):
            if picked[-1] != guess:
                break
            picked.append(sampler.pick(self._session.logits_after(right)))
        if self._reuse is not None:
            self._reuse.ran([token, *picked[:-1]], position)
        spent = time.perf_counter() - before
        if guesser is not None:
            guesser.learn(len(draft), len(picked) - 1, spent)
        tally.decode_s += spent
        tally.decode_steps += 1
        tally.drafted += len(draft)
        tally.accepted += len(picked) - 1
        return picked


def longest_draft(manifest: Manifest) -> int:
    """How many guesses can be taken back wherever they fall: the slack of the sliding caches."""
    window = manifest.geometry.sliding_window
    sliding = [layer.capacity for layer in manifest.caches.layers if layer.layer_type == "sliding_attention"]
    return min(sliding) - window if sliding else MOST_DRAFT


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
