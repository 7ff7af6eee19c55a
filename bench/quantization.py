"""How far quantized weights are from the checkpoint's: our search against rounding, HQQ and k-quant.

    python bench/quantization.py [CHECKPOINT …] [--bits 4] [--blocks 16 32 64 128 256] [--speed]

CHECKPOINT: folders with safetensors of floats (default: models/nano). All matrices of at least 64 by 256
count, each method at each block. Printed is |W - Wq| / |W| over all of them; the JSON has bytes and time. The
asymmetric methods store a zero point for each block beside its scale: half a byte, or four for HQQ's, which
is no integer.

    nearest    symmetric, the largest weight of a block at the end of the range
    search     ours: symmetric, the best of scales of both signs (export/quantize.py)
    minmax     asymmetric: the range from the least to the largest weight
    hqq        asymmetric, zero point by half-quadratic steps with an l0.7 norm
    kquant     asymmetric, least squares of scale and minimum for each candidate range
    weighted   kquant where large weights count more, as in llama.cpp without an importance matrix

With --speed, what zero points cost MatMulNBits. The last line is JSON.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from common import machine, median, print_json, print_machine
from onnx import TensorProto, helper, numpy_helper
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from gemma_edge.export.quantize import dequantize_rows, quantize_rows  # noqa: E402

ROWS_MIN, WIDTH = 64, 256
HQQ_STEPS, HQQ_NORM, HQQ_BETA, HQQ_KAPPA = 20, 0.7, 10.0, 1.01
CANDIDATES = np.linspace(0.7, 1.1, 21)  # of kquant: ranges, as parts of the blocks' own

Method = Callable[[Tensor, int], Tensor]  # blocks (n, block), bits -> what they become


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, default=[ROOT / "models" / "nano"])
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--blocks", type=int, nargs="+", default=(16, 32, 64, 128, 256))
    parser.add_argument("--speed", action="store_true", help="also time MatMulNBits with zero points")
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = machine()
    print_machine(about)
    rows = [row for folder in args.checkpoints for row in errors_of(folder, args.bits, args.blocks)]
    speed = zero_point_speed(args.bits) if args.speed else []
    print()
    print_json({"bench": "quantization", "bits": args.bits, "rows": rows, "speed": speed, "machine": about})
    return 0


def errors_of(folder: Path, bits: int, blocks: list[int]) -> list[dict]:
    matrices = list(matrices_of(folder))
    weights = sum(matrix.numel() for matrix in matrices)
    print(f"\n{folder.name}: {len(matrices)} matrices, {weights / 1e6:.1f} M weights, {bits} bits")
    print("block  " + "  ".join(f"{name:>9}" for name in METHODS) + "   (bytes a weight)")
    norm = math.sqrt(sum(float(matrix.double().square().sum()) for matrix in matrices))
    rows = []
    for block in blocks:
        cells = []
        for name, (method, extra) in METHODS.items():
            start = time.perf_counter()
            squared = sum(squared_error(matrix, block, bits, method) for matrix in matrices)
            row = dict(
                checkpoint=folder.name,
                block=block,
                method=name,
                error=math.sqrt(squared) / norm,
                bytes_a_weight=bits / 8 + (4 + extra) / block,
                ns_a_weight=(time.perf_counter() - start) / weights * 1e9,
            )
            rows.append(row)
            cells.append(f"{row['error']:9.4f}")
        sizes = sorted({round(row["bytes_a_weight"], 3) for row in rows[-len(METHODS) :]})
        print(
            f"{block:5}  " + "  ".join(cells) + "   " + ", ".join(f"{size:.3f}" for size in sizes), flush=True
        )
    return rows


def matrices_of(folder: Path) -> Iterator[Tensor]:
    """Every matrix as float32, its width cut to a multiple of 256: all block sizes see the same weights."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and shape[0] >= ROWS_MIN and shape[1] >= WIDTH:
                    yield file.get_tensor(name)[:, : shape[1] // WIDTH * WIDTH].float().contiguous()


def squared_error(matrix: Tensor, block: int, bits: int, method: Method) -> float:
    return float(
        sum(
            (part - method(part, bits)).double().square().sum()
            for part in matrix.reshape(-1, block).split(1 << 16)
        )
    )


def nearest(blocks: Tensor, bits: int) -> Tensor:
    return _ours(blocks, bits, "nearest")


def search(blocks: Tensor, bits: int) -> Tensor:
    return _ours(blocks, bits, "search")


def _ours(blocks: Tensor, bits: int, method: str) -> Tensor:
    width = blocks.shape[1]
    found = quantize_rows(blocks.numpy(), bits=bits, block=width, method=method)  # type: ignore[arg-type]
    return torch.from_numpy(dequantize_rows(found.packed, found.scales, bits=bits, width=width))


def minmax(blocks: Tensor, bits: int) -> Tensor:
    most = (1 << bits) - 1
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / most).clamp(min=1e-30)
    zero = (-low / scale).round()
    return ((blocks / scale + zero).round().clamp(0, most) - zero) * scale


def hqq(blocks: Tensor, bits: int) -> Tensor:
    """Badri and Shaji's half-quadratic quantization: the scale is the range's, the zero point moves.

    Each step shrinks the error by an l_p norm and takes the zero point that explains the rest best.
    """
    most, beta = (1 << bits) - 1, HQQ_BETA
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    inverse = (most / (high - low).clamp(min=1e-30)).clamp(max=2e4)
    zero = -low * inverse
    best, best_zero = math.inf, zero
    for _ in range(HQQ_STEPS):
        levels = (blocks * inverse + zero).round().clamp(0, most)
        left = blocks - (levels - zero) / inverse
        shrunk = left.sign() * (left.abs() - left.abs().clamp(min=1e-8).pow(HQQ_NORM - 1) / beta).clamp(min=0)
        error = float(left.abs().mean())
        if error >= best:
            break
        best, best_zero = error, zero
        zero = (levels - (blocks - shrunk) * inverse).mean(1, keepdim=True)
        beta *= HQQ_KAPPA
    levels = (blocks * inverse + best_zero).round().clamp(0, most)
    return (levels - best_zero) / inverse


def kquant(blocks: Tensor, bits: int) -> Tensor:
    return _kquant(blocks, bits, torch.ones_like(blocks))


def weighted(blocks: Tensor, bits: int) -> Tensor:
    return _kquant(blocks, bits, blocks.square().mean(1, keepdim=True).sqrt() + blocks.abs())


def _kquant(blocks: Tensor, bits: int, importance: Tensor) -> Tensor:
    """As llama.cpp's make_qkx: for each candidate range levels, then least squares for scale and minimum.

    Here the minimum has to be a whole number of levels: MatMulNBits stores nothing else in few bits.
    """
    most = (1 << bits) - 1
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
    total = importance.sum(1, keepdim=True)
    mean_x = (importance * blocks).sum(1, keepdim=True)
    best = minmax(blocks, bits)
    best_error = (importance * (blocks - best).square()).sum(1, keepdim=True)
    for fraction in CANDIDATES:
        step = ((high - low) * float(fraction) / most).clamp(min=1e-30)
        levels = ((blocks - low * float(fraction)) / step).round().clamp(0, most)
        mean_l = (importance * levels).sum(1, keepdim=True)
        square_l = (importance * levels.square()).sum(1, keepdim=True)
        product = (importance * levels * blocks).sum(1, keepdim=True)
        scale = (total * product - mean_x * mean_l) / (total * square_l - mean_l.square()).clamp(min=1e-30)
        scale = torch.where(scale.abs() < 1e-30, step, scale)
        minimum = (mean_x - scale * mean_l) / total
        zero = (-minimum / scale).round().clamp(0, most)
        # With the zero point fixed: levels again, and the best scale for them.
        signed = (blocks / scale + zero).round().clamp(0, most) - zero
        length = (importance * signed.square()).sum(1, keepdim=True).clamp(min=1e-30)
        scale = (importance * signed * blocks).sum(1, keepdim=True) / length
        found = signed * scale
        error = (importance * (blocks - found).square()).sum(1, keepdim=True)
        best = torch.where(error < best_error, found, best)
        best_error = torch.minimum(error, best_error)
    return best


METHODS: dict[str, tuple[Method, float]] = {  # with the bytes of a zero point
    "nearest": (nearest, 0),
    "search": (search, 0),
    "minmax": (minmax, 0.5),
    "hqq": (hqq, 4),
    "kquant": (kquant, 0.5),
    "weighted": (weighted, 0.5),
}


def zero_point_speed(bits: int) -> list[dict]:
    """MatMulNBits with and without zero points at the shape of an E2B product, one row and 128."""
    print("\nMatMulNBits 1536 to 12288, milliseconds")
    rows = []
    for block in (32, 64, 128):
        for kind in ("none", "packed", "float"):
            product = _product(bits, block, kind)
            row: dict = dict(block=block, zero_points=kind)
            for count in (1, 128):
                x = np.random.default_rng(0).standard_normal((count, 1536), dtype=np.float32)
                times = []
                for _ in range(20):
                    start = time.perf_counter()
                    product.run(None, {"x": x})
                    times.append((time.perf_counter() - start) * 1e3)
                row[f"ms_{count}"] = median(times[3:])
            rows.append(row)
            print(
                f"block {block:3}  zero points {kind:6}  {row['ms_1']:6.2f}  {row['ms_128']:7.1f}", flush=True
            )
    return rows


def _product(bits: int, block: int, zero_points: str) -> ort.InferenceSession:
    width, count = 1536, 12288
    random = np.random.default_rng(0)
    blocks = width // block
    weights = {
        "packed": random.integers(0, 256, (count, blocks, block * bits // 8), np.uint8),
        "scales": random.uniform(0.5, 1.5, (count, blocks)).astype(np.float32),
    }
    if zero_points == "packed":
        weights["zeros"] = random.integers(0, 256, (count, blocks * bits // 8), np.uint8)
    elif zero_points == "float":
        weights["zeros"] = random.uniform(4, 12, (count, blocks)).astype(np.float32)
    settings = dict(K=width, N=count, bits=bits, block_size=block, accuracy_level=4)
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], domain="com.microsoft", **settings)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", count])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    raise SystemExit(main())
