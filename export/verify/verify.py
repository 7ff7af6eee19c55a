"""Measures a bundle against its checkpoint, part by part: files, weights, embeddings, layers, logits, engine.

    texts --> streamed reference --> hidden states, logits --\
    texts --> the bundle's graphs --> hidden states, logits --> divergence --> checks, verdict

At no time is more of the checkpoint in memory than one decoder layer (two while the next is read).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import msgspec
import numpy as np
import torch
from torch import Tensor

from ...runtime.bundle import Bundle, sha256_file
from ...runtime.errors import BundleError
from ...runtime.session import Session
from ...runtime.tokenizer import Tokenizer
from ..plan import LAYER_TABLE, TOKEN_TABLE
from .graphs import Graphs, Rows
from .limits import (
    CLAIM_ABSOLUTE,
    CLAIM_RELATIVE,
    ROW_FACTOR,
    WEIGHT_ERROR,
    Limits,
    limits_for,
)
from .measures import Difference, Divergence
from .reference import Embedded, Reference
from .report import Check, NamedDifference, Verification
from .tensors import SourceWeights
from .texts import Text
from .weights import WeightCheck, check_weights

BLOCK_ROWS = 128  # logits of the reference held at a time
ENGINE_STEPS = 8  # tokens decoded one by one through the runtime
Progress = Callable[[str], None]


def verify(
    bundle: Bundle,
    source: SourceWeights,
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    *,
    model: str,
    threads: int | None = None,
    progress: Progress = lambda _: None,
) -> Verification:
    """All checks, also after one has failed: the others tell where the fault is."""
    clock = _Clock()
    with clock.of("files"):
        checks = [_files(bundle, progress)]
    with clock.of("weights"):
        weights = check_weights(bundle, source, progress)
        checks.append(_weights(weights))
    limits = limits_for(
        [(check.bits, check.relative_error) for check in weights], bundle.manifest.caches.dtype
    )
    with clock.of("reference"):
        reference = Reference(source)
        embedded = reference.embed([text.ids for text in texts])
        layers = _LayerStates(texts, reference.config.num_hidden_layers)
        hidden = reference.run(embedded, layers.keep, progress)
        hidden = [states[list(rows)] for states, rows in zip(hidden, layers.rows, strict=True)]
    with clock.of("bundle"):
        graphs = Graphs(bundle, threads=threads)
        checks += _embeddings(graphs, texts, embedded, {check.name: check for check in weights})
        run = _run_graphs(graphs, texts, reference, hidden, layers, progress)
        del graphs
    source.check_unchanged()
    checks += [run.layer_check(), *_distribution(run.divergence, limits), _by_text(run.divergence, texts)]
    with clock.of("engine"):
        progress("engine")
        shared = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, prefill=None))
        checks.append(_engine("engine", shared, texts, run, limits.engine, threads))
        if bundle.manifest.prefill is not None:
            checks.append(_engine("prefill graph", bundle, texts, run, limits.prefill, threads))
    return Verification(
        bundle=str(bundle.path),
        model=model,
        recipe=bundle.manifest.recipe,
        limits=limits.name,
        texts=len(texts),
        tokens=sum(len(text.ids) for text in texts),
        scored=run.divergence.count,
        checks=checks,
        differences=[_name(d, texts, tokenizer, limits) for d in run.divergence.differences],
        seconds={name: round(seconds, 2) for name, seconds in clock.seconds.items()},
        peak_rss_bytes=_peak_rss_bytes(),
    )


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _files(bundle: Bundle, progress: Progress) -> Check:
    """Every file's SHA-256 against the manifest's."""
    progress("hashing")
    files = bundle.manifest.files
    with ThreadPoolExecutor(2) as pool:
        hashes = dict(zip(files, pool.map(lambda name: sha256_file(bundle.path / name), files), strict=True))
    wrong = [name for name, entry in files.items() if hashes[name] != entry.sha256]
    measured = f"differs: {', '.join(wrong)}" if wrong else f"{len(files)} files as the manifest says"
    return Check("files", measured, "SHA-256 of the manifest", not wrong, {"differing": wrong})


def _weights(checks: Sequence[WeightCheck]) -> Check:
    faults: list[str] = []
    for check in checks:
        claimed = check.claimed or 0.0
        if check.misplaced:
            faults.append(f"{check.name}: {check.misplaced} weights not at the nearest level")
        elif abs(check.relative_error - claimed) > CLAIM_ABSOLUTE + CLAIM_RELATIVE * claimed:
            faults.append(f"{check.name}: error {check.relative_error:.4g}, the manifest says {claimed:.4g}")
        elif check.relative_error > WEIGHT_ERROR[check.bits]:
            faults.append(f"{check.name}: error {check.relative_error:.4g} at {check.bits} bits")
    worst = {
        bits: max((c for c in checks if c.bits == bits), key=lambda c: c.relative_error)
        for bits in WEIGHT_ERROR
        if any(c.bits == bits for c in checks)
    }
    quantized = {bits: check for bits, check in worst.items() if bits != 32} or worst
    measured = ", ".join(f"{check.relative_error:.4f} at {bits} bits" for bits, check in quantized.items())
    if faults:
        measured = faults[0] + (f" and {len(faults) - 1} more" if len(faults) > 1 else "")
    bounds = ", ".join(f"{WEIGHT_ERROR[bits]:g}" for bits in quantized)
    figures = {
        "tensors": [
            {"name": c.name, "bits": c.bits, "relative_error": c.relative_error, "misplaced": c.misplaced}
            for c in checks
        ],
        "faults": faults,
    }
    return Check(
        f"weights, {len(checks)} tensors", measured, f"{bounds}, nearest levels", not faults, figures
    )


def _embeddings(
    graphs: Graphs, texts: Sequence[Text], embedded: Sequence[Embedded], weights: dict[str, WeightCheck]
) -> Iterator[Check]:
    """What embeddings.onnx gives for the texts, against rows of the checkpoint's tables."""
    sums = {"inputs_embeds": np.zeros(2), "per_layer_inputs": np.zeros(2)}
    for text, wanted in zip(texts, embedded, strict=True):
        for name, found in graphs.embed(text.ids).items():
            expected = wanted.tokens if name == "inputs_embeds" else wanted.per_layer
            if expected is None:
                raise BundleError(f"{name}: the bundle has per-layer inputs, the checkpoint has none")
            sums[name] += _squares(torch.from_numpy(found), expected)
    for name, title, table in (
        ("inputs_embeds", "embeddings", TOKEN_TABLE),
        ("per_layer_inputs", "per-layer inputs", LAYER_TABLE),
    ):
        if not sums[name].any():
            continue
        error, stored = _relative(sums[name]), weights[table]
        whole = WEIGHT_ERROR[stored.bits] if stored.claimed is None else stored.claimed
        bound = CLAIM_ABSOLUTE + ROW_FACTOR * whole
        yield Check(title, f"error {error:.4g}", f"{bound:.4g}", error <= bound, {"relative_error": error})


class _LayerStates:
    """The reference's hidden states after each layer, of the rows that predict tokens that count."""

    def __init__(self, texts: Sequence[Text], layers: int) -> None:
        self.rows = [[position - 1 for position in text.scored] for text in texts]
        self.states: list[list[Tensor]] = [[torch.empty(0)] * len(texts) for _ in range(layers)]

    def keep(self, text: int, layer: int, hidden: Tensor) -> None:
        self.states[layer][text] = hidden[self.rows[text]]


@dataclass
class _Run:
    """What came out of the bundle's graphs, summed up."""

    divergence: Divergence
    layer_sums: np.ndarray  # (layers, 2) squared error, squared norm
    last_logits: list[dict[int, np.ndarray]] = field(default_factory=list)  # per text: last rows, by row

    def layer_check(self) -> Check:
        errors = [_relative(sums) for sums in self.layer_sums]
        measured = f"error {errors[0]:.4g} after the first, {errors[-1]:.4g} after the last"
        worst = int(np.argmax(np.diff([0.0, *errors])))
        return Check(
            f"layers, {len(errors)}",
            f"{measured}; grows most in {worst}",
            "",
            None,
            {"relative_errors": errors},
        )


def _run_graphs(
    graphs: Graphs,
    texts: Sequence[Text],
    reference: Reference,
    hidden: Sequence[Tensor],
    layers: _LayerStates,
    progress: Progress,
) -> _Run:
    run = _Run(Divergence(), np.zeros((len(layers.states), 2)))
    block = _Block(reference, run.divergence)
    for number, text in enumerate(texts):
        progress(f"bundle, text {number + 1} of {len(texts)}")
        place = {row: index for index, row in enumerate(layers.rows[number])}
        run.last_logits.append({})
        for rows in graphs.run(text.ids):
            chosen = [row for row in range(len(rows.logits)) if rows.start + row in place]
            for row in chosen:
                target = rows.start + row + 1
                block.add(
                    hidden[number][place[target - 1]], rows.logits[row], (number, target, text.ids[target])
                )
            if chosen:
                at = [place[rows.start + row] for row in chosen]
                for layer, found in enumerate(rows.layers):
                    run.layer_sums[layer] += _squares(
                        torch.from_numpy(found[chosen]), layers.states[layer][number][at]
                    )
            _keep_last(run.last_logits[number], rows, len(text.ids))
    block.flush()
    return run


def _keep_last(kept: dict[int, np.ndarray], rows: Rows, length: int) -> None:
    for row in range(max(rows.start, length - ENGINE_STEPS), rows.start + len(rows.logits)):
        kept[row] = rows.logits[row - rows.start].copy()


class _Block:
    """Collects rows until the reference's logits for them are worth a pass over its head."""

    def __init__(self, reference: Reference, divergence: Divergence) -> None:
        self._reference, self._divergence = reference, divergence
        self._hidden: list[Tensor] = []
        self._logits: list[np.ndarray] = []
        self._places: list[tuple[int, int, int]] = []

    def add(self, hidden: Tensor, logits: np.ndarray, place: tuple[int, int, int]) -> None:
        self._hidden.append(hidden)
        self._logits.append(logits.copy())
        self._places.append(place)
        if len(self._places) == BLOCK_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._places:
            reference = self._reference.logits(torch.stack(self._hidden))
            self._divergence.add(reference, torch.from_numpy(np.stack(self._logits)), self._places)
        self._hidden, self._logits, self._places = [], [], []


def _distribution(divergence: Divergence, limits: Limits) -> Iterator[Check]:
    """Logits, KL divergence, most likely token, perplexity."""
    error = divergence.logit_error
    yield Check("logits", f"error {error:.4g} of their spread", "", None, {"relative_error": error})
    mean, high, most = divergence.kl_mean, divergence.kl_quantile(0.99), divergence.kl_quantile(1.0)
    yield Check(
        "KL divergence",
        f"mean {mean:.3g}, 99 % {high:.3g}, most {most:.3g} nats",
        f"mean {limits.kl_mean:g}",
        mean <= limits.kl_mean,
        {"mean": mean, "quantile_99": high, "most": most},
    )
    count, different = divergence.count, divergence.differences
    ties = sum(difference.is_near_tie(limits.near_tie) for difference in different)
    others = len(different) - ties
    agreement, share = 1 - len(different) / count, others / count
    yield Check(
        "most likely token",
        f"{agreement:.2%} equal, {ties} near-ties, {others} others ({share:.2%})",
        f"others {limits.disagreement:.1%}, near-tie {limits.near_tie:g} nats",
        share <= limits.disagreement,
        {"agreement": agreement, "near_ties": ties, "others": others},
    )
    before, after = divergence.perplexities
    change = after / before - 1
    yield Check(
        "perplexity",
        f"{before:.4g} → {after:.4g} ({change:+.2%})",
        f"{limits.perplexity:+.2%}",
        change <= limits.perplexity,
        {"reference": before, "bundle": after},
    )


def _by_text(divergence: Divergence, texts: Sequence[Text]) -> Check:
    """Which text is to blame: a model is least sure of texts that are unlike what it has learned from."""
    figures = divergence.by_text()
    worst = max(figures, key=lambda one: one.kl_mean)
    measured = (
        f"worst {texts[worst.text].name}: KL {worst.kl_mean:.3g}, perplexity {worst.reference_perplexity:.4g}"
    )
    return Check(
        "texts",
        measured,
        "",
        None,
        {"texts": [asdict(one) | {"name": texts[one.text].name} for one in figures]},
    )


def _engine(
    name: str, bundle: Bundle, texts: Sequence[Text], run: _Run, bound: float, threads: int | None
) -> Check:
    """The runtime's own session, prompt in chunks and then token by token, against the graphs run above."""
    if bundle.manifest.runtime.execution_provider != "cpu":
        return Check(name, "not run: the bundle is for CUDA", "", None)
    number = max(range(len(texts)), key=lambda index: len(texts[index].ids))
    ids, kept = np.array(texts[number].ids, np.int64), run.last_logits[number]
    session = Session(bundle, threads=threads)
    first = len(ids) - min(ENGINE_STEPS, len(ids) - 1)
    for start in range(0, first, session.chunk):
        end = min(start + session.chunk, first)
        session.prefill(ids[start:end], start, last=end == first)
    sums = np.zeros(2)
    for position in range(first, len(ids)):
        session.step(int(ids[position]), position)
        wanted = kept[position]
        sums += _squares(
            torch.from_numpy(session.logits), torch.from_numpy(wanted - wanted.mean()), shift=wanted.mean()
        )
    error = _relative(sums)
    return Check(
        name,
        f"{first} tokens in chunks, {len(ids) - first} one by one: logits within {error:.2g}",
        f"{bound:g}",
        error <= bound,
        {"relative_error": error},
    )


def _squares(found: Tensor, wanted: Tensor, shift: float = 0.0) -> np.ndarray:
    """[|found - wanted|^2, |wanted|^2]; shift: added to `wanted` for the difference only."""
    difference = (found - shift - wanted).square().sum(dtype=torch.float64)
    return np.array([float(difference), float(wanted.square().sum(dtype=torch.float64))])


def _relative(sums: np.ndarray) -> float:
    return float(np.sqrt(sums[0] / sums[1])) if sums[1] else float(np.inf if sums[0] else 0.0)


def _name(
    difference: Difference, texts: Sequence[Text], tokenizer: Tokenizer, limits: Limits
) -> NamedDifference:
    return NamedDifference(
        text=texts[difference.text].name,
        position=difference.position,
        reference=tokenizer.piece(difference.reference),
        bundle=tokenizer.piece(difference.bundle),
        gap=difference.gap,
        near_tie=difference.is_near_tie(limits.near_tie),
    )


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
