"""Merge what a traced graph does to shapes only: heads split off and merged again, tokens and heads traded and traded back."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir

_SWAPPED_HEADS = [0, 2, 1, 3]


def merge_reshapes(model: onnx_ir.Model) -> int:
    """Leave out reshapes of reshapes, and what changes no shape; returns how often. What nobody reads any more stays."""
    nodes = list(model.graph)
    return sum(_merge_reshape(node) if node.op_type == "Reshape" else _cancel_transpose(node) for node in nodes)


def _merge_reshape(node: onnx_ir.Node) -> int:
    source, output = node.inputs[0], node.outputs[0]
    before = source.producer() if source is not None else None
    changed = 0
    if source is not None and before is not None and before.op_type == "Reshape":
        first = before.inputs[0]
        if first is not None and _means_the_same(node, source, first):
            node.replace_input_with(0, first)
            source, changed = first, 1
    if source is None or output.is_graph_output() or not _equal(source.shape, output.shape) or not output.uses():
        return changed
    output.replace_all_uses_with(source)
    return changed + 1


def _cancel_transpose(node: onnx_ir.Node) -> int:
    """Heads and tokens traded twice."""
    before = node.inputs[0].producer() if _swaps_heads(node) and node.inputs[0] is not None else None
    first = before.inputs[0] if before is not None and _swaps_heads(before) else None
    if first is None or node.outputs[0].is_graph_output() or not node.outputs[0].uses():
        return 0
    node.outputs[0].replace_all_uses_with(first)
    return 1


def _swaps_heads(node: onnx_ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == _SWAPPED_HEADS


def _means_the_same(node: onnx_ir.Node, source: onnx_ir.Value, first: onnx_ir.Value) -> bool:
    """Whether a reshape gives of ``first`` what it gives of ``source``: zeros in its shape stand for sizes of its input."""
    target = node.inputs[1]
    if target is None:
        return False
    if target.const_value is None:
        maker = target.producer()
        return maker is not None and maker.op_type == "Concat"  # of sizes, none of which is zero
    kept = [place for place, size in enumerate(target.const_value.numpy().tolist()) if size == 0]
    if not kept or node.attributes.get_int("allowzero", 0) == 1:
        return not kept
    one, other = source.shape, first.shape
    if one is None or other is None or max(kept) >= min(len(one), len(other)):
        return False
    return all(one[place] == other[place] for place in kept)


def _equal(one: onnx_ir.Shape | None, other: onnx_ir.Shape | None) -> bool:
    """Whether two shapes are known to be the same."""
    if one is None or other is None or len(one) != len(other):
        return False
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in zip(one, other, strict=True))
