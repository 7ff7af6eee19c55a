"""An engine that says what it is told: for tests of what stands above the engine. It loads no model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from gemma_edge.runtime.engine import CancelSignal
from gemma_edge.runtime.sampler import SamplingParams
from gemma_edge.runtime.stats import EngineFinish, GenerationStats


class ScriptedEngine:
    """`script` gives the ids to answer with, stop ids among them. `gate`, if given, is waited for at each."""

    def __init__(
        self,
        script: Callable[[Sequence[int]], Sequence[int]],
        *,
        eos: Sequence[int] = (),
        context: int = 4096,
        gate: threading.Semaphore | None = None,
    ) -> None:
        self.context = context
        self.eos = frozenset(eos)
        self.last_stats: GenerationStats | None = None
        self.prompts: list[list[int]] = []
        self.yielded = 0
        self._script = script
        self._gate = gate

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        cancel: CancelSignal | None = None,
    ) -> Iterator[int]:
        self.prompts.append(list(prompt_ids))
        finish: EngineFinish = "cancelled"
        count = 0
        start = time.perf_counter()
        try:
            for token in self._script(prompt_ids):
                while self._gate is not None and not self._gate.acquire(timeout=0.005):
                    if cancel is not None and cancel.is_set():
                        return
                if cancel is not None and cancel.is_set():
                    return
                if token in self.eos:
                    finish = "stop"
                    return
                count += 1
                self.yielded += 1
                if count == max_new_tokens:
                    finish = "length"
                yield token
                if count == max_new_tokens:
                    return
            finish = "stop"
        finally:
            spent = time.perf_counter() - start
            self.last_stats = GenerationStats(
                len(prompt_ids), count, spent, spent, 0.0, max(count - 1, 0), finish
            )
