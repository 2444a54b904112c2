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

_PRODUCT_BIAS, _MASK, _BIAS = 3, 4, 5
"""Places among the operator's inputs: a bias of the products before it, which must not be there, the mask, and the bias of positions."""
_SHARE_LEVELS = 255


def spell_out_attention(model: onnx_ir.Model, *, exclude: Collection[str] = (), round_shares: Collection[str] = ()) -> int:
    """Replace every fused attention with a mask of the padding and without a scale of its own; returns their number.

    Args:
        model: changed in place.
        exclude: names of nodes that are left as they are.
        round_shares: names of nodes, masked or not, that are replaced in any case, and round the shares of attention to 8 bit and back.
    """
    found = [node for node in model.graph if node.name in round_shares or (node.name not in exclude and _is_masked(node))]
    masks: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in found:
        padding = _read(node, _MASK)
        if padding is not None and padding not in masks:
            masks[padding] = _added_to_scores(model, padding, node)
        _spell_out(model, node, masks[padding] if padding is not None else None, round_shares=node.name in round_shares)
    return len(found)


def can_be_spelled_out(node: onnx_ir.Node) -> bool:
    """Whether a node is fused attention over a text or a sound, whose keys and values are all there."""
    whole = node.op_type == ATTENTION and 2 < len(node.inputs) <= _BIAS + 1
    return whole and _read(node, _PRODUCT_BIAS) is None and all(value is not None for value in node.inputs[:3])


def _is_masked(node: onnx_ir.Node) -> bool:
    return can_be_spelled_out(node) and _read(node, _MASK) is not None and node.attributes.get_float("scale", 0.0) == 1.0


def _read(node: onnx_ir.Node, place: int) -> onnx_ir.Value | None:
    return node.inputs[place] if len(node.inputs) > place else None


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


def _spell_out(model: onnx_ir.Model, node: onnx_ir.Node, mask: onnx_ir.Value | None, *, round_shares: bool) -> None:
    import onnx_ir

    name, heads = node.name or "", node.attributes.get_int("num_heads", 1)
    made: list[onnx_ir.Node] = []

    def step(operator: str, operands: list[onnx_ir.Value], what: str, **attributes: object) -> onnx_ir.Value:
        made.append(onnx_ir.node(operator, operands, attributes, name=f"{name}_{what}"))
        made[-1].outputs[0].name = f"{name}_{what}_value"
        return made[-1].outputs[0]

    def parted(value: onnx_ir.Value | None, what: str, axes: tuple[int, ...]) -> onnx_ir.Value:
        assert value is not None  # can_be_spelled_out saw them
        shape = np.array([0, 0, heads, -1], dtype=np.int64)
        heads_apart = step("Reshape", [value, shared_initializer(model, _shape_name(shape), shape)], f"{what}_parted")
        return step("Transpose", [heads_apart], what, perm=axes)

    query, key = parted(node.inputs[0], "query", PART_AXES), parted(node.inputs[1], "key", KEY_AXES)
    value = parted(node.inputs[2], "value", PART_AXES)
    scores = step("MatMul", [query, key], "products")
    if (scale := node.attributes.get_float("scale", 0.0)) != 1.0:
        factor = shared_initializer(model, f"attention_scale_{scale}", np.float32(scale))
        scores = step("Mul", [scores, factor], "scaled")
    if (bias := _read(node, _BIAS)) is not None:
        scores = step("Add", [scores, bias], "biased")
    if mask is not None:
        scores = step("Add", [scores, mask], "scores")
    shares = step("Softmax", [scores], "shares", axis=-1)
    if round_shares:
        grid = [
            shared_initializer(model, "attention_share_step", np.float32(1 / _SHARE_LEVELS)),
            shared_initializer(model, "attention_share_zero", np.array(0, dtype=np.uint8)),
        ]
        shares = step("DequantizeLinear", [step("QuantizeLinear", [shares, *grid], "shares_rounded"), *grid], "shares_back")
    mixed = step("MatMul", [shares, value], "mixed")
    shape = np.array([0, 0, -1], dtype=np.int64)
    joined = shared_initializer(model, _shape_name(shape), shape)
    result = step("Reshape", [step("Transpose", [mixed], "joined", perm=PART_AXES), joined], "result")
    model.graph.insert_before(node, made)
    take_over(node, result)


def _shape_name(shape: np.ndarray) -> str:
    return "attention_shape_" + "_".join(str(size) for size in shape)
