"""What a bundle may differ by, as data: one row for each class of recipe, and the class of a bundle.

The figures and where they come from are in docs/verify.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...runtime.bundle import KvDtype

PREFILL_BITS = 7  # of the prefill graph's weights: levels -63 … 63, one scale for a whole row

# |W - Wq| / |W| of one tensor by its bits. Heavy tails, rounded to nearest in blocks of 128: 0.19 and 0.011.
WEIGHT_ERROR = {32: 0.0, 16: 5e-4, 8: 0.025, PREFILL_BITS: 0.1, 4: 0.25, 2: 0.7}
# How far an error may be from what the manifest says: float32 sums in another order.
CLAIM_RELATIVE, CLAIM_ABSOLUTE = 1e-3, 1e-6
# Rows of a table that a text happens to use may be worse than the whole table.
ROW_FACTOR = 2.0


@dataclass(frozen=True)
class Limits:
    """Bounds of one class."""

    name: str
    kl_mean: float  # nats
    near_tie: float  # nats: a gap up to this between two tokens is noise of this class, whichever comes first
    disagreement: float  # share of tokens where another one is most likely, near-ties apart
    perplexity: float  # share by which it may rise
    # The engine's own path against the graphs run for measuring, relative to the spread of the logits. Where
    # activations are rounded to 8 bits, a sum's last bit decides between two levels: the paths differ by as
    # much as that rounding does.
    engine: float
    # The same with prompts on the prefill graph. Its weights have 7 bits: it differs from the decoder graph
    # about as much as that one from the checkpoint.
    prefill: float


FLOAT = Limits(
    "float", kl_mean=1e-6, near_tie=1e-3, disagreement=0.0, perplexity=1e-4, engine=1e-4, prefill=0.1
)
HALF = Limits(
    "16-bit", kl_mean=1e-3, near_tie=0.1, disagreement=0.002, perplexity=0.005, engine=0.01, prefill=0.1
)
EIGHT = Limits(
    "8-bit", kl_mean=0.01, near_tie=0.25, disagreement=0.005, perplexity=0.02, engine=0.1, prefill=0.1
)
FOUR = Limits("4-bit", kl_mean=0.2, near_tie=0.5, disagreement=0.08, perplexity=0.10, engine=0.1, prefill=0.4)
TWO = Limits("2-bit", kl_mean=0.5, near_tie=1.0, disagreement=0.15, perplexity=0.5, engine=0.1, prefill=0.8)


def limits_for(weights: Iterable[tuple[int, float]], caches: KvDtype) -> Limits:
    """The class of a bundle: that of its coarsest weights or caches.

    weights: bits and measured error of each. Quantized weights that equal the checkpoint's add no error of
    their own; what is left is that products take 8-bit activations.
    """
    bits = {"float32": 32, "float16": 16, "int8": 8}[caches]
    for stored, error in weights:
        if stored == PREFILL_BITS:  # not in the graph that is measured
            continue
        bits = min(bits, stored if error or stored >= 16 else 8)
    return {32: FLOAT, 16: HALF, 8: EIGHT, 4: FOUR, 2: TWO}[bits]
