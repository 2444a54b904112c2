"""Multiply the weights of query and key by the scale of the attention, instead of their results at every call.

Exporters write ``softmax((q * s) (k * s)^T)`` with two operators over [batch, heads, sequence, head size], or ``softmax(q k^T / s)`` with one
over the scores. All products are linear, so the factors belong into weights and biases. Exact but for the rounding of the weights
(1 in 10 million).

    MatMul(x, W) -> Add(b) -> Reshape -> Transpose -> Mul(s)                     MatMul(x, W) -> ... -> MatMul(q, k) -> Div(s)
    MatMul(x, W * s) -> Add(b * s) -> Reshape -> Transpose                       MatMul(x, W / s) -> ... -> MatMul(q, k)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import computed_input, constant_input, new_initializer

if TYPE_CHECKING:
    import onnx_ir

_SCALINGS = frozenset({"Mul", "Div"})
_LAYOUT = frozenset({"Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze"})


def fold_attention_scale(model: onnx_ir.Model) -> int:
    """Fold every multiplication of a projection's result, or of scores, by one number into weight and bias; returns their number."""
    return sum(_fold(model, node) for node in list(model.graph) if node.op_type in _SCALINGS and node.domain in ("", "ai.onnx"))


def _fold(model: onnx_ir.Model, scaling: onnx_ir.Node) -> int:
    from onnx_ir.convenience import replace_all_uses_with

    scaled, constant = computed_input(scaling), constant_input(scaling)
    factor = constant.const_value if constant is not None else None
    if scaled is None or factor is None or factor.size != 1 or scaling.outputs[0].is_graph_output():
        return 0
    parts = _projection(scaled, scaling)
    if parts is None or factor.dtype != parts[0].inputs[1].const_value.dtype:  # type: ignore[union-attr]  # _projection saw it
        return 0
    number = factor.numpy().reshape(())
    if scaling.op_type == "Div":
        if scaling.inputs[1] is not constant or number == 0:
            return 0
        number = 1 / number
    for node in parts:
        constant = constant_input(node)
        assert constant is not None and constant.const_value is not None  # _projection saw it
        array = np.asarray(constant.const_value.numpy() * number, dtype=constant.const_value.numpy().dtype)
        node.replace_input_with(node.inputs.index(constant), new_initializer(model, f"{node.name}_scaled_constant", array))
    replace_all_uses_with(scaling.outputs[0], scaled)
    model.graph.remove(scaling, safe=True)
    return 1


def _projection(value: onnx_ir.Value, reader: onnx_ir.Node) -> tuple[onnx_ir.Node, ...] | None:
    """MatMul, and Add where there is one, that ``value`` is the rearranged result of, if nothing but ``reader`` reads it.

    Of scores, the product of two such results, those of the query.
    """
    found: list[onnx_ir.Node] = []
    while True:
        node = value.producer()
        users = {user for user, _ in value.uses() if user.op_type != "Shape"}
        if node is None or users != {reader} or value.is_graph_output() or node.domain not in ("", "ai.onnx"):
            return None
        constants = [item for item in node.inputs if item is not None and item.const_value is not None]
        if node.op_type == "MatMul" and constants:
            right = node.inputs[1] in constants and len(constants) == 1
            return (node, *found) if right else None
        scores = node.op_type == "MatMul"
        if node.op_type == "Add" and len(constants) == 1 and not found:
            found.append(node)
        elif (scores and found) or not (scores or node.op_type in _LAYOUT):
            return None
        left = node.inputs[0] if scores else computed_input(node)
        if left is None or (node.op_type in _LAYOUT and node.inputs[0] is not left):
            return None
        value, reader = left, node
