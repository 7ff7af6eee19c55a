"""Scales of int8 caches from what the model keeps in them on a few texts; none exceeds the bound before.

The bundle is written with scales that nothing can exceed (`modules/values.py`). Here it runs, on the machine
that exports, and each channel's scale shrinks to what was seen and half as much again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..runtime.bundle import Bundle, open_bundle
from ..runtime.session import Session
from ..runtime.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

HEADROOM = 1.5  # 1.2 is a little better where it suffices, 1.0 clips and is worse than no calibration
LEAST = 1 / 16  # of the scale before: a channel that slept may wake
MOST_TOKENS = 192  # of a text
LEVELS = 127
GRAPHS = ("decoder.onnx", "prefill.onnx", "text.onnx", "drafter.onnx")  # and the decoder's parts
TEXTS = (
    "A greenhouse is a building whose walls and roof are made chiefly of transparent material, in "
    "which plants that need regulated climatic conditions are grown. On cold days the vents stay "
    "closed; at noon they open.",
    "Please summarize: 'bench-2/air_temperature' (air temperature, °C): 72 readings, min 17.4, max "
    "33.6, mean 24.1, last 30.2, rising 1.8/h, limit at most 30; 'tank/level' (%): 72 readings, "
    "min 8.9, max 61, falling.",
    '{"title": "Night shift", "urgency": "normal", "findings": [{"sensor": "hall/door", "value": -3.5e2}]}',
    "def mean(values: list[float]) -> float:\n    if not values:\n        raise "
    "ValueError('empty')\n    return sum(values) / len(values)\n\n\nfor row in rows:\n    "
    "print(f\"{row['name']}: {mean(row['x']):.2f}\")\n",
    "Turn on the light in the kitchen, set the heating to 21 degrees and tell me when the washing "
    "machine is done. What's the weather like tomorrow? Thanks! Is it 18:45 already?",
    "Die Heizung im Flur ist seit gestern aus. Le réservoir d'eau est presque vide. La puerta está "
    "abierta. Температура в теплице 24 градуса. "
    "温室の湿度は六十パーセントです。 온도가 너무 높습니다. درجة الحرارة مرتفعة.",
    "1 2 3 5 8 13 21 34 55 89 144 — 3.14159, 2.71828; 50 %, $19.99, +49 30 1234567, "
    "https://example.org/a?b=c#d\n\n- one\n- two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
)


def calibrate(folder: Path) -> list[str]:
    """Shrink the scales of the bundle in `folder`; the names of the files that changed."""
    bundle = open_bundle(folder)
    shrink = {name: np.clip(seen * HEADROOM / LEVELS, LEAST, 1.0) for name, seen in _levels(bundle).items()}
    names = [*GRAPHS, *(part.file for part in bundle.manifest.decoder_parts)]
    changed = [name for name in names if (folder / name).is_file()]
    for name in changed:
        _rescale(folder / name, shrink)
    least, most = min(map(np.min, shrink.values())), max(map(np.max, shrink.values()))
    log.info("int8 caches: scales are %.2f to %.2f of what nothing exceeds", least, most)
    return changed


def _levels(bundle: Bundle) -> dict[str, np.ndarray]:
    """Buffer name -> the largest level in each channel, (1, kv_heads, 1, head_dim)."""
    session, tokenizer = Session(bundle), load_tokenizer(bundle)
    context = bundle.manifest.caches.context
    most: dict[str, np.ndarray] = {}
    for text in TEXTS:
        ids = [bundle.manifest.tokens.bos, *tokenizer.encode(text, allow_special=False)]
        for length in _run(session, ids[: min(MOST_TOKENS, context)]):
            for name, rows in session.caches.copy(length).items():  # (kv_heads, rows, head_dim)
                seen = np.abs(rows.astype(np.int16)).max(axis=1)[None, :, None, :].astype(np.float32)
                most[name] = np.maximum(most[name], seen) if name in most else seen
    for name in most:
        if name.endswith(".key"):  # rotation mixes a channel with the one half a head further
            first, second = np.split(most[name], 2, axis=-1)
            most[name] = np.concatenate([np.maximum(first, second)] * 2, axis=-1)
    return most


def _run(session: Session, ids: list[int]) -> Iterator[int]:
    """How many tokens have been run, after each chunk."""
    for start in range(0, len(ids), session.chunk):
        chunk = np.array(ids[start : start + session.chunk], np.int64)
        session.prefill(chunk, start, last=start + len(chunk) == len(ids))
        yield start + len(chunk)


def _rescale(path: Path, shrink: dict[str, np.ndarray]) -> None:
    model = ir.load(path)
    for name, factor in shrink.items():
        index, part = name.split(".")
        value = model.graph.initializers.get(f"constants.{part}_scale_{index}")
        if value is not None and value.const_value is not None:
            scales = value.const_value.numpy() * factor
            value.const_value = ir.tensor(scales.astype(np.float32), name=value.name)
    ir.save(model, path)
