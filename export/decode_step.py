"""Describes a decode step for the runtime's own CUDA kernels: runtime/gpu/plan.py says what is in it.

The weights are those of decoder_cuda.onnx, where they lie. A model or recipe that the kernels do not know
gets no description, and the reason is returned: its steps are then run on the graph.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from ..runtime.bundle import DECODE_STEP, DECODE_STEP_VECTORS
from ..runtime.gpu.plan import Product, Region, StepLayer, StepPlan
from .checkpoint import Checkpoint
from .fused import FUSED
from .geometry import Layer, TextModel
from .modules.decoder import PRODUCT_GAIN

HEAD_DIMS = (16, 32, 64, 128, 256, 512)
MOST_BLOCK = 256
LEAST_WIDTH = 16  # a row is a multiple of it
LANE_WEIGHTS = {2: 32, 4: 16, 8: 8}  # of one scale, at least: what a lane reads at once
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_per_layer_input_norm",
)
DTYPES = {ir.DataType.UINT8: "uint8", ir.DataType.FLOAT16: "float16", ir.DataType.FLOAT: "float32"}


class Unsupported(Exception):
    """The kernels cannot do this."""


def write_decode_step(
    folder: Path, model: TextModel, graph: ir.Model, checkpoint: Checkpoint, head: str
) -> str | None:
    """Write the description of `graph`, a complete decoder_cuda.onnx; or return why there is none.

    head: canonical name of the weight the head multiplies with.
    """
    try:
        plan, vectors = _describe(model, graph, checkpoint, head)
    except Unsupported as reason:
        return str(reason)
    (folder / DECODE_STEP).write_bytes(msgspec.json.encode(plan) + b"\n")
    np.savez(folder / DECODE_STEP_VECTORS, allow_pickle=False, **vectors)
    return None


def _describe(
    model: TextModel, graph: ir.Model, checkpoint: Checkpoint, head: str
) -> tuple[StepPlan, dict[str, np.ndarray]]:
    shape = model.geometry
    products = _products(graph)
    numbers = {layer.index: number for number, layer in enumerate(model.cached_layers)}
    layers = tuple(_layer(model, layer, numbers, products, checkpoint) for layer in model.layers)
    vectors: dict[str, np.ndarray] = {}
    for layer in model.layers:
        names = [norm for norm in NORMS if shape.hidden_size_per_layer_input or "per_layer" not in norm]
        names += ["self_attn.q_norm"] + ([] if layer.is_shared else ["self_attn.k_norm"])
        for name in names:
            full = f"layers.{layer.index}.{name}.weight"
            vectors[full] = checkpoint.read(full).astype(np.float32)
    names = ["norm.weight"]
    if shape.hidden_size_per_layer_input:
        names.append("per_layer_projection_norm.weight")
    vectors |= {name: checkpoint.read(name).astype(np.float32) for name in names}
    rotary: dict[str, Region] = {}
    for layer_type in sorted({layer.layer_type for layer in model.layers}):
        for part in ("cos", "sin"):
            tensor = graph.graph.initializers[f"constants.{part}_{layer_type}"].const_value
            if isinstance(tensor, ir.ExternalTensor):
                rotary[f"{part}_{layer_type}"] = _region(tensor)
            else:
                assert tensor is not None
                vectors[f"{part}_{layer_type}"] = tensor.numpy()
    plan = StepPlan(
        hidden_size=shape.hidden_size,
        heads=shape.num_attention_heads,
        eps=model.rms_norm_eps,
        activation=model.activation,  # type: ignore[arg-type]
        softcap=shape.final_logit_softcapping or 0.0,
        layers=layers,
        head=products[head],
        rotary=rotary,
        per_layer_model_projection=products.get("per_layer_model_projection.weight"),
    )
    return plan, vectors


def _products(graph: ir.Model) -> dict[str, Product]:
    """By the canonical name of the weight."""
    found: dict[str, Product] = {}
    for node in graph.graph:
        if node.op_type == "FusedMatMul" or node.op_type == "QuantizeLinear":
            raise Unsupported("the recipe keeps products in float, or rounds activations")
        if node.op_type != "MatMulNBits":
            continue
        weights, scales = node.inputs[1], node.inputs[2]
        assert weights is not None and scales is not None and weights.name is not None
        bits, block = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
        if block < LANE_WEIGHTS[bits] or block > MOST_BLOCK:
            raise Unsupported(f"{weights.name}: blocks of {block} in {bits} bits")
        if node.attributes["K"].as_int() % LEAST_WIDTH:
            raise Unsupported(f"{weights.name}: rows of {node.attributes['K'].as_int()}")
        found[weights.name.removesuffix(".blocks")] = Product(
            rows=node.attributes["N"].as_int(),
            width=node.attributes["K"].as_int(),
            bits=bits,
            block=block,
            weights=_region(weights.const_value),
            scales=_region(scales.const_value),
        )
    return found


def _region(tensor: object) -> Region:
    assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
    return Region(
        name=str(tensor.name),
        file=Path(tensor.location).name,
        offset=int(tensor.offset),
        dtype=DTYPES[tensor.dtype],  # type: ignore[arg-type]
        shape=tuple(int(size) for size in tensor.shape.numpy()),
    )


def _layer(
    model: TextModel,
    layer: Layer,
    numbers: dict[int, int],
    products: dict[str, Product],
    checkpoint: Checkpoint,
) -> StepLayer:
    if layer.head_dim not in HEAD_DIMS:
        raise Unsupported(f"heads of {layer.head_dim}")
    name = f"layers.{layer.index}."
    parts = [f"{name}self_attn.{part}.weight" for part in (FUSED, "q_proj", "k_proj", "v_proj")]
    gain = PRODUCT_GAIN  # up_proj's weights are stored times this
    return StepLayer(
        head_dim=layer.head_dim,
        kv_heads=layer.kv_heads,
        sliding=layer.is_sliding,
        cache=numbers[layer.source],
        writes=not layer.is_shared,
        scalar=float(checkpoint.read(f"{name}layer_scalar").reshape(())),
        attention=tuple(products[part] for part in parts if part in products),
        o_proj=products[f"{name}self_attn.o_proj.weight"],
        gate_proj=products[f"{name}mlp.gate_proj.weight"],
        up_proj=products[f"{name}mlp.up_proj.weight"],
        down_proj=products[f"{name}mlp.down_proj.weight"],
        down_eps=model.rms_norm_eps * gain**2,
        per_layer_input_gate=products.get(f"{name}per_layer_input_gate.weight"),
        per_layer_projection=products.get(f"{name}per_layer_projection.weight"),
    )
