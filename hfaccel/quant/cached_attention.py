"""Where ``GroupQueryAttention`` has what its cache is about, as onnxruntime's documentation of the operator says (ContribOperators.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

ATTENTION = "GroupQueryAttention"
PASTS = (3, 4)
"""Inputs with the keys and values so far; outputs 1 and 2 are those with the new ones."""
COS, SIN = 7, 8
SCALES = (12, 13)
"""Inputs with the scales of keys and values in integers."""
QUANTIZATION_KINDS = ("k_quant_type", "v_quant_type")
CACHE_BITS = "kv_cache_bit_width"
"""Attributes that only a cache of integers has."""


def attentions(model: onnx_ir.Model) -> list[onnx_ir.Node]:
    """All of a graph, in order."""
    return [node for node in model.graph if node.op_type == ATTENTION]
