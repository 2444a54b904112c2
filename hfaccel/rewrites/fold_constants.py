"""Compute at compile time what depends on constants only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def fold_constants(model: onnx_ir.Model) -> int:
    """Fold constants with onnxscript's folder; returns how many nodes fewer the graph has."""
    from onnxscript import optimizer

    before = len(model.graph)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    return max(0, before - len(model.graph))
