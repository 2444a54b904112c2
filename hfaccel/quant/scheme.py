"""Which operators can be quantized, and the words that the quantization modules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

EXTERNAL_DATA_FROM_BYTES = 1 << 30
"""Graphs larger than this keep their weights in a file of their own: a graph file cannot exceed 2 GB."""
MIN_WEIGHT_SIZE = 1024
"""Weights with fewer elements are left alone: nothing to gain, and pooled heads are the most sensitive part."""


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
