"""Readable symbolic dimensions: what the exporter calls ``s18`` becomes ``batch``, ``s41`` becomes ``sequence``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

_AXES = ("batch", "sequence")


def name_symbols(model: onnx_ir.Model) -> int:
    """Rename the symbols of the graph inputs' [batch, sequence] axes everywhere; returns the number of shapes changed.

    The first graph input decides which symbol is which; sums such as ``s18*s41`` keep their form with the new names.
    """
    import onnx_ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in zip(_AXES, value.shape or (), strict=False):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value and dim.value not in _AXES:
                names[dim.value] = axis
    if not names:
        return 0
    changed = 0
    values = [*model.graph.inputs, *model.graph.outputs]
    values += [output for node in model.graph.all_nodes() for output in node.outputs]
    for value in values:
        if value.shape is None:
            continue
        dims = [names.get(dim.value or "", dim.value) if isinstance(dim, onnx_ir.SymbolicDim) else dim for dim in value.shape]
        renamed = onnx_ir.Shape(dims)
        if renamed != value.shape:
            value.shape = renamed
            changed += 1
    return changed
