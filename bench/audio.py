"""Speed of the audio encoder: real-time factor by chunk, of whole clips and of the log-mel, and its memory.

python bench/audio.py [--bundle DIR] [--recipe int4] [--threads 2] [--repeats 15]

Without --bundle a full-size one is made first: E2B's audio encoder with made-up weights beside a one-layer
text model (0.6 GB of checkpoint and 0.3 GB of bundle in the temporary folder, removed afterwards). A
real-time factor of 0.1 is a second of sound in a tenth of a second. Figures are medians over repeats.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, median, print_json, print_machine

from gemma_edge.runtime.audio.encoder import AudioEncoder
from gemma_edge.runtime.bundle import open_bundle
from gemma_edge.runtime.stats import memory_use

ROOT = Path(__file__).resolve().parents[1]
CHUNKS = (1, 2, 4, 8, 12, 24, 48)  # soft tokens
RATE = 16_000  # Hz
CLIP_S = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    if args.bundle:
        result = measure(args.bundle, args.threads, args.repeats)
    else:
        with tempfile.TemporaryDirectory() as work:
            result = measure(make_full_size(Path(work), args.recipe), args.threads, args.repeats)
    print_json({"bench": "audio", **result, "machine": about})


def measure(folder: Path, threads: int, repeats: int) -> dict[str, Any]:
    bundle = open_bundle(folder)
    before = memory_use()
    start = time.perf_counter()
    encoder = AudioEncoder(bundle, threads=threads)
    load_s = time.perf_counter() - start
    audio = encoder.audio
    print(f"{bundle.name}: recipe {bundle.manifest.recipe}, {threads} threads, loaded in {load_s:.2f} s")
    sound = (np.random.default_rng(0).standard_normal(CLIP_S * RATE) * 0.1).astype(np.float32)
    rows = [chunk_row(encoder, sound, chunk, repeats) for chunk in CHUNKS]
    tails = [tail_s(encoder, sound, audio.chunk_tokens, seed) for seed in range(repeats)]
    whole_s = median([timed(lambda: encoder.encode(sound, RATE)) for _ in range(3)])
    mel_s = median([timed(lambda: encoder.log_mel.whole(sound)) for _ in range(3)])
    after = memory_use()
    print(
        f"whole clip of {CLIP_S} s: {whole_s:.2f} s (real-time factor {whole_s / CLIP_S:.3f}), "
        f"of it log-mel {mel_s:.3f} s; from the last sample of a stream to its last soft token: "
        f"median {median(tails) * 1e3:.0f} ms, longest {max(tails) * 1e3:.0f} ms"
    )
    grown = {name: getattr(after, name) - getattr(before, name) for name in ("rss_bytes", "anonymous_bytes")}
    predicted = bundle.manifest.memory.audio_bytes
    print(
        f"memory of the encoder: {grown['rss_bytes'] >> 20} MiB resident, "
        f"{grown['anonymous_bytes'] >> 20} MiB anonymous, the manifest predicts {predicted >> 20} MiB"
    )
    return {
        "bundle": bundle.name,
        "recipe": bundle.manifest.recipe,
        "threads": threads,
        "load_s": round(load_s, 3),
        "rows": rows,
        "clip_s": CLIP_S,
        "whole_s": round(whole_s, 3),
        "mel_s": round(mel_s, 4),
        "tail_median_s": round(median(tails), 4),
        "tail_max_s": round(max(tails), 4),
        **grown,
        "predicted_bytes": predicted,
    }


def chunk_row(encoder: AudioEncoder, sound: np.ndarray, tokens: int, repeats: int) -> dict[str, Any]:
    """One chunk of the stream in its steady state."""
    audio = encoder.audio
    samples = round(tokens / audio.tokens_per_s * RATE)
    stream = encoder.stream(RATE, chunk_tokens=tokens, max_tokens=10**6)
    stream.push(sound[:8000])
    times: list[float] = []
    cpu_times: list[float] = []
    for index in range(repeats + 2):
        start = index * samples % (len(sound) - samples)
        piece = sound[start : start + samples]
        cpu_start = time.process_time()
        times.append(timed(lambda piece=piece: stream.push(piece)))
        cpu_times.append(time.process_time() - cpu_start)
    chunk_s, best_s, cpu_s = median(times[2:]), min(times[2:]), median(cpu_times[2:])
    row = {
        "chunk_tokens": tokens,
        "chunk_ms": round(chunk_s * 1e3, 1),
        "best_ms": round(best_s * 1e3, 1),
        "cpu_ms": round(cpu_s * 1e3, 1),  # of all threads: what other processes take away is not in it
        "real_time_factor": round(chunk_s / (samples / RATE), 3),
    }
    print(
        f"chunk of {tokens} soft tokens ({samples / RATE * 1e3:.0f} ms of sound): {row['chunk_ms']} ms, "
        f"best {row['best_ms']}, {row['cpu_ms']} ms of CPU, "
        f"real-time factor {row['real_time_factor']}"
    )
    return row


def tail_s(encoder: AudioEncoder, sound: np.ndarray, chunk_tokens: int, seed: int) -> float:
    """From the last sample of a clip of 2 to 3 s, pushed in pieces of 20 ms, to its last soft token."""
    stream = encoder.stream(RATE, chunk_tokens=chunk_tokens)
    samples = int(np.random.default_rng(seed).integers(2 * RATE, 3 * RATE))
    pieces = np.split(sound[:samples], range(320, samples, 320))
    for piece in pieces[:-1]:
        stream.push(piece)
    return timed(lambda: (stream.push(pieces[-1]), stream.finish()))


def timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def make_full_size(work: Path, recipe: str) -> Path:
    """A bundle with E2B's audio encoder; see the top."""
    from gemma_edge.export.bundle import Job, prepare, write_bundle
    from gemma_edge.export.recipes import load_recipe
    from gemma_edge.export.source import find_checkpoint
    from gemma_edge.runtime.profile import load_profile

    folder = work / "E2B-audio"
    folder.mkdir()
    write_checkpoint(folder)
    print(f"exporting a full-size encoder with recipe {recipe} ...")
    job = Job(
        find_checkpoint(str(folder)),
        load_profile("x86-64-generic"),
        load_recipe(recipe),
        1024,
        work / "bundle",
    )
    write_bundle(prepare(job))
    shutil.rmtree(folder)
    return work / "bundle"


def write_checkpoint(folder: Path) -> None:
    """Matrices of normal noise that keep activations near 1, norms of 1, bounds at three deviations."""
    from gemma_edge.export.audio_geometry import parse_audio_model
    from gemma_edge.export.geometry import parse_text_model
    from gemma_edge.export.plan import make_plan
    from gemma_edge.export.recipes import load_recipe
    from gemma_edge.runtime.profile import load_profile

    nano = json.loads((ROOT / "models" / "nano" / "config.json").read_text())
    text = nano.get("text_config", nano) | dict(
        hidden_size=1536, num_hidden_layers=1, layer_types=["full_attention"], num_kv_shared_layers=0
    )
    text.pop("per_layer_config", None)
    tokens = dict(audio_token_id=5, boa_token_id=6, eoa_token_id=7)
    config = dict(
        model_type="gemma4", text_config=text, audio_config=dict(model_type="gemma4_audio"), **tokens
    )
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "models" / "nano" / name, folder / name)
    model = parse_text_model(config, "config.json")
    audio = parse_audio_model(config, "config.json", text_hidden_size=1536)
    profile = load_profile("jetson-agx-orin-64gb")
    shapes = make_plan(model, profile, load_recipe("fp32"), context=1024, audio=audio).shapes
    random = np.random.default_rng(0)
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[_hub_name(name)] = dict(dtype="BF16", shape=shape, data_offsets=[offset, offset + size])
        offset += size
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            values = _made_up(name, shape, random)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


def _hub_name(name: str) -> str:
    is_audio = name.startswith(("audio_tower.", "embed_audio."))
    return f"model.{name}" if is_audio else f"model.language_model.{name}"


def _made_up(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    if name.endswith(("_min", "_max")):
        return np.full(shape, -3 if name.endswith("_min") else 3, np.float32)
    if len(shape) < 2:
        return np.ones(shape, np.float32)
    width = math.prod(shape[1:])
    return (random.standard_normal(shape, np.float32) * width**-0.5).astype(np.float32)


if __name__ == "__main__":
    main()
