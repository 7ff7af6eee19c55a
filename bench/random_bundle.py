"""A bundle of random weights without a checkpoint: a skeleton made by export, filled with numpy alone.

    python bench/random_bundle.py make --model e2b --device jetson --recipe int4 --context 4096 SKELETON
    python bench/random_bundle.py fill SKELETON BUNDLE

A skeleton is some megabytes: graphs, manifest, constants, and where which bytes go. It can be carried to a
machine without torch and filled there in seconds. The engine runs the bundle; it has no tokenizer. The table
of per-layer inputs is a hole in its file (zeros): a row of it is gathered like any other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

REGIONS = "regions.json"
CONSTANTS = "constants.bin"
TILE_BYTES = 32 << 20  # random bytes, repeated
LEVEL_DEVIATION = {2: 1.12, 4: 4.61, 8: 73.9}  # of uniform levels


def make(
    out: Path, model_name: str, device: str, recipe_name: str, context: int, fused: bool, block: int
) -> None:
    import msgspec
    import onnx_ir as ir

    from gemma_edge.export import genai
    from gemma_edge.export.attach import attach
    from gemma_edge.export.decode_step import write_decode_step
    from gemma_edge.export.fused import fused_layers
    from gemma_edge.export.parts import write_parts
    from gemma_edge.export.pickers import write_pickers
    from gemma_edge.export.plan import DECODER_DATA, EMBEDDINGS_DATA, HEAD, TOKEN_TABLE, inner_type, make_plan
    from gemma_edge.export.recipes import load_recipe
    from gemma_edge.export.sizes import model_of
    from gemma_edge.export.store import DataFile, StoredWeight, reserve
    from gemma_edge.export.trace import trace_cuda_decoder, trace_decoder, trace_embeddings
    from gemma_edge.runtime import genai_files
    from gemma_edge.runtime.bundle import Tokens
    from gemma_edge.runtime.profile import load_profile

    profile, recipe, model = load_profile(device), load_recipe(recipe_name), model_of(model_name)
    if block:
        profile = msgspec.structs.replace(profile, block_sizes=dict.fromkeys(profile.block_sizes, block))
    plan = make_plan(model, profile, recipe, context=context)
    together = fused_layers(plan.weights, recipe) if fused else frozenset()
    out.mkdir(parents=True)
    regions: list[dict[str, Any]] = []
    constants = (out / CONSTANTS).open("wb")

    class Recorded(DataFile):
        """Notes what would be written; keeps constants."""

        def write(self, offset: int, values: np.ndarray) -> None:
            data = np.ascontiguousarray(values).tobytes()
            regions.append(
                dict(file=self.path.name, offset=offset, size=len(data), kind="constant", at=constants.tell())
            )
            constants.write(data)

    class Checkpoint:
        """Norms of ones; layers that shrink what passes, as random weights need."""

        tensors: ClassVar[dict[str, Any]] = {}

        def read(self, name: str) -> np.ndarray:
            value = 0.7 if name.endswith("layer_scalar") else 1.0
            return np.full(plan.small[name], value, np.float32)

    files = {name: Recorded(out / name) for name in (DECODER_DATA, EMBEDDINGS_DATA)}
    stored, places = {}, reserve(files, plan.weights)
    for weight in plan.weights:
        place = places[weight.name]
        stored[weight.name] = StoredWeight(weight, place.file, place.data_offset, place.scale_offset, None)
        hole = weight.is_table and weight.name not in (TOKEN_TABLE, HEAD)
        if hole:
            continue
        deviation = (
            (3.0 if weight.name in (TOKEN_TABLE, HEAD) else 1.0) / weight.shape[1] ** 0.5 * weight.gain
        )
        kind = f"float{weight.storage.bits}" if weight.storage.is_float else "levels"
        regions.append(
            dict(
                file=weight.file, offset=place.data_offset, size=weight.data_bytes, kind=kind, value=deviation
            )
        )
        if place.scale_offset is not None:
            scale = deviation / LEVEL_DEVIATION[weight.storage.bits]
            regions.append(
                dict(
                    file=weight.file,
                    offset=place.scale_offset,
                    size=weight.scale_bytes,
                    kind=f"scales {weight.inner}",
                    value=scale,
                )
            )
    graphs = {
        "embeddings.onnx": trace_embeddings(model),
        "decoder.onnx": trace_decoder(model, plan.caches, inner_type(profile)),
    }
    if profile.execution_provider == "cuda":
        graphs["decoder_cuda.onnx"] = trace_cuda_decoder(model, plan.caches, inner_type(profile), together)
        write_pickers(out, model.geometry.vocab_size)
    for name, traced in graphs.items():
        graph = attach(traced, stored, Checkpoint(), files[DECODER_DATA], head=plan.head, recipe=recipe)  # type: ignore[arg-type]
        ir.save(graph, out / name)
        if name == "decoder_cuda.onnx":
            write_decode_step(out, model, graph, Checkpoint(), plan.head)  # type: ignore[arg-type]
    constants.close()
    parts = write_parts(out, model) if profile.execution_provider == "cpu" else ()
    genai.write_text_graph(out / "embeddings.onnx", out / "decoder.onnx", out / genai_files.TEXT)
    genai.write_genai_config(out / genai_files.CONFIG, model, plan.caches, Tokens(bos=2, pad=0, eos=(1,)))
    sizes = {name: file._end for name, file in files.items()}
    manifest = _manifest(model, profile, recipe, plan) | dict(decoder_parts=msgspec.to_builtins(parts))
    (out / REGIONS).write_text(json.dumps(dict(sizes=sizes, regions=regions, manifest=manifest)))
    total = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {total / 1e6:.1f} MB, to be filled to {sum(sizes.values()) / 1e9:.2f} GB")


def _manifest(model: Any, profile: Any, recipe: Any, plan: Any) -> dict[str, Any]:
    import msgspec

    from gemma_edge.runtime.bundle import FORMAT_VERSION

    return dict(
        format_version=FORMAT_VERSION,
        created="random weights",
        source=dict(model="random", revision=None, config_sha256="", dtype="bfloat16"),
        device=profile.name,
        recipe=recipe.name,
        geometry=msgspec.to_builtins(model.geometry),
        caches=msgspec.to_builtins(plan.caches),
        tokens=dict(bos=2, pad=0, eos=[1]),
        runtime=dict(
            execution_provider=profile.execution_provider,
            threads=profile.cpu.threads,
            prefill_chunk=profile.prefill_chunk,
            memory_budget_mib=profile.memory.budget_mib,
        ),
        quantization=[],
        memory=msgspec.to_builtins(plan.memory),
        files={},
        versions={},
    )


def fill(skeleton: Path, out: Path) -> None:
    """Needs numpy alone."""
    start = time.perf_counter()
    out.mkdir(parents=True)
    described = json.loads((skeleton / REGIONS).read_text())
    for path in skeleton.iterdir():
        if path.name not in (REGIONS, CONSTANTS):
            shutil.copyfile(path, out / path.name)
    random = np.random.default_rng(0)
    tile = random.integers(0, 256, TILE_BYTES, np.uint8)
    normal = random.standard_normal(TILE_BYTES // 4, np.float32)
    with (skeleton / CONSTANTS).open("rb") as constants:
        for name, size in described["sizes"].items():
            with (out / name).open("wb") as file:
                file.truncate(size)
                for region in described["regions"]:
                    if region["file"] == name:
                        file.seek(region["offset"])
                        _write(file, region, constants, tile, normal)
    (out / "manifest.json").write_text(json.dumps(described["manifest"]))
    print(f"{out}: filled in {time.perf_counter() - start:.1f} s")


def _write(file: Any, region: dict[str, Any], constants: Any, tile: np.ndarray, normal: np.ndarray) -> None:
    size, kind = region["size"], region["kind"]
    if kind == "constant":
        constants.seek(region["at"])
        file.write(constants.read(size))
        return
    if kind == "levels":
        block = tile
    elif kind.startswith("scales "):
        dtype = np.dtype(kind.removeprefix("scales "))
        block = (region["value"] * (1 + 0.2 * np.tanh(normal[: 1 << 18]))).astype(dtype).view(np.uint8)
    else:
        block = (region["value"] * normal).astype(kind).view(np.uint8)
    data = memoryview(block)
    while size > 0:
        file.write(data[:size])
        size -= len(data)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("--model", default="e2b", help="e2b, e4b or a config.json")
    making.add_argument("--device", default="jetson-orin-nano-8gb")
    making.add_argument("--recipe", default="int4")
    making.add_argument("--context", type=int, default=4096)
    making.add_argument("--block", type=int, default=0, help="values that share a scale; 0: the profile's")
    making.add_argument("--apart", action="store_true", help="queries, keys and values as three products")
    making.add_argument("out", type=Path)
    filling = commands.add_parser("fill")
    filling.add_argument("skeleton", type=Path)
    filling.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        make(args.out, args.model, args.device, args.recipe, args.context, not args.apart, args.block)
    else:
        fill(args.skeleton, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
