"""Picks the next token from logits: greedy or drawn; knows numpy alone.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .errors import RequestError

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.integer]

TOP_ENOUGH = 64  # a top-k that `Picks.top` is sure to hold, ties with the k-th included
_FIRST_GUESS = 256  # candidates sorted first when looking for the top-p set


@dataclass(frozen=True)
class SamplingParams:
    """How to choose. Raises RequestError("invalid_request") on values out of range."""

    temperature: float = 0.0  # 0 = greedy: then top-k, top-p, min-p and the seed do nothing
    top_k: int = 0  # 0 = all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and answer; 1 = none
    seed: int | None = None  # None: different every time

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, float, lambda value: 0 <= value <= 100, "0 to 100")
        _check("top_k", self.top_k, int, lambda value: value >= 0, "an integer >= 0")
        _check("top_p", self.top_p, float, lambda value: 0 < value <= 1, "above 0, at most 1")
        _check("min_p", self.min_p, float, lambda value: 0 <= value <= 1, "0 to 1")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            float,
            lambda value: 0 < value < math.inf,
            "above 0",
        )
        if self.seed is not None:
            _check("seed", self.seed, int, lambda value: 0 <= value < 2**64, "an integer, 0 <= seed < 2**64")


def _check(name: str, value: Any, kind: type, holds: Callable[[Any], bool], expected: str) -> None:
    kinds = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, kinds) or not holds(value):
        raise RequestError("invalid_request", f"{name}: expected {expected}, got {value!r}")


class Picks(Protocol):
    """Who finds the largest logits without handing all of them out: a GPU."""

    def best(self) -> int: ...

    def top(self) -> tuple[Ids, Floats]:
        """Ids of the largest, in ascending order, and their logits."""
        ...


class Scored(Protocol):
    """Who has logits."""

    @property
    def logits(self) -> Floats: ...

    @property
    def picks(self) -> Picks | None: ...


class Sampler:
    """One generation's choice of tokens: holds the random state and which ids were seen."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed)
        self._penalised = params.repetition_penalty != 1.0
        self._seen = np.zeros(vocab_size if self._penalised else 0, dtype=bool)
        if self._penalised:
            self._seen[np.asarray(prompt_ids, dtype=np.int64)] = True

    def pick_from(self, scored: Scored) -> int:
        """The next token, as `pick` finds it; all logits are only asked for if they are needed."""
        picks, params = scored.picks, self._params
        if picks is None or self._penalised:
            return self.pick(scored.logits)
        if params.temperature == 0.0:
            return picks.best()
        if 0 < params.top_k <= TOP_ENOUGH:
            ids, scores = picks.top()
            return int(ids[self._draw(scores)])
        return self.pick(scored.logits)

    def pick(self, logits: Floats) -> int:
        """The next token. `logits` (vocab,) may be changed in place; greedy copies nothing of its size."""
        if self._penalised:
            self._penalise(logits)
        greedy = self._params.temperature == 0.0
        token = int(logits.argmax()) if greedy else self._draw(logits)
        if math.isnan(logits[token]):
            raise FloatingPointError("the logits are not numbers; the bundle or its precision is broken")
        if self._penalised:
            self._seen[token] = True
        return token

    def _draw(self, logits: Floats) -> int:
        """An index into `logits`."""
        ids, weights = candidates(logits, self._params)
        cumulative = np.cumsum(weights, dtype=np.float64)
        drawn = self._random.random() * cumulative[-1]
        index = min(int(np.searchsorted(cumulative, drawn, side="right")), len(cumulative) - 1)
        return int(ids[index])

    def _penalise(self, logits: Floats) -> None:
        seen = np.flatnonzero(self._seen)
        scores = logits[seen]
        penalty = self._params.repetition_penalty
        logits[seen] = np.where(scores < 0, scores * penalty, scores / penalty)


def candidates(logits: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """Ids that may be drawn and their weights (not normalised), for a temperature above 0."""
    ids: Ids = np.arange(logits.shape[0])
    if 0 < params.top_k < logits.shape[0]:
        # Ties with the k-th stay in, as in transformers.
        smallest = np.partition(logits, -params.top_k)[-params.top_k]
        ids = np.flatnonzero(logits >= smallest)
        logits = logits[ids]
    scaled = (logits - logits.max()) / logits.dtype.type(params.temperature)
    weights: Floats = np.exp(scaled)
    if params.top_p < 1.0:
        keep = _top_p(weights, params.top_p)
        ids, weights = ids[keep], weights[keep]
    if params.min_p > 0.0:
        keep = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _top_p(weights: Floats, top_p: float) -> Ids:
    """Indices of the fewest heaviest entries that hold `top_p` of the weight, heaviest first.

    Sorts only as many as it takes: few of 262,144 in most steps.
    """
    total = weights.sum(dtype=np.float64)
    count = _FIRST_GUESS
    while True:
        all_in = count >= len(weights)
        part = np.arange(len(weights)) if all_in else np.argpartition(weights, -count)[-count:]
        order = part[np.argsort(-weights[part], kind="stable")]
        mass = np.cumsum(weights[order], dtype=np.float64) / total
        if all_in or mass[-1] >= top_p:
            # An entry stays while the mass of the heavier ones is below top_p.
            return order[: int(np.searchsorted(mass, top_p, side="left")) + 1]
        count *= 8
