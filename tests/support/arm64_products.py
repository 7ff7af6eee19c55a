"""Single MatMulNBits graphs, and which kernel computed their results: each rounds in a way of its own.

A kernel that rounds activations to int8 does so block by block with one scale each (MLAS), or row by row
between the row's smallest and largest number (KleidiAI), and KleidiAI cuts scales to bfloat16. Computed in
float64, each way gives numbers that differ from the others' by hundreds of times what its own kernel's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

INPUTS, OUTPUTS, ROWS = 512, 96, 16
ACCURACY_INT8 = 4


class Kernel(Enum):
    """How activations and scales are rounded."""

    FLOAT = "not rounded (float kernel)"
    INT8_BLOCK = "activations int8 by blocks"
    INT8_ROW_BF16 = "activations int8 by rows, scales cut to bfloat16 (KleidiAI)"


@dataclass(frozen=True)
class Cell:
    """One product that is run."""

    bits: int
    block: int
    rows: int

    @property
    def graph(self) -> str:
        return f"{self.bits}-{self.block}"


CELLS = [Cell(bits, block, rows) for bits in (2, 4, 8) for block in (32, 64, 128, 256) for rows in (1, ROWS)]


def write_products(folder: Path) -> None:
    """A graph for each number of bits and block, and x.npy: rows whose blocks differ a hundredfold."""
    folder.mkdir()
    random = np.random.default_rng(0)
    sizes = np.repeat(10.0 ** random.uniform(-2, 0, INPUTS // 32), 32)
    np.save(folder / "x.npy", (random.standard_normal((ROWS, INPUTS)) * sizes).astype(np.float32))
    for bits, block in {(cell.bits, cell.block) for cell in CELLS}:
        packed = random.integers(0, 256, (OUTPUTS, INPUTS // block, block * bits // 8), np.uint8)
        scales = (random.uniform(0.5, 1.5, (OUTPUTS, INPUTS // block)) / 2**bits).astype(np.float32)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "packed", "scales"],
            ["y"],
            domain="com.microsoft",
            K=INPUTS,
            N=OUTPUTS,
            bits=bits,
            block_size=block,
            accuracy_level=ACCURACY_INT8,
        )
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INPUTS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUTPUTS])],
            [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(scales, "scales")],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        (folder / f"{bits}-{block}.onnx").write_bytes(model.SerializeToString())
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        levels = (packed[..., None] >> shifts).astype(np.int64) & ((1 << bits) - 1)
        levels = levels.reshape(OUTPUTS, INPUTS // block, block) - (1 << (bits - 1))
        np.savez(folder / f"{bits}-{block}.npz", levels=levels, scales=scales)


def kernel_of(cell: Cell, folder: Path, results: Mapping[str, np.ndarray]) -> tuple[Kernel, float]:
    """The way of rounding that explains a result best, and the relative error that it leaves."""
    result = results[f"{cell.graph}/{cell.rows}"]
    made = np.load(folder / f"{cell.graph}.npz")
    x = np.load(folder / "x.npy")[: cell.rows].astype(np.float64)
    expected = {
        Kernel.FLOAT: x @ _weights(made["levels"], made["scales"]).T,
        Kernel.INT8_BLOCK: _by_blocks(x, cell.block) @ _weights(made["levels"], made["scales"]).T,
        Kernel.INT8_ROW_BF16: _by_rows(x) @ _weights(made["levels"], _cut_to_bfloat16(made["scales"])).T,
    }
    errors = {
        kernel: float(np.linalg.norm(result - numbers) / np.linalg.norm(numbers))
        for kernel, numbers in expected.items()
    }
    best = min(errors, key=errors.__getitem__)
    return best, errors[best]


def _weights(levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(outputs, inputs)"""
    return (levels * scales.astype(np.float64)[..., None]).reshape(OUTPUTS, INPUTS)


def _by_blocks(x: np.ndarray, block: int) -> np.ndarray:
    blocks = x.reshape(len(x), -1, block)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.round(blocks / scale) * scale).reshape(x.shape)


def _by_rows(x: np.ndarray) -> np.ndarray:
    low = np.minimum(x.min(axis=1, keepdims=True), 0)
    high = np.maximum(x.max(axis=1, keepdims=True), 0)
    scale = (high - low) / 255
    zero = np.clip(np.round(-128 - low / scale), -128, 127)
    return (np.clip(np.round(x / scale) + zero, -128, 127) - zero) * scale


def _cut_to_bfloat16(scales: np.ndarray) -> np.ndarray:
    return (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
