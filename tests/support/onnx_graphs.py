"""Looks into a bundle's graphs with the onnx package: nodes, inputs, and the weights that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from gemma_edge.export.quantize import dequantize_rows


@dataclass(frozen=True)
class Graph:
    """One .onnx file."""

    path: Path
    model: onnx.ModelProto
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def nodes(self, *op_types: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if not op_types or node.op_type in op_types]

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Name -> shape, symbolic dimensions by name."""
        return {
            value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in self.model.graph.input
        }

    def region(self, name: str) -> tuple[str, int, int]:
        """(file, offset, length) of an external initializer."""
        info = ExternalDataInfo(self.initializers[name])
        return info.location, info.offset, info.length

    def value(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.initializers[name], base_dir=str(self.path.parent))

    def dequantized(self) -> dict[str, np.ndarray]:
        """Canonical weight name -> the float matrix its quantized form stands for."""
        found = {}
        for node in self.nodes("MatMulNBits", "GatherBlockQuantized"):
            settings = attributes(node)
            matrix, scales = (
                (node.input[1], node.input[2]) if node.op_type == "MatMulNBits" else node.input[::2]
            )
            packed = self.value(matrix)
            packed = packed.reshape(packed.shape[0], -1)
            width = settings.get("K", packed.shape[1] * 8 // settings["bits"])
            name = scales.removesuffix(".scales")
            found[name] = dequantize_rows(packed, self.value(scales), bits=settings["bits"], width=width)
        return found


def load_graph(path: Path) -> Graph:
    model = onnx.load(path, load_external_data=False)
    return Graph(path, model, {tensor.name: tensor for tensor in model.graph.initializer})


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
