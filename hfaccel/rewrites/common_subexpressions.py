"""Compute equal expressions once (masks and position tables come out of the exporter once per layer)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def eliminate_common_subexpressions(model: onnx_ir.Model) -> int:
    """Merge nodes with equal operator, inputs and attributes (onnx-ir's pass); returns how many nodes fewer the graph has."""
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass

    before = len(model.graph)
    CommonSubexpressionEliminationPass()(model)
    return before - len(model.graph)
