"""What MatMulNBits costs at a model's shapes, for each number of bits and block size: pick block sizes by it.

    python bench/matmul.py [--config export/configs/e2b.json] [--threads 2] [--bits 2 4 8] [--blocks 16 … 256]
    python bench/matmul.py --provider cuda [--activations float32] [--weight-only] [--products head]

The products of one upper layer (attention, MLP, per-layer input) run one after another, with one row of
activations as in decoding and with 128 as in a prompt. Before each decode step the caches are flushed, so
that weights come from memory as they do in a model. Also printed: the error that int8 activations bring,
which grows with the block. The last line is JSON.

On CUDA activations and scales are float16, as a CUDA bundle has them, or float32, as its head and its
per-layer inputs have; runs are captured, so that starting seven kernels costs little, and the printed error
is that of the arithmetic in halves. --weight-only takes the kernels that ONNX Runtime has for that
(fpA_intB).
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
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--activations", choices=("float16", "float32"), help="default: float16 on CUDA")
    parser.add_argument("--weight-only", action="store_true", help="CUDA's kernels for weights in few bits")
    parser.add_argument("--products", choices=("layer", "head"), default="layer")
    args = parser.parse_args()
    args.activations = args.activations or ("float16" if args.provider == "cuda" else "float32")
    about = machine()
    print_machine(about)
    config = json.loads(args.config.read_text())
    shapes = layer_shapes(config) if args.products == "layer" else head_shapes(config)
    if args.provider == "cuda":
        from gemma_edge.runtime.cuda_session import load_libraries

        load_libraries()
    weights = sum(inputs * outputs for inputs, outputs in shapes)
    print(
        f"{args.config.stem}, {'an upper layer' if args.products == 'layer' else 'the head'}: "
        f"{weights / 1e6:.1f} M weights in {len(shapes)} products, {args.provider}, {args.activations}, "
        + (f"{args.threads} threads, " if args.provider == "cpu" else "")
        + ("weight-only kernels, " if args.weight_only else "")
        + f"accuracy_level {ACCURACY_INT8}; best of {args.repeats}\n"
    )
    print(f"bits  block      MB   decode   GB/s   {args.rows} rows    GOPS   error of the activations' type")
    rows = []
    for bits, block in itertools.product(args.bits, args.blocks):
        try:
            row = measure(shapes, bits, block, args)
        except Exception as error:  # a provider may have no kernel for it
            print(f"{bits:4}  {block:5}  {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        rows.append(row)
        print(
            f"{row.bits:4}  {row.block:5}  {row.megabytes:6.1f}  {row.decode_ms:6.3f} ms  "
            f"{row.decode_gb_s:6.1f}  {row.prefill_ms:7.3f} ms  {row.prefill_gops:7.0f}   "
            f"{row.activation_error:.4f}",
            flush=True,
        )
    print()
    print_json(
        {
            "bench": "matmul",
            "config": args.config.stem,
            "threads": args.threads,
            "provider": args.provider,
            "activations": args.activations,
            "weight_only": args.weight_only,
            "products": args.products,
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


def head_shapes(config: dict) -> list[Shape]:
    text = config.get("text_config", config)
    return [(text["hidden_size"], text["vocab_size"])]


def measure(shapes: list[Shape], bits: int, block: int, args: argparse.Namespace) -> Row:
    random = np.random.default_rng(0)
    dtype = np.dtype(args.activations)
    layers = [random_weights(random, shape, bits, block, dtype) for shape in shapes]
    products = session(shapes, bits, block, layers, args)
    size_bytes = sum(packed.nbytes + scales.nbytes for packed, scales in layers)
    error = activation_error(random, bits, *layers[0], products, shapes, dtype)
    del layers
    flush = np.ones(FLUSH_BYTES // 8, np.int64)
    decode, prefill = [], []
    one, many = inputs_of(random, shapes, 1, dtype), inputs_of(random, shapes, args.rows, dtype)
    if args.provider == "cuda":
        decode = run_on_gpu(products, one, shapes, args.repeats, flush, "1")
        prefill = run_on_gpu(products, many, shapes, max(3, args.repeats // 4), flush, "2")
    for repeat in range(args.repeats if args.provider == "cpu" else 0):
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


def run_on_gpu(
    products: ort.InferenceSession,
    inputs: dict[str, np.ndarray],
    shapes: list[Shape],
    repeats: int,
    flush: np.ndarray,
    graph: str,
) -> list[float]:
    """Seconds of each run, captured, with everything on the GPU; its cache is overwritten in between."""
    binding = products.io_binding()
    held = {name: ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0) for name, value in inputs.items()}
    for index, (_, count) in enumerate(shapes):
        rows = np.zeros((len(inputs["x0"]), count), inputs["x0"].dtype)
        held[f"y{index}"] = ort.OrtValue.ortvalue_from_numpy(rows, "cuda", 0)
        binding.bind_ortvalue_input(f"x{index}", held[f"x{index}"])
        binding.bind_ortvalue_output(f"y{index}", held[f"y{index}"])
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    part = flush[: (128 << 20) // 8]
    overwritten = ort.OrtValue.ortvalue_from_numpy(part, "cuda", 0)
    times = []
    for _ in range(repeats + 1):
        overwritten.update_inplace(part)
        start = time.perf_counter()
        products.run_with_iobinding(binding, options)
        times.append(time.perf_counter() - start)
    return times[1:]  # the first captures


def random_weights(
    random: np.random.Generator, shape: Shape, bits: int, block: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """(packed (outputs, blocks, bytes), scales (outputs, blocks))"""
    inputs, outputs = shape
    blocks = math.ceil(inputs / block)
    packed = random.integers(0, 256, (outputs, blocks, block * bits // 8), np.uint8)
    scales = random.uniform(0.5, 1.5, (outputs, blocks)) / 2**bits / inputs**0.5
    return packed, scales.astype(dtype)


def session(
    shapes: list[Shape],
    bits: int,
    block: int,
    layers: list[tuple[np.ndarray, np.ndarray]],
    args: argparse.Namespace,
) -> ort.InferenceSession:
    """All products in one graph: x0 … to y0 …; several sessions' threads would be in each other's way."""
    nodes, inputs, outputs, weights = [], [], [], []
    kind = TensorProto.FLOAT16 if args.activations == "float16" else TensorProto.FLOAT
    for index, ((width, count), (packed, scales)) in enumerate(zip(shapes, layers, strict=True)):
        settings = dict(K=width, N=count, bits=bits, block_size=block, accuracy_level=ACCURACY_INT8)
        names = [f"{name}{index}" for name in ("x", "packed", "scales", "y")]
        nodes.append(
            helper.make_node("MatMulNBits", names[:3], names[3:], domain="com.microsoft", **settings)
        )
        inputs.append(helper.make_tensor_value_info(names[0], kind, ["rows", width]))
        outputs.append(helper.make_tensor_value_info(names[3], kind, ["rows", count]))
        weights += [numpy_helper.from_array(packed, names[1]), numpy_helper.from_array(scales, names[2])]
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    providers: list = ["CPUExecutionProvider"]
    if args.provider == "cuda":
        providers = [("CUDAExecutionProvider", {"enable_cuda_graph": "1"})]
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1" if args.weight_only else "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=providers)


def inputs_of(
    random: np.random.Generator, shapes: list[Shape], rows: int, dtype: np.dtype
) -> dict[str, np.ndarray]:
    return {
        f"x{index}": random.standard_normal((rows, width), dtype=np.float32).astype(dtype)
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
    dtype: np.dtype,
) -> float:
    """Of the first product, whose weights are given."""
    width, count = shapes[0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    packed = packed[: min(count, 4096)]
    levels = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    outputs = min(count, 4096)
    scales = scales.astype(np.float32)
    weights = (levels.reshape(*packed.shape[:2], -1) - float(1 << (bits - 1))) * scales[:outputs, :, None]
    inputs, options = inputs_of(random, shapes, 1, dtype), ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")
    exact = inputs["x0"].astype(np.float64) @ weights.reshape(outputs, -1)[:, :width].T
    got = products.run(["y0"], inputs, options)[0][:, :outputs].astype(np.float64)
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


if __name__ == "__main__":
    raise SystemExit(main())
