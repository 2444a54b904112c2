"""Compute each part of a packed product by itself, for an engine that writes the packed one down and copies the parts out of it.

    x -> MatMul([Wq Wk Wv]) -> Add([bq bk bv]) -> Split          x -> MatMul(Wq) -> Add(bq)
                                                                 x -> MatMul(Wk) -> Add(bk)
                                                                 x -> MatMul(Wv) -> Add(bv)

The inverse of :mod:`hfaccel.rewrites.pack_projections`, for weights in float and for levels with a scale per output channel. Exact: every
column is what it was. Copying the parts costs OpenVINO 1.5 of 37 ms for 8 x 128 tokens (MiniLM), and it can round a part to 8 bit where
it is made only if that has a product of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import constant_input, new_initializer, producer_of, read_instead, shared_initializer

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir


def unpack_projections(model: onnx_ir.Model, *, exclude: Collection[str] = ()) -> int:
    """Unpack every product with a bias whose result is cut along its channels; returns how many products that were.

    Args:
        model: changed in place.
        exclude: names of nodes that are left as they are.
    """
    splits = [node for node in model.graph if node.name not in exclude]
    found = [(split, product) for split in splits if (product := _packed(split)) is not None]
    for split, product in found:
        _unpack(model, split, product)
    if found:
        drop_unused(model)
    return len(found)


def _packed(split: onnx_ir.Node) -> onnx_ir.Node | None:
    """The product whose biased result a node cuts along the channels, if nothing else reads either."""
    if split.op_type != "Split" or split.attributes.get_int("axis", 0) != -1:
        return None
    sizes = split.inputs[1] if len(split.inputs) > 1 else None
    add = producer_of(split.inputs[0], "Add")
    bias = constant_input(add) if add is not None else None
    if add is None or bias is None or bias.const_value is None or sizes is None or sizes.const_value is None:
        return None
    product = next((node for value in add.inputs if (node := producer_of(value, "MatMul")) is not None), None)
    if product is None or len(bias.const_value.shape) != 1 or _operands(product) is None:
        return None
    return None if any(len(tuple(node.outputs[0].uses())) != 1 for node in (add, product)) else product


def _operands(product: onnx_ir.Node) -> tuple[onnx_ir.Value, ...] | None:
    """What a product's weight [in, out] is made of: itself, or its levels, their scales and their zero levels, one per output channel."""
    weight = product.inputs[1]
    if weight is not None and weight.const_value is not None:
        return (weight,)
    back = producer_of(weight, "DequantizeLinear")
    if (
        back is None
        or back.attributes.get_int("axis", 1) != 1
        or any(value is None or value.const_value is None for value in back.inputs)
    ):
        return None
    operands = tuple(value for value in back.inputs if value is not None)
    return operands if all(len(_array(value).shape) == 1 for value in operands[1:]) else None


def _unpack(model: onnx_ir.Model, split: onnx_ir.Node, product: onnx_ir.Node) -> None:
    import onnx_ir

    add = product.outputs[0].consumers()[0]
    bias, operands = constant_input(add), _operands(product)
    assert bias is not None and operands is not None  # _packed saw them
    ends = np.cumsum(_array(split.inputs[1])).tolist()
    for number, (start, end, part) in enumerate(zip([0, *ends[:-1]], ends, list(split.outputs), strict=True)):
        columns, name = slice(start, end), f"{product.name}_{number}"
        pieces = [_columns(model, value, columns, name) for value in operands]
        made = []
        if len(pieces) > 1:
            made.append(onnx_ir.node("DequantizeLinear", pieces, {"axis": 1}, name=f"{name}_weight_back"))
            pieces = list(made[0].outputs)
        made.append(onnx_ir.node("MatMul", [product.inputs[0], pieces[0]], name=name))
        made.append(onnx_ir.node("Add", [made[-1].outputs[0], _columns(model, bias, columns, name)], name=f"{name}_add"))
        for node in made[:-1]:
            node.outputs[0].name = f"{node.name}_value"
        made[-2].outputs[0].type, made[-2].outputs[0].shape = part.type, part.shape
        model.graph.insert_before(split, made)
        read_instead(part, made[-1].outputs[0])
    model.graph.remove(split, safe=True)


def _columns(model: onnx_ir.Model, value: onnx_ir.Value, columns: slice, name: str) -> onnx_ir.Value:
    """The columns of a constant [..., out] as a constant; zero levels that are all the same are shared by name."""
    cut = np.ascontiguousarray(_array(value)[..., columns])
    if cut.ndim == 1 and cut.dtype.kind in "iu" and not cut.any():
        return shared_initializer(model, f"zero_levels_{cut.size}", cut)
    return new_initializer(model, f"{value.name}_of_{name}", cut)


def _array(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # _packed and _operands saw it
    return value.const_value.numpy()
