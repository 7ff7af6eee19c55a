"""What is checked on a GPU: functions that return figures, and raise AssertionError where something is wrong.

**Tolerance.** Float16 has no single error bound: attention with scale 1 makes small differences large. So
the yardstick is transformers itself: `half_error` is the root mean square by which its float16 logits differ
from its float32 ones, on the same weights and text. A CUDA bundle may differ by `ALLOWED` times that (its
kernels also add halves up in halves), but by at least `FLOOR` of the logits' spread.

Errors are not spread evenly: where attention hesitates between two tokens, a rounding decides. So the largest
logit is judged position by position. It may be another than the reference's only where the reference's leads
by less than `LEAD` times the error that transformers itself has there in float16, the worst of several runs
whose weights are moved by a rounding; and not more often than in those runs, give or take `FLIPS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from gemma_edge.runtime.bundle import DECODE_STEP, open_bundle
from gemma_edge.runtime.cuda_session import CudaSession, CudaSettings, load_libraries
from gemma_edge.runtime.engine import Engine, SamplingParams

from .cases import CASES, folder_name

ALLOWED, FLOOR = 3.0, 0.01
LEAD, FLIPS = 6.0, 0.02
NANO_LOSS = 0.05  # of the answers may be right on the CPU and wrong on the GPU

Figures = dict[str, Any]
Settings = dict[str, bool]

# Whose kernels run a decode step, and how.
FORMS: dict[str, Settings] = {
    "ONNX Runtime's, not captured": dict(own=False, capture=False),
    "ONNX Runtime's": dict(own=False, capture=True),
    "own kernels, not captured": dict(own=True, capture=False),
    "own kernels": dict(own=True, capture=True),
}


@dataclass(frozen=True)
class Place:
    """Where the cases are, and what runs them: "cuda", or "cpu" to try the checks themselves."""

    folder: Path
    device: str = "cuda"

    def session(self, name: str, *, capture: bool = True, own: bool = True, **settings: Any) -> CudaSession:
        """own: a decode step by our own kernels where the bundle describes it."""
        bundle = open_bundle(self.folder / folder_name(name))
        session = CudaSession(
            bundle, settings=CudaSettings(own, capture=capture, device=self.device, **settings)
        )
        described = (self.folder / folder_name(name) / DECODE_STEP).exists() and self.device == "cuda"
        assert session.own_kernels == (own and described)
        return session

    def reference(self, name: str) -> Any:
        return np.load(self.folder / folder_name(name) / "reference.npz")


def parity(place: Place, name: str, **settings: bool) -> Figures:
    """A prompt in ragged chunks, then token by token to the text's end, far past the window."""
    reference = place.reference(name)
    logits = run_text(place.session(name, **settings), reference["ids"], int(reference["chunk"]))
    return compare(logits, reference)


def run_text(session: CudaSession, ids: np.ndarray, chunk: int) -> dict[int, np.ndarray]:
    """Logits by position."""
    found: dict[int, np.ndarray] = {}
    done, half = 0, len(ids) // 2
    for size in (chunk, chunk // 2 + 1, 1, chunk, 3, *[chunk] * (half // chunk)):
        size = min(size, half - done)
        if size > 0:
            done += size
            session.prefill(ids[done - size : done], done - size, last=done == half)
            found[done - 1] = session.logits.copy()
    for position in range(done, len(ids)):
        session.step(int(ids[position]), position)
        found[position] = session.logits.copy()
        if position % 7 == 0:
            assert session.best() == int(session.logits.argmax()), f"greedy differs at {position}"
    return found


def compare(found: Mapping[int, np.ndarray], reference: Any) -> Figures:
    """found: logits by position. reference: what `cases` stores."""
    positions = sorted(found)
    got, want = np.array([found[position] for position in positions]), reference["logits"][positions]
    assert np.isfinite(got).all(), "logits are not finite"
    error = float(np.sqrt(np.mean((got - want) ** 2)))
    spread, half_error = float(want.std()), float(reference["half_error"])
    allowed = max(ALLOWED * half_error, FLOOR * spread)
    sensitivity = np.maximum(reference["half_errors"][positions], FLOOR / LEAD * spread)  # by position
    ordered = np.sort(want, axis=1)
    lead = (ordered[:, -1] - ordered[:, -2]) / sensitivity
    other = got.argmax(1) != want.argmax(1)
    flips_allowed = float(reference["half_flips"]) + FLIPS
    figures = dict(
        error=error,
        allowed=allowed,
        transformers_half_error=half_error,
        worst=float(np.abs(got - want).max()),
        spread=spread,
        same_top=1 - float(other.mean()),
        flips_allowed=flips_allowed,
        clear=float((lead > LEAD).mean()),
        largest_lead_lost=float(lead[other].max(initial=0)),
        positions=len(positions),
    )
    assert error <= allowed, f"error {error:.5f} is above {allowed:.5f}: {figures}"
    clear = lead > LEAD
    assert not (other & clear).any(), f"another largest logit although it leads clearly: {figures}"
    assert other.mean() <= flips_allowed, f"the largest logit is another too often: {figures}"
    return figures


def same_greedy(place: Place, name: str, first: Settings, second: Settings) -> Figures:
    """Greedy decoding in two ways: the same tokens, and how far logits are apart."""
    reference = place.reference(name)
    ids, chunk = reference["ids"], int(reference["chunk"])
    runs = []
    for settings in (first, second):
        session = place.session(name, **settings)
        for start in range(0, 2 * chunk, chunk):
            session.prefill(ids[start : start + chunk], start, last=start > 0)
        tokens, rows = [session.best()], [session.logits.copy()]
        for position in range(2 * chunk, 2 * chunk + 200):
            session.step(tokens[-1], position)
            rows.append(session.logits.copy())
            tokens.append(session.best())
        runs.append((tokens, np.array(rows)))
    (tokens, rows), (others, other_rows) = runs
    same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
    apart = float(np.abs(rows[:same] - other_rows[:same]).max())
    figures = dict(tokens=len(tokens), same=same, worst_difference=apart, spread=float(rows.std()))
    if same < len(tokens):
        lead = float(np.diff(np.sort(rows[same])[-2:])[0])
        figures["lead_where_it_differs"] = lead
        assert lead < 4 * apart, f"tokens differ although the largest logit leads: {figures}"
    return figures


def placement(place: Place, name: str) -> Figures:
    """Every node of the decoder is CUDA's, by the session's own report."""
    session = place.session(name, own=False, config={"session.record_ep_graph_assignment_info": "1"})
    nodes: dict[str, dict[str, int]] = {}
    for subgraph in session.decoder.get_provider_graph_assignment_info():
        for node in subgraph.get_nodes():
            counts = nodes.setdefault(subgraph.ep_name, {})
            counts[node.op_type] = counts.get(node.op_type, 0) + 1
    elsewhere = {provider: ops for provider, ops in nodes.items() if provider != "CUDAExecutionProvider"}
    assert nodes, "the session reports no nodes"
    assert not elsewhere or place.device != "cuda", f"nodes outside CUDA: {elsewhere}"
    return {provider: sum(ops.values()) for provider, ops in nodes.items()} | {"operators": nodes}


def picks(place: Place, name: str) -> Figures:
    """Greedy and top-k on the GPU choose what numpy chooses from the same logits."""
    session = place.session(name)
    reference = place.reference(name)
    session.prefill(reference["ids"][: int(reference["chunk"])], 0, last=True)
    logits = session.logits
    assert session.best() == int(logits.argmax())
    ids, scores = session.top()
    assert np.array_equal(scores, logits[ids]), "scores are not the ids' logits"
    assert scores.min() >= np.sort(logits)[-len(ids)], "not the largest"
    return dict(top=len(ids))


def far(place: Place, name: str, tokens: int = 700) -> Figures:
    """Many steps past the window: stays finite, and does not disturb the next sequence of the session."""
    reference = place.reference(name)
    ids, chunk = reference["ids"], int(reference["chunk"])
    session = place.session(name)
    first = run_text(session, ids, chunk)
    session.prefill(ids[:chunk], 0, last=True)
    token = session.best()
    for position in range(chunk, chunk + tokens):
        session.step(token, position)
        token = session.best()
    assert np.isfinite(session.logits).all()
    again = run_text(session, ids, chunk)
    worst = max(float(np.abs(first[position] - again[position]).max()) for position in first)
    error = compare(again, reference)["error"]
    return dict(steps=tokens, worst_between_runs=worst, error=error)


def sampling(place: Place, name: str) -> Figures:
    """The engine draws the same tokens from the GPU's top logits as from all of them."""
    bundle = open_bundle(place.folder / folder_name(name))
    engine = Engine.__new__(Engine) if place.device != "cuda" else Engine(bundle)
    if place.device != "cuda":
        return dict(skipped="needs the engine's own session")
    prompt = place.reference(name)["ids"][:60].tolist()
    params = SamplingParams(temperature=1.0, top_k=40, top_p=0.95, seed=11)
    engine.eos = frozenset()
    quick = list(engine.generate(prompt, params, max_new_tokens=80))
    engine._session.__class__.picks, kept = None, engine._session.__class__.picks  # type: ignore
    try:
        slow = list(engine.generate(prompt, params, max_new_tokens=80))
    finally:
        engine._session.__class__.picks = kept  # type: ignore
    assert quick == slow, f"{quick} {slow}"
    return dict(tokens=len(quick))


def audio(place: Place) -> Figures:
    """The audio encoder's graph under CUDA gives the CPU's soft tokens."""
    folder = place.folder / "audio"
    reference = np.load(folder / "reference.npz")
    provider = "CUDAExecutionProvider" if place.device == "cuda" else "CPUExecutionProvider"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(folder / "audio_encoder.onnx"), options, providers=[provider])
    soft = session.run(["soft_tokens"], {"input_features": reference["frames"]})[0]
    want = reference["soft_tokens"]
    error = float(np.sqrt(np.mean((soft - want) ** 2)) / want.std())
    assert error < 0.02, f"relative error {error:.4f}"  # TF32 products: 10 bits of mantissa
    return dict(relative_error=error, worst=float(np.abs(soft - want).max()), tokens=soft.shape[1])


def nano(place: Place) -> Figures:
    """The nano model answers as its float32 twin on the CPU does."""
    held = json.loads((place.folder / "nano" / "answers.json").read_text())
    bundle = open_bundle(place.folder / "nano")
    engine = Engine(bundle) if place.device == "cuda" else _on_cpu(bundle, place)
    judges = _judges(held["count"])
    right: dict[str, list[int]] = {}
    same, differing = 0, {}
    for number, item in enumerate(held["answers"]):
        room = min(800, engine.context - len(item["prompt"]))
        answer = list(engine.generate(item["prompt"], SamplingParams(), max_new_tokens=room))
        equal = answer == item["answer"]
        same += equal
        if not equal:
            differing[number] = answer
        judged = item["right"] if equal or judges is None else judges(number, answer)
        counts = right.setdefault(item["task"], [0, 0, 0])
        counts[0] += 1
        counts[1] += item["right"]
        counts[2] += bool(judged) and (equal or judges is not None)
    figures: Figures = dict(answers=len(held["answers"]), same=same, judged_live=judges is not None)
    figures["differing"] = differing
    figures["right"] = {
        task: dict(of=total, cpu=cpu, here=here) for task, (total, cpu, here) in right.items()
    }
    for task, (total, cpu, here) in right.items():
        if judges is not None:
            assert here >= cpu - NANO_LOSS * total - 1, f"{task}: {here} of {total} right, on the CPU {cpu}"
    assert same >= (1 - 3 * NANO_LOSS) * len(held["answers"]), f"only {same} answers are the CPU's"
    return figures


def _judges(count: int) -> Callable[[int, list[int]], bool] | None:
    """Judges of the same prompts, made again: they need transformers. None where it is not installed."""
    try:
        from gemma_edge.examples.nano_model import evaluate
        from gemma_edge.examples.nano_model.corpus import Encoder
    except ImportError:
        return None
    from .cases import NANO

    encoder = Encoder(NANO)
    cases = list(evaluate.cases(encoder, count))
    return lambda number, ids: (
        not cases[number].judge(encoder.tokenizer.decode(ids, skip_special_tokens=False))
    )


def _on_cpu(bundle: Any, place: Place) -> Engine:
    from gemma_edge.runtime import engine as module

    original = module.open_session
    module.open_session = lambda bundle, **_: CudaSession(bundle, settings=CudaSettings(device="cpu"))  # type: ignore
    try:
        return Engine(bundle)
    finally:
        module.open_session = original


def environment(place: Place) -> Figures:
    """onnxruntime, its providers, the GPU."""
    if place.device == "cuda":
        load_libraries()
        assert "CUDAExecutionProvider" in ort.get_available_providers(), ort.get_available_providers()
    return dict(onnxruntime=ort.__version__, providers=ort.get_available_providers())


def all_checks() -> dict[str, Callable[[Place], Figures]]:
    """By name, in order."""
    checks: dict[str, Callable[[Place], Figures]] = {"environment": environment}
    for name in CASES:
        for form, settings in FORMS.items():
            if CASES[name].recipe == "fp16" and settings["own"]:
                continue  # float products are ONNX Runtime's
            checks[f"parity, {form}: {name}"] = lambda place, name=name, settings=settings: parity(
                place, name, **settings
            )
    for name in ("e2b int4", "heads of E2B", "heads of E2B, int4", "heads of E2B, 2 bits"):
        if CASES[name].recipe != "fp16":
            checks[f"own kernels, captured or not: {name}"] = lambda place, name=name: same_greedy(
                place, name, FORMS["own kernels, not captured"], FORMS["own kernels"]
            )
            checks[f"own kernels or ONNX Runtime's: {name}"] = lambda place, name=name: same_greedy(
                place, name, FORMS["ONNX Runtime's, not captured"], FORMS["own kernels"]
            )
        checks[f"ONNX Runtime's, captured or not: {name}"] = lambda place, name=name: same_greedy(
            place, name, FORMS["ONNX Runtime's, not captured"], FORMS["ONNX Runtime's"]
        )
    for name in ("e2b int4", "heads of E2B, int4", "heads of E2B, 2 bits", "no per-layer inputs"):
        checks[f"all nodes on CUDA: {name}"] = lambda place, name=name: placement(place, name)
    for name in ("e2b int4", "heads of E2B, int4"):
        checks[f"greedy and top-k: {name}"] = lambda place, name=name: picks(place, name)
        checks[f"far past the window: {name}"] = lambda place, name=name: far(place, name)
    checks["sampling: e2b int4"] = lambda place: sampling(place, "e2b int4")
    checks["audio encoder"] = audio
    checks["nano"] = nano
    return checks
