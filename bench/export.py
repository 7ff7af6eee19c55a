"""Exports a full-size model with made-up weights: time and peak memory, one JSON object on the last line.

    python bench/export.py E2B --recipe int4 --device raspberry-pi-5-8gb

The checkpoint is written first (9.4 GB for E2B, 15 GB for E4B, in --work) and removed afterwards, and so is
the bundle unless --out names a folder for it. Weights are one block of normal noise over and over: they cost
what real ones cost to read and quantize, and mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NOISE_VALUES = 1 << 24
SIZES: dict[str, dict[str, Any]] = {
    "E2B": dict(
        num_hidden_layers=35,
        hidden_size=1536,
        intermediate_size=6144,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        period=5,
    ),
    "E4B": dict(
        num_hidden_layers=42,
        hidden_size=2560,
        intermediate_size=10240,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
        use_double_wide_mlp=False,
        period=6,
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--device", default="x86-64-generic")
    parser.add_argument("--context", type=int)
    parser.add_argument(
        "--work", type=Path, help="where the checkpoint is made (default: the temporary folder)"
    )
    parser.add_argument("--out", type=Path, help="keep the bundle here")
    parser.add_argument("--trace-only", action="store_true", help="trace the decoder and stop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = Path(work) / args.size
        folder.mkdir()
        write_config(folder, args.size)
        if args.trace_only:
            result = trace_only(folder, args)
        else:
            write_weights(folder)
            result = export(folder, args, args.out or Path(work) / "bundle")
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(dict(size=args.size, recipe=args.recipe, device=args.device) | result))
    return 0


def write_config(folder: Path, size: str) -> None:
    fields = dict(SIZES[size])
    period, layers = fields.pop("period"), fields["num_hidden_layers"]
    text = fields | dict(
        model_type="gemma4_text",
        vocab_size=262144,
        vocab_size_per_layer_input=262144,
        hidden_size_per_layer_input=256,
        num_attention_heads=8,
        head_dim=256,
        global_head_dim=512,
        sliding_window=512,
        final_logit_softcapping=30.0,
        layer_types=["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)],
        dtype="bfloat16",
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    (folder / "config.json").write_text(json.dumps(dict(model_type="gemma4", text_config=text)))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(ROOT / "models" / "nano" / name, folder / name)


def write_weights(folder: Path) -> None:
    """model.safetensors in bfloat16 with every tensor the exporter asks for."""
    header, offset = {}, 0
    for name, shape in planned_shapes(folder).items():
        size = 2 * math.prod(shape)
        header[f"model.language_model.{name}"] = dict(
            dtype="BF16", shape=shape, data_offsets=[offset, offset + size]
        )
        offset += size
    text = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(NOISE_VALUES).astype(np.float32)
    block = (noise.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, offset, len(block)):
            file.write(block[: offset - start])


def planned_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from gemma_edge.export.geometry import read_text_model
    from gemma_edge.export.plan import make_plan
    from gemma_edge.export.recipes import load_recipe
    from gemma_edge.runtime.profile import load_profile

    profile = load_profile("jetson-agx-orin-64gb")
    return make_plan(read_text_model(folder), profile, load_recipe("fp32"), context=1024).shapes


def trace_only(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from gemma_edge.export.geometry import plan_caches, read_text_model
    from gemma_edge.export.trace import trace_decoder

    started = time.perf_counter()
    model = read_text_model(folder)
    caches = plan_caches(model, context=args.context or 8192, sliding_slack=0, dtype="float16")
    traced = trace_decoder(model, caches)
    return dict(trace_s=round(time.perf_counter() - started, 1), nodes=len(traced.graph.graph))


def export(folder: Path, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    from gemma_edge.export.bundle import Job, prepare
    from gemma_edge.export.cli import write_with_progress
    from gemma_edge.export.recipes import load_recipe
    from gemma_edge.export.report import report
    from gemma_edge.export.source import find_checkpoint
    from gemma_edge.runtime.profile import load_profile

    started = time.perf_counter()
    source = find_checkpoint(str(folder))
    job = Job(source, load_profile(args.device), load_recipe(args.recipe), args.context, out)
    prepared = prepare(job)
    manifest = write_with_progress(prepared)
    print(report(out, prepared, manifest))
    sizes = {name: entry.size_bytes for name, entry in manifest.files.items()}
    return dict(
        export_s=round(time.perf_counter() - started, 1),
        bundle_bytes=sum(sizes.values()),
        read_per_token_bytes=manifest.memory.read_per_token_bytes,
        weights=prepared.weight_count,
    )


if __name__ == "__main__":
    sys.exit(main())
