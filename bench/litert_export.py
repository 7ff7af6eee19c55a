"""One stage of making a LiteRT-LM model; runs in the environment that bench/peer_litert.py makes.

    python bench/litert_export.py CHECKPOINT OUT embedder|per_layer_embedder|decoder|package [MIX ...]

A stage is a process: each traces its part with its weights left on disk, writes it in float32, quantizes it
and removes what came between. Parts that a stage doesn't trace are dropped first, or they'd be written too.
MIX: "int4", the exporter's own recipe of 4 bits a channel, or "mix", 2 bits for MLPs and 4 for the rest.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import qtyping, quantizer
from ai_edge_quantizer import recipe as recipes
from ai_edge_quantizer.utils import recipe_utils
from litert_torch.generative.export_hf.core import export_lib, exportable_module, litert_lm_builder

RECIPE = "gemma4_mixed48"
PREFILL_LENGTHS, CACHE_LENGTH = [128, 1024], 2048
# Stage -> the exporter's function, the file it writes, its section in a recipe, modules it needn't have.
STAGES = {
    "embedder": (
        "export_embedder_model",
        "embedder",
        "tf_lite_embedder",
        ("layers", "embed_tokens_per_layer"),
    ),
    "per_layer_embedder": (
        "export_additional_models",
        "per_layer_embedder",
        "tf_lite_per_layer_embedder",
        ("layers",),
    ),
    "decoder": (
        "export_text_prefill_decode_model",
        "model",
        "tf_lite_prefill_decode",
        ("embed_tokens_per_layer",),
    ),
}


def main() -> None:
    checkpoint, out, stage = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    mixes = sys.argv[4:] or ["int4"]
    start = time.monotonic()
    config = exportable_module.ExportableModuleConfig(
        model=str(checkpoint),
        output_dir=str(out),
        work_dir=str(out),
        prefill_lengths=PREFILL_LENGTHS,
        cache_length=CACHE_LENGTH,
        externalize_embedder=True,
        single_token_embedder=True,
        quantization_recipe="none",
        use_v2=True,
        delete_in_memory_params=True,
    )
    source = export_lib.load_model(str(checkpoint), config, task=config.task)
    config = export_lib.update_export_config(config, source)
    if stage == "package":
        for mix in mixes:
            package(source, config, out, mix)
    else:
        export(source, config, out, stage, mixes, checkpoint)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{stage}: {time.monotonic() - start:.0f} s, peak {peak_gib:.1f} GiB", flush=True)


def export(source: Any, config: Any, out: Path, stage: str, mixes: list[str], checkpoint: Path) -> None:
    function, name, section, unused = STAGES[stage]
    drop(source.model, unused)
    getattr(export_lib, function)(source, config, export_lib.ExportedModelArtifacts())
    shutil.rmtree(out / f"{name}_intermediates", ignore_errors=True)
    exact = out / f"{name}.tflite"
    try:
        if stage != "decoder":
            quantize(exact, out / f"{name}_q.tflite", recipe_of(section))
            return
        for mix in mixes:
            recipe = recipe_of(section) if mix == "int4" else mixed(exact, checkpoint)
            quantize(exact, out / f"{name}_{mix}.tflite", recipe)
    finally:
        exact.unlink()


def drop(model: torch.nn.Module, names: tuple[str, ...]) -> None:
    """Put modules without weights in the place of those that this stage does not trace."""
    for parent in list(model.modules()):
        for name in names:
            child = getattr(parent, name, None)
            if isinstance(child, torch.nn.Module):
                setattr(parent, name, torch.nn.ModuleList() if name == "layers" else torch.nn.Identity())


def recipe_of(section: str) -> qtyping.ModelQuantizationRecipe:
    return recipe_utils.resolve_litertlm_recipe_or_mapping(RECIPE)[section]


def mixed(exact: Path, checkpoint: Path) -> qtyping.ModelQuantizationRecipe:
    """4 bits, and 2 for the products of MLPs: names are lost in the graph, so these are told by a width."""
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    widths = {text["intermediate_size"], 2 * text["intermediate_size"]}
    product = schema.BuiltinOperator.FULLY_CONNECTED
    outputs = []
    with exact.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = schema.Model.GetRootAs(data)
        for graph in map(model.Subgraphs, range(model.SubgraphsLength())):
            for operator in map(graph.Operators, range(graph.OperatorsLength())):
                code = model.OperatorCodes(operator.OpcodeIndex())
                weights = graph.Tensors(operator.Inputs(1)) if operator.InputsLength() > 1 else None
                if max(code.BuiltinCode(), code.DeprecatedBuiltinCode()) != product or weights is None:
                    continue
                if widths & {weights.Shape(axis) for axis in range(weights.ShapeLength())}:
                    outputs.append(graph.Tensors(operator.Outputs(0)).Name().decode())
        del model, graph, operator, code, weights  # they hold the map open
    layers = text["num_hidden_layers"]
    if len(outputs) < 3 * layers:
        raise SystemExit(f"{exact}: {len(outputs)} products of MLPs, expected {3 * layers} or more")
    names = "|".join(name.replace(".", r"\.") for name in outputs)
    fully_connected = qtyping.TFLOperationName.FULLY_CONNECTED
    return recipes.dynamic_wi4c_afp32(operation_name=fully_connected) + recipes.dynamic_wi2c_afp32(
        regex=f"(^|;)({names})(;|$)", operation_name=fully_connected
    )


def quantize(exact: Path, out: Path, recipe: qtyping.ModelQuantizationRecipe) -> None:
    worker = quantizer.Quantizer(str(exact))
    worker.load_quantization_recipe(recipe)
    worker.quantize(serialize_to_path=str(out), enable_progress_report=False)
    print(f"{out.name}: {out.stat().st_size / 2**20:.0f} MiB", flush=True)


def package(source: Any, config: Any, out: Path, mix: str) -> None:
    artifacts = dataclasses.replace(
        export_lib.ExportedModelArtifacts(),
        prefill_decode_model_path=str(out / f"model_{mix}.tflite"),
        embedder_model_path=str(out / "embedder_q.tflite"),
        additional_model_paths={"per_layer_embedder": str(out / "per_layer_embedder_q.tflite")},
    )
    artifacts = export_lib.export_tokenizer(source, config, artifacts)
    artifacts = litert_lm_builder.package_model(source, config, artifacts)
    Path(artifacts.litert_lm_model_path).rename(out / f"{mix}.litertlm")


if __name__ == "__main__":
    main()
