"""Fused attention as the standard operators that OpenVINO fuses itself, in the form it computes fastest.

    MultiHeadAttention(query, key, value, mask, bias)
    Reshape, Transpose (query, key, value) -> MatMul -> Add(bias) -> Add(mask) -> Softmax -> MatMul -> Transpose -> Reshape

The inverse of :mod:`hfaccel.rewrites.fuse_attention` once the mask is read always, with two differences to what exporters write: the mask is
one row per text rather than one per token, and the key is transposed once. With scores of 8 bits that is 2 % faster than the fused
operator (MiniLM; BERT-base up to 4 %), which OpenVINO takes apart into a mask per token. Exact but for the order of summation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hfaccel.rewrites.fuse_attention import ATTENTION, KEY_AXES, NEVER, PART_AXES
from hfaccel.rewrites.graphs import new_initializer, shared_initializer, take_over

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir

_MASK, _BIAS = 4, 5
"""Places of the mask and of the bias of positions among the operator's inputs; a bias of the products, before them, must not be there."""


def spell_out_attention(model: onnx_ir.Model, *, exclude: Collection[str] = ()) -> int:
    """Replace every fused attention with a mask of the padding and without a scale of its own; returns their number.

    Args:
        model: changed in place.
        exclude: names of nodes that are left as they are.
    """
    found = [node for node in model.graph if node.name not in exclude and _is_masked(node)]
    masks: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in found:
        padding = node.inputs[_MASK]
        assert padding is not None  # _is_masked saw it
        if padding not in masks:
            masks[padding] = _added_to_scores(model, padding, node)
        _spell_out(model, node, masks[padding])
    return len(found)


def _is_masked(node: onnx_ir.Node) -> bool:
    if (
        node.op_type != ATTENTION
        or len(node.inputs) not in (_MASK + 1, _BIAS + 1)
        or node.inputs[_MASK] is None
        or node.inputs[_MASK - 1] is not None
    ):
        return False
    widths = [value.shape[-1] if value is not None and value.shape is not None else None for value in node.inputs[:3]]
    return node.attributes.get_float("scale", 0.0) == 1.0 and all(isinstance(width, int) for width in widths)


def _added_to_scores(model: onnx_ir.Model, padding: onnx_ir.Value, first: onnx_ir.Node) -> onnx_ir.Value:
    """[batch, 1, 1, sequence]: 0 for a token that counts, the lowest number for another; from the mask [batch, sequence]."""
    import onnx_ir

    never, one = (
        new_initializer(model, "attention_never", np.float32(NEVER)),
        new_initializer(model, "attention_one", np.float32(1)),
    )
    axes = new_initializer(model, "attention_mask_axes", np.array([1, 2], dtype=np.int64))
    counts = onnx_ir.node("Cast", [padding], {"to": onnx_ir.DataType.FLOAT}, name="attention_counts")
    padded = onnx_ir.node("Sub", [one, counts.outputs[0]], name="attention_padded")
    row = onnx_ir.node("Mul", [padded.outputs[0], never], name="attention_row")
    mask = onnx_ir.node("Unsqueeze", [row.outputs[0], axes], name="attention_rows")
    for node in (counts, padded, row, mask):
        node.outputs[0].name = f"{node.name}_value"
    model.graph.insert_before(first, [counts, padded, row, mask])
    return mask.outputs[0]


def _spell_out(model: onnx_ir.Model, node: onnx_ir.Node, mask: onnx_ir.Value) -> None:
    import onnx_ir

    name, heads = node.name or "", node.attributes.get_int("num_heads", 1)
    made: list[onnx_ir.Node] = []

    def step(operator: str, operands: list[onnx_ir.Value], what: str, **attributes: object) -> onnx_ir.Value:
        made.append(onnx_ir.node(operator, operands, attributes, name=f"{name}_{what}"))
        made[-1].outputs[0].name = f"{name}_{what}_value"
        return made[-1].outputs[0]

    def parted(value: onnx_ir.Value | None, what: str, axes: tuple[int, ...]) -> onnx_ir.Value:
        assert value is not None and value.shape is not None  # _is_masked saw them
        shape = np.array([0, 0, heads, int(value.shape[-1]) // heads], dtype=np.int64)  # type: ignore[arg-type]
        heads_apart = step("Reshape", [value, shared_initializer(model, _shape_name(shape), shape)], f"{what}_parted")
        return step("Transpose", [heads_apart], what, perm=axes)

    query, key = parted(node.inputs[0], "query", PART_AXES), parted(node.inputs[1], "key", KEY_AXES)
    value = parted(node.inputs[2], "value", PART_AXES)
    products = step("MatMul", [query, key], "products")
    if (bias := node.inputs[_BIAS] if len(node.inputs) > _BIAS else None) is not None:
        products = step("Add", [products, bias], "biased")
    scores = step("Add", [products, mask], "scores")
    mixed = step("MatMul", [step("Softmax", [scores], "shares", axis=-1), value], "mixed")
    width = node.inputs[2].shape[-1] if node.inputs[2] is not None and node.inputs[2].shape is not None else 0
    shape = np.array([0, 0, width], dtype=np.int64)
    joined = shared_initializer(model, _shape_name(shape), shape)
    result = step("Reshape", [step("Transpose", [mixed], "joined", perm=PART_AXES), joined], "result")
    model.graph.insert_before(node, made)
    take_over(node, result)


def _shape_name(shape: np.ndarray) -> str:
    return "attention_shape_" + "_".join(str(size) for size in shape)
