"""Which operators can be quantized, and the words that the quantization modules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir

EXTERNAL_DATA_FROM_BYTES = 1 << 30
"""Graphs larger than this keep their weights in a file of their own: a graph file cannot exceed 2 GB."""
MIN_WEIGHT_SIZE = 1024
"""Weights with fewer elements are left alone: nothing to gain, and pooled heads are the most sensitive part."""

_LEVELS = 255
_SMALLEST_STEP = 1e-12


@dataclass(frozen=True)
class MatMulSite:
    """A MatMul with a constant weight [in, out]; ``activation`` is the name of the value it multiplies."""

    node: str
    activation: str


def matmul_sites(model: onnx_ir.Model) -> tuple[MatMulSite, ...]:
    """Every MatMul that could be quantized, in graph order."""
    sites = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        activation, weight = node.inputs[0], node.inputs[1]
        if activation is None or weight is None or weight.const_value is None or activation.const_value is not None:
            continue
        if len(weight.const_value.shape) == 2 and weight.const_value.size >= MIN_WEIGHT_SIZE:
            sites.append(MatMulSite(node.name or "", activation.name or ""))
    return tuple(sites)


def bias_after(matmul: onnx_ir.Node) -> tuple[onnx_ir.Node, onnx_ir.Value] | None:
    """The Add that alone reads the result of a MatMul with a constant weight [in, out], and the bias [out] that it adds, if there is one."""
    weight, result = matmul.inputs[1], matmul.outputs[0]
    readers = list(result.uses())
    if len(readers) != 1 or result.is_graph_output() or readers[0].node.op_type != "Add" or weight is None:
        return None
    other = readers[0].node.inputs[1 - readers[0].idx]
    if other is None or other.const_value is None or weight.const_value is None:
        return None
    return (readers[0].node, other) if other.const_value.shape.numpy() == weight.const_value.shape.numpy()[1:] else None


def activation_grid(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale (float32) and zero level (uint8) of an activation's 256 levels, of which one is exactly zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / _LEVELS, _SMALLEST_STEP)
    return np.array(step, dtype=np.float32), np.array(round(-low / step), dtype=np.uint8)


def embedding_lookups(model: onnx_ir.Model) -> tuple[str, ...]:
    """Names of the Gathers that look up rows of a constant float table [rows, channels]."""
    names = []
    for node in model.graph:
        table = node.inputs[0] if node.op_type == "Gather" and node.domain in ("", "ai.onnx") else None
        if table is None or table.const_value is None or not table.const_value.dtype.is_floating_point():
            continue
        if len(table.const_value.shape) == 2:
            names.append(node.name or "")
    return tuple(names)
