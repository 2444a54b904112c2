"""Compute the projections of one value, such as query, key and value, in one product.

Three products of the same activation with three weights are one product with the weights side by side: the activation is read (and
quantized) once, and there is one start and one end of work for the threads instead of three. Exact: every column is what it was.

    x -> MatMul(Wq) -> Add(bq)          x -> MatMul([Wq Wk Wv]) -> Add([bq bk bv]) -> Split
    x -> MatMul(Wk) -> Add(bk)
    x -> MatMul(Wv) -> Add(bv)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.graphs import constant_input, new_initializer

if TYPE_CHECKING:
    import onnx_ir

PACKED_SUFFIX = "_packed"
"""Ends the name of a packed MatMul, which begins with that of the first it was made of."""
_MOST = 4
"""Larger groups are no layer's: DeBERTa projects one table of positions for all layers, which would be held for all at once."""


def pack_projections(model: onnx_ir.Model) -> int:
    """Pack all groups of products with biases that read the same value; returns the number of products that went away."""
    groups: dict[onnx_ir.Value, list[tuple[onnx_ir.Node, onnx_ir.Node]]] = {}
    for node in model.graph:
        bias = _bias_of(node)
        if bias is not None and node.inputs[0] is not None:
            groups.setdefault(node.inputs[0], []).append((node, bias))
    return sum(_pack(model, value, group) for value, group in groups.items() if 2 <= len(group) <= _MOST)


def _bias_of(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """The Add of a constant vector to the product of a value and a constant matrix, if that is all that reads the product."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or node.outputs[0].is_graph_output():
        return None
    left, weight = node.inputs
    if left is None or left.const_value is not None or weight is None or weight.const_value is None:
        return None
    users = [user for user, _ in node.outputs[0].uses()]
    if (
        len(weight.const_value.shape) != 2
        or len(users) != 1
        or users[0].op_type != "Add"
        or users[0].domain not in ("", "ai.onnx")
    ):
        return None
    bias = constant_input(users[0])
    if bias is None or bias.const_value is None or list(bias.const_value.shape) != [weight.const_value.shape[1]]:
        return None
    return users[0]


def _pack(model: onnx_ir.Model, source: onnx_ir.Value, group: list[tuple[onnx_ir.Node, onnx_ir.Node]]) -> int:
    import onnx_ir
    from onnx_ir.convenience import replace_all_uses_with

    weights = [_array(product.inputs[1]) for product, _ in group]
    biases = [_array(constant_input(bias)) for _, bias in group]
    if len({array.dtype for array in (*weights, *biases)}) != 1 or source.shape is None:
        return 0
    name = f"{group[0][0].name}{PACKED_SUFFIX}"
    sizes = np.array([weight.shape[1] for weight in weights], dtype=np.int64)
    weight = new_initializer(model, f"{name}_weight", np.concatenate(weights, axis=1))
    product = onnx_ir.node("MatMul", [source, weight], name=name)
    bias = new_initializer(model, f"{name}_bias", np.concatenate(biases))
    added = onnx_ir.node("Add", [product.outputs[0], bias], name=f"{name}_add")
    parts = [added.outputs[0], new_initializer(model, f"{name}_sizes", sizes)]
    split = onnx_ir.node("Split", parts, {"axis": -1}, num_outputs=len(group), name=f"{name}_split")
    for node in (product, added):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}_output", group[0][1].outputs[0].type
        node.outputs[0].shape = onnx_ir.Shape([*source.shape[:-1], int(sizes.sum())])
    model.graph.insert_before(group[0][0], [product, added, split])
    for number, (_, old) in enumerate(group):
        part = split.outputs[number]
        part.name, part.type, part.shape = f"{name}_part_{number}", old.outputs[0].type, old.outputs[0].shape
        replace_all_uses_with(old.outputs[0], part, replace_graph_outputs=True)
    for old_product, old in group:
        model.graph.remove([old, old_product], safe=True)
    return len(group) - 1


def _array(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # _bias_of saw it
    return value.const_value.numpy()
