"""What MatMulNBits costs at a model's shapes, for each number of bits and block size: pick block sizes by it.

    python bench/matmul.py [--config export/configs/e2b.json] [--threads 2] [--bits 2 4 8] [--blocks 16 … 256]

The products of one upper layer (attention, MLP, per-layer input) run one after another, with one row of
activations as in decoding and with 128 as in a prompt. Before each decode step the caches are flushed, so
that weights come from memory as they do in a model. Also printed: the error that int8 activations bring,
which grows with the block. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from common import machine, print_json, print_machine
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = (16, 32, 64, 128, 256)
FLUSH_BYTES = 640 << 20
ACCURACY_INT8 = 4

Shape = tuple[int, int]  # inputs, outputs


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    bits: int
    block: int
    megabytes: float  # of weights and scales
    decode_ms: float  # one row, weights from memory
    decode_gb_s: float
    prefill_ms: float
    prefill_gops: float
    activation_error: float  # |y - xW| / |xW| for normal x: what int8 activations cost


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "export" / "configs" / "e2b.json")
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 4, 8), default=(2, 4, 8))
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--rows", type=int, default=128, help="of a prompt's chunk")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    about = machine()
    print_machine(about)
    shapes = layer_shapes(json.loads(args.config.read_text()))
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    print(
        f"{args.config.stem}, an upper layer: {weights / 1e6:.1f} M weights in {len(shapes)} products, "
        f"{args.threads} threads, accuracy_level {ACCURACY_INT8}; best of {args.repeats}\n"
    )
    print(f"bits  block      MB   decode   GB/s   {args.rows} rows    GOPS   error of int8 activations")
    rows = []
    for bits, block in itertools.product(args.bits, args.blocks):
        row = measure(shapes, bits, block, args)
        rows.append(row)
        print(
            f"{row.bits:4}  {row.block:5}  {row.megabytes:6.1f}  {row.decode_ms:4.2f} ms  "
            f"{row.decode_gb_s:5.1f}  {row.prefill_ms:5.1f} ms  {row.prefill_gops:6.0f}   "
            f"{row.activation_error:.4f}",
            flush=True,
        )
    print()
    print_json(
        {
            "bench": "matmul",
            "config": args.config.stem,
            "threads": args.threads,
            "prefill_rows": args.rows,
            "rows": [asdict(row) for row in rows],
            "machine": about,
        }
    )
    return 0


def layer_shapes(config: dict) -> list[Shape]:
    """The products of a KV-shared sliding layer."""
    text = config.get("text_config", config)
    hidden, heads = text["hidden_size"], text["num_attention_heads"] * text["head_dim"]
    inner = text["intermediate_size"] * (2 if text.get("use_double_wide_mlp") else 1)
    shapes = [(hidden, heads), (heads, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    if width := text.get("hidden_size_per_layer_input"):
        shapes += [(hidden, width), (width, hidden)]
    return shapes


def measure(shapes: list[Shape], bits: int, block: int, args: argparse.Namespace) -> Row:
    random = np.random.default_rng(0)
    layers = [random_weights(random, shape, bits, block) for shape in shapes]
    products = session(shapes, bits, block, layers, args.threads)
    size_bytes = sum(packed.nbytes + scales.nbytes for packed, scales in layers)
    error = activation_error(random, bits, *layers[0], products, shapes)
    del layers
    flush = np.ones(FLUSH_BYTES // 8, np.int64)
    decode, prefill = [], []
    one, many = inputs_of(random, shapes, 1), inputs_of(random, shapes, args.rows)
    for repeat in range(args.repeats):
        flush.max()
        decode.append(run_all(products, one))
        if repeat < max(3, args.repeats // 4):
            prefill.append(run_all(products, many))
    decode_s, prefill_s = min(decode), min(prefill)  # others on the machine only add
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    return Row(
        bits=bits,
        block=block,
        megabytes=size_bytes / 1e6,
        decode_ms=decode_s * 1e3,
        decode_gb_s=size_bytes / decode_s / 1e9,
        prefill_ms=prefill_s * 1e3,
        prefill_gops=2 * weights * args.rows / prefill_s / 1e9,
        activation_error=error,
    )


def random_weights(
    random: np.random.Generator, shape: Shape, bits: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """(packed (outputs, blocks, bytes), scales (outputs, blocks))"""
    inputs, outputs = shape
    blocks = math.ceil(inputs / block)
    packed = random.integers(0, 256, (outputs, blocks, block * bits // 8), np.uint8)
    return packed, random.uniform(0.5, 1.5, (outputs, blocks)).astype(np.float32) / 2**bits


def session(
    shapes: list[Shape], bits: int, block: int, layers: list[tuple[np.ndarray, np.ndarray]], threads: int
) -> ort.InferenceSession:
    """All products in one graph: x0 … to y0 …; several sessions' threads would be in each other's way."""
    nodes, inputs, outputs, weights = [], [], [], []
    for index, ((width, count), (packed, scales)) in enumerate(zip(shapes, layers, strict=True)):
        settings = dict(K=width, N=count, bits=bits, block_size=block, accuracy_level=ACCURACY_INT8)
        names = [f"{name}{index}" for name in ("x", "packed", "scales", "y")]
        nodes.append(
            helper.make_node("MatMulNBits", names[:3], names[3:], domain="com.microsoft", **settings)
        )
        inputs.append(helper.make_tensor_value_info(names[0], TensorProto.FLOAT, ["rows", width]))
        outputs.append(helper.make_tensor_value_info(names[3], TensorProto.FLOAT, ["rows", count]))
        weights += [numpy_helper.from_array(packed, names[1]), numpy_helper.from_array(scales, names[2])]
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs_of(random: np.random.Generator, shapes: list[Shape], rows: int) -> dict[str, np.ndarray]:
    return {
        f"x{index}": random.standard_normal((rows, width), dtype=np.float32)
        for index, (width, _) in enumerate(shapes)
    }


def run_all(products: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> float:
    """Seconds of all products, one after another."""
    start = time.perf_counter()
    products.run(None, inputs)
    return time.perf_counter() - start


def activation_error(
    random: np.random.Generator,
    bits: int,
    packed: np.ndarray,
    scales: np.ndarray,
    products: ort.InferenceSession,
    shapes: list[Shape],
) -> float:
    """Of the first product, whose weights are given."""
    width, count = shapes[0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    levels = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    weights = (levels.reshape(*packed.shape[:2], -1) - float(1 << (bits - 1))) * scales[:, :, None]
    inputs = inputs_of(random, shapes, 16)
    exact = inputs["x0"].astype(np.float64) @ weights.reshape(count, -1)[:, :width].T
    return float(np.linalg.norm(products.run(["y0"], inputs)[0] - exact) / np.linalg.norm(exact))


if __name__ == "__main__":
    raise SystemExit(main())
