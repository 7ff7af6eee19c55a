"""Runs products, text and sound on whatever machine this is, with the installed wheel; knows no expectations.

    python arm64_probe.py PLAN.json OUT.npz

Needs what a device has: gemma_edge.runtime, onnxruntime, onnxruntime-genai, numpy. Where the answers are
compared: test_arm64.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.engine import Engine
from gemma_edge.runtime.genai_engine import GenaiEngine
from gemma_edge.runtime.prompt import Part, Soft
from gemma_edge.runtime.sounds import open_ears
from gemma_edge.runtime.tokenizer import load_tokenizer

Arrays = dict[str, np.ndarray]


def main(plan: dict, out: Path) -> None:
    """plan: `products` (a folder), `texts`, `sounds`, `genai` (name -> what to run); each may be left out."""
    found: Arrays = {"machine": np.array(f"{platform.machine()} Python {platform.python_version()}")}
    if "products" in plan:
        found |= run_products(Path(plan["products"]))
    for name, text in plan.get("texts", {}).items():
        found |= {f"{name}/{key}": value for key, value in run_text(**text).items()}
    for name, sound in plan.get("sounds", {}).items():
        found |= {f"{name}/{key}": value for key, value in run_sound(**sound).items()}
    for name, text in plan.get("genai", {}).items():
        found |= {f"{name}/{key}": value for key, value in run_genai(**text).items()}
    np.savez(out, **found)


def run_products(folder: Path) -> Arrays:
    """Each graph of the folder with one row and with all rows of x.npy."""
    x = np.load(folder / "x.npy")  # (rows, inputs)
    found = {}
    for path in sorted(folder.glob("*.onnx")):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        graph = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for rows in (1, len(x)):
            found[f"{path.stem}/{rows}"] = graph.run(None, {"x": x[:rows]})[0]
    return found


def run_text(bundle: str, prompts: Sequence[str], new_tokens: int, prepared: str | None = None) -> Arrays:
    """Greedy answers to chat prompts, one after another on one engine. prepared: packed weights."""
    opened = open_bundle(Path(bundle))
    if prepared is not None:
        opened = dataclasses.replace(opened, prepared=Path(prepared))
    tokenizer = load_tokenizer(opened)
    engine = Engine(opened)
    found: Arrays = {}
    for number, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt)
        found |= {f"{number}/prompt": np.array(ids)} | _answer(engine, [list(ids)], new_tokens, f"{number}/")
    return found


def run_genai(bundle: str, prompts: Sequence[str], new_tokens: int) -> Arrays:
    """As run_text, with onnxruntime-genai, which keeps its logits to itself."""
    opened = open_bundle(Path(bundle))
    tokenizer = load_tokenizer(opened)
    engine = GenaiEngine(opened)
    return {
        f"{number}/ids": np.array(list(engine.generate(tokenizer.encode(prompt), max_new_tokens=new_tokens)))
        for number, prompt in enumerate(prompts)
    }


def run_sound(bundle: str, prompt: str, sound: str, new_tokens: int) -> Arrays:
    """A file's soft tokens, and the greedy answer to a chat prompt with that sound in it."""
    opened = open_bundle(Path(bundle))
    ears = open_ears(opened)
    assert ears is not None
    ids = load_tokenizer(opened).encode(prompt)
    parts = list(ears.parts(ids, [Path(sound).read_bytes()], threading.Event()))
    soft = np.concatenate([part.rows for part in parts if isinstance(part, Soft)])  # (tokens, hidden)
    return {"soft": soft} | _answer(Engine(opened), parts, new_tokens, "")


def _answer(engine: Engine, parts: Sequence[Part], new_tokens: int, name: str) -> Arrays:
    """The ids, and the logits that each was picked from: (tokens,) and (tokens, vocab)."""
    picked = list(_ids_and_logits(engine, parts, new_tokens))
    return {
        f"{name}ids": np.array([token for token, _ in picked]),
        f"{name}logits": np.stack([logits for _, logits in picked]).astype(np.float32),
    }


def _ids_and_logits(engine: Engine, parts: Sequence[Part], most: int) -> Iterator[tuple[int, np.ndarray]]:
    for token in engine.generate_from(parts, max_new_tokens=most):
        yield token, engine._session.logits.copy()  # of the run before: the next has not begun


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
