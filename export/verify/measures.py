"""How two next-token distributions differ, summed up block by block; knows logits, not their origin."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_EXPONENT = 700.0  # beyond it a perplexity is no number any more


@dataclass(frozen=True)
class Difference:
    """A token whose most likely value is not the same in both."""

    text: int  # number of the text
    position: int  # of the predicted token
    reference: int  # token id
    bundle: int
    gap: float  # of the reference's logits between these two, in nats

    def is_near_tie(self, bound: float) -> bool:
        return self.gap <= bound


@dataclass(frozen=True)
class TextFigures:
    """One text's share."""

    text: int  # number of the text
    scored: int  # tokens
    kl_mean: float
    reference_perplexity: float
    bundle_perplexity: float


@dataclass
class Divergence:
    """Sums over all predicted tokens."""

    texts: list[int] = field(default_factory=list)  # number of each token's text
    kl: list[Tensor] = field(default_factory=list)  # (n,) each, nats
    reference_nll: list[Tensor] = field(default_factory=list)  # (n,) each, of the text's own tokens
    bundle_nll: list[Tensor] = field(default_factory=list)
    squared_error: float = 0.0  # of logits
    squared_spread: float = 0.0  # of the reference's, around each row's mean
    differences: list[Difference] = field(default_factory=list)

    def add(self, reference: Tensor, bundle: Tensor, places: list[tuple[int, int, int]]) -> None:
        """reference, bundle: logits (n, vocab); places: (text, position, token id) of each row's token."""
        self.texts += [text for text, _, _ in places]
        targets = torch.tensor([token for _, _, token in places])[:, None]
        best, chosen = reference.argmax(-1), bundle.argmax(-1)
        # A number added to all logits of a row changes nothing: rows are compared around their means.
        centred = reference - reference.mean(-1, keepdim=True)
        error = bundle - bundle.mean(-1, keepdim=True) - centred
        self.squared_error += float(error.square().sum(dtype=torch.float64))
        self.squared_spread += float(centred.square().sum(dtype=torch.float64))
        wanted, found = reference.log_softmax(-1), bundle.log_softmax(-1)
        self.reference_nll.append(-wanted.gather(-1, targets)[:, 0])
        self.bundle_nll.append(-found.gather(-1, targets)[:, 0])
        # sum p (log p - log q): terms cancel, so they are added in double precision.
        self.kl.append((wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64).clamp_min(0))
        for row in (best != chosen).nonzero()[:, 0].tolist():
            text, position, _ = places[row]
            gap = float(reference[row, best[row]] - reference[row, chosen[row]])
            self.differences.append(Difference(text, position, int(best[row]), int(chosen[row]), gap))

    @property
    def count(self) -> int:
        return sum(len(part) for part in self.kl)

    @property
    def kl_mean(self) -> float:
        return float(torch.cat(self.kl).mean())

    def kl_quantile(self, share: float) -> float:
        return float(torch.cat(self.kl).quantile(share))

    @property
    def logit_error(self) -> float:
        """Root mean square of the difference over the spread of the reference's logits."""
        return math.sqrt(self.squared_error / self.squared_spread) if self.squared_spread else 0.0

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of all texts under the reference and under the bundle."""
        wanted, found = torch.cat(self.reference_nll), torch.cat(self.bundle_nll)
        return _perplexity(wanted), _perplexity(found)

    def by_text(self) -> list[TextFigures]:
        of, kl = torch.tensor(self.texts), torch.cat(self.kl)
        wanted, found = torch.cat(self.reference_nll), torch.cat(self.bundle_nll)
        figures = []
        for text in sorted(set(self.texts)):
            own = of == text
            perplexities = _perplexity(wanted[own]), _perplexity(found[own])
            figures.append(TextFigures(text, int(own.sum()), float(kl[own].mean()), *perplexities))
        return figures


def _perplexity(nll: Tensor) -> float:
    return math.exp(min(float(nll.mean(dtype=torch.float64)), MAX_EXPONENT))
