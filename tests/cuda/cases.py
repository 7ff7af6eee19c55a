"""What the CUDA checks compare with, made without a GPU: bundles for CUDA and the logits they should give.

    python -m tests.cuda.cases FOLDER        # some minutes; needs torch, transformers and export's packages

The folder is a few megabytes and can be carried to the machine with the GPU, which then needs the runtime's
packages only. Logits are transformers' in float32, with the weights that the bundle holds: quantized ones as
they come back. Beside them stands how far transformers itself is off, at each position, when it computes in
float16: that is what float16 costs on this model and text.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from gemma_edge.runtime.bundle import DECODE_STEP, DECODE_STEP_VECTORS

from ..support.shapes import (
    LAST_SOURCE_SLIDING,
    NO_PER_LAYER_INPUTS,
    NOTHING_SHARED_OWN_HEAD,
    VALUES_ARE_KEYS,
)

S, F = "sliding_attention", "full_attention"
JITTERS = 3  # more runs in float16, with weights that are moved by a rounding: how sensitive each position is
NANO = Path(__file__).parents[2] / "models" / "nano"
KEPT = (
    "decoder_cuda.onnx",
    "decoder.onnx.data",
    "embeddings.onnx",
    "greedy.onnx",
    "top.onnx",
    "manifest.json",
    DECODE_STEP,
    DECODE_STEP_VECTORS,
)
AUDIO = ("audio_encoder_stream.onnx", "audio_encoder.onnx.data")
# As E2B's heads are, so that the kernels are those that E2B gets.
HEADS: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    layer_types=[S, F] * 2,
    num_kv_shared_layers=2,
    num_attention_heads=8,
    head_dim=256,
    global_head_dim=512,
    sliding_window=64,
    hidden_size_per_layer_input=64,
)
TWO_BITS = """\
name: two-bits
title: MLPs in 2 bits
extends: int4
rules:
  - {weights: "*.mlp.*", bits: 2, method: nearest}
"""


@dataclass(frozen=True)
class Case:
    """One bundle: a tiny checkpoint, a recipe, a text. chunk: of a prompt."""

    recipe: str = "fp16"
    model: dict[str, Any] = field(default_factory=dict)
    tokens: int = 120
    chunk: int = 16
    context: int = 2048
    product: float = 1.0  # how much larger than usual the MLP's products are
    fused: bool = True  # queries, keys and values in one product


CASES: dict[str, Case] = {
    "e2b": Case(),
    "e2b int8": Case("int8"),
    "e2b int4": Case("int4"),
    "nothing shared, own head": Case(model=NOTHING_SHARED_OWN_HEAD),
    "last source sliding": Case("int4", LAST_SOURCE_SLIDING),
    "no per-layer inputs": Case(model=NO_PER_LAYER_INPUTS),
    "values are keys": Case(model=VALUES_ARE_KEYS),
    "window beyond the text": Case(model=dict(sliding_window=200)),
    "heads of E2B": Case(model=HEADS, tokens=300, chunk=100),
    "heads of E2B, int4": Case("int4", HEADS, tokens=300, chunk=100),
    "heads of E2B, int4, three products": Case("int4", HEADS, tokens=300, chunk=100, fused=False),
    "heads of E2B, 2 bits": Case("two-bits", HEADS, tokens=300, chunk=100),
    "across two bounds": Case("int4", HEADS | dict(seed=3), tokens=1100, chunk=512, context=2048),
    "large activations": Case("int4", HEADS, tokens=150, chunk=100, product=30_000.0),
}


def folder_name(name: str) -> str:
    return name.replace(",", "").replace(" ", "-").lower()


def prepare(out: Path, *, nano_prompts: int = 20) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "two-bits.yaml").write_text(TWO_BITS)
    for name, case in CASES.items():
        folder = out / folder_name(name)
        if not (folder / "reference.npz").exists():
            shutil.rmtree(folder, ignore_errors=True)
            prepare_case(folder, case, out / "two-bits.yaml")
            print(name, flush=True)
    if not (out / "audio" / "reference.npz").exists():
        prepare_audio(out / "audio")
    if not (out / "nano" / "answers.json").exists():
        prepare_nano(out / "nano", nano_prompts)


def prepare_case(folder: Path, case: Case, two_bits: Path) -> None:
    scratch = folder / "scratch"
    recipe = str(two_bits) if case.recipe == "two-bits" else case.recipe
    checkpoint, reference = make_reference(scratch, case, recipe)
    export(checkpoint, scratch / "cuda", recipe, case)
    keep(scratch / "cuda", folder, KEPT)
    np.savez(folder / "reference.npz", **reference)
    shutil.rmtree(scratch)


def make_reference(scratch: Path, case: Case, recipe: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint, and what the checks compare with."""
    import torch
    from transformers import Gemma4ForCausalLM

    from ..support.tiny_checkpoint import write_tiny_checkpoint

    seed = case.model.get("seed", 7)
    overrides = {name: value for name, value in case.model.items() if name != "seed"}
    checkpoint = write_tiny_checkpoint(scratch / "checkpoint", seed=seed, **overrides)
    ids = torch.randint(3, 500, (1, case.tokens), generator=torch.Generator().manual_seed(5))
    stored = as_stored(checkpoint, prepared(checkpoint, scratch / "cuda", recipe, case).plan)

    def logits(dtype: torch.dtype, jitter: int | None = None) -> np.ndarray:
        model = Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
        for name, values in stored.items():
            model.get_parameter(f"model.{name}" if name != "lm_head.weight" else name).data.copy_(values)
        if jitter is not None:
            move(model, jitter)
        with torch.no_grad():
            return model(ids, output_hidden_states=True).logits[0].float().numpy()

    exact = logits(torch.float32)
    halves = [logits(torch.float16)] + [logits(torch.float16, jitter=seed) for seed in range(JITTERS)]
    errors = [np.sqrt(np.mean((half - exact) ** 2, axis=1)) for half in halves]  # (tokens,) each
    flips = [(half.argmax(1) != exact.argmax(1)).mean() for half in halves]
    if case.product != 1:  # the same model, but for what float16 can hold
        enlarge(checkpoint, case.product)
        stored = as_stored(checkpoint, prepared(checkpoint, scratch / "cuda", recipe, case).plan)
        assert not np.isfinite(logits(torch.float16)).all(), "nothing overflows; take a larger product"
        exact = logits(torch.float32)
    return checkpoint, dict(
        ids=ids[0].numpy(),
        logits=exact.astype(np.float32),
        half_error=np.sqrt(np.mean(errors[0] ** 2)),
        half_errors=np.max(errors, axis=0),
        half_flips=max(flips),
        chunk=case.chunk,
    )


def move(model: Any, seed: int) -> None:
    """Move every weight by up to a unit in the last place of a float16."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = 2 * torch.rand(parameter.shape, generator=generator) - 1
        parameter.data.copy_(parameter.data.float() * (1 + 2**-10 * noise))


def as_stored(checkpoint: Path, plan: Any) -> dict[str, Any]:
    """The quantized weights as they come back, by canonical name."""
    import torch

    from gemma_edge.export.checkpoint import open_checkpoint
    from gemma_edge.export.quantize import dequantize_rows, quantize_rows

    source, found = open_checkpoint(checkpoint), {}
    for weight in plan.weights:
        storage = weight.storage
        if not storage.is_float:
            rows = source.read(weight.name)
            packed = quantize_rows(rows, bits=storage.bits, block=storage.block, method=storage.method)
            values = dequantize_rows(packed.packed, packed.scales, bits=storage.bits, width=weight.shape[1])
            found[weight.name] = torch.from_numpy(values)
    return found


def enlarge(checkpoint: Path, factor: float) -> None:
    """Make the first layer's products so much larger; the norm after them gives the same result."""
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("layers.0.mlp.up_proj.weight"):
            tensors[name] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


def prepared(checkpoint: Path, out: Path, recipe: str, case: Case, *, on_cuda: bool = True) -> Any:
    from gemma_edge.export.bundle import Job, prepare
    from gemma_edge.export.recipes import load_recipe
    from gemma_edge.export.source import find_checkpoint
    from gemma_edge.runtime.profile import load_profile

    profile = msgspec.structs.replace(load_profile("jetson-orin-nano-8gb"), prefill_chunk=case.chunk)
    rules = replace(load_recipe(recipe), activations="float32")  # CUDA has no others
    if not on_cuda:
        profile = msgspec.structs.replace(
            profile,
            execution_provider="cpu",
            kv_cache=msgspec.structs.replace(profile.kv_cache, dtype="float32"),
        )
    job = Job(find_checkpoint(str(checkpoint)), profile, rules, case.context, out, fused=case.fused)
    return prepare(job)


def export(checkpoint: Path, out: Path, recipe: str, case: Case, *, on_cuda: bool = True) -> None:
    from gemma_edge.export.bundle import write_bundle

    write_bundle(prepared(checkpoint, out, recipe, case, on_cuda=on_cuda))


def keep(bundle: Path, folder: Path, names: tuple[str, ...]) -> None:
    """What the session on the GPU opens, and a manifest that speaks of these files alone."""
    for name in names:
        if (bundle / name).exists():  # not every recipe's steps are described for our kernels
            shutil.copyfile(bundle / name, folder / name)
    data = bundle / "embeddings.onnx.data"
    shutil.copyfile(data, folder / data.name)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {
        name: entry
        for name, entry in manifest["files"].items()
        if (folder / name).is_file() and name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def prepare_audio(folder: Path) -> None:
    """A tiny encoder's graphs, frames, and the soft tokens that the CPU makes of them."""
    import onnxruntime as ort

    from ..support.tiny_audio import TINY, random_frames
    from ..support.tiny_checkpoint import write_tiny_checkpoint

    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder / "scratch"
    one_layer = dict(num_hidden_layers=1, layer_types=[F], num_kv_shared_layers=0)
    checkpoint = write_tiny_checkpoint(scratch / "checkpoint", seed=0, audio=TINY, **one_layer)
    export(checkpoint, scratch / "bundle", "int4", Case())
    for name in (*AUDIO, "audio_encoder.onnx"):
        shutil.copyfile(scratch / "bundle" / name, folder / name)
    frames = random_frames(203, 128)[None]
    session = ort.InferenceSession(str(folder / "audio_encoder.onnx"), providers=["CPUExecutionProvider"])
    soft = session.run(["soft_tokens"], {"input_features": frames})[0]
    np.savez(folder / "reference.npz", frames=frames, soft_tokens=soft)
    shutil.rmtree(scratch)


def prepare_nano(folder: Path, count: int) -> None:
    """The nano model for CUDA (int4), and what the same weights answer on the CPU, judged."""
    from gemma_edge.examples.nano_model import evaluate
    from gemma_edge.examples.nano_model.corpus import Encoder

    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder / "scratch"
    case = Case(chunk=256, context=4096)
    export(NANO, scratch / "cuda", "int4", case)
    export(NANO, scratch / "cpu", "int4", case, on_cuda=False)
    keep(scratch / "cuda", folder, KEPT)
    encoder = Encoder(NANO)
    cases = list(evaluate.cases(encoder, count))
    answers = []
    generate = evaluate.bundle_generate(scratch / "cpu")
    for item, ids in zip(cases, generate([item.prompt for item in cases]), strict=True):
        text = encoder.tokenizer.decode(ids, skip_special_tokens=False)
        answers.append(
            dict(task=item.task, prompt=list(item.prompt.ids), answer=list(ids), right=not item.judge(text))
        )
    (folder / "answers.json").write_text(json.dumps(dict(count=count, answers=answers)))
    shutil.rmtree(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)


if __name__ == "__main__":
    main()
