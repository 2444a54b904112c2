"""The values of fused attention: where they are made, and how they are scaled or shifted there.

What an attention gives is a mean of its values, channel by channel, with shares that sum up to one. So a factor of the values is a factor
of the result, and what is subtracted from every value is missing in every result by just as much. Both are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.scheme import bias_after
from hfaccel.rewrites.fuse_attention import ATTENTION
from hfaccel.rewrites.graphs import computed_input, new_initializer, only_reader_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir


@dataclass(frozen=True)
class ValueProduct:
    """What makes the values of an attention.

    Attributes:
        value: the values [batch, sequence, channels], which nothing else reads.
        product: a MatMul with a constant weight.
        columns: those of its weight that make the values; the others may make queries and keys.
        bias: the Add after it, and the constant that it adds; None where there is none.
    """

    value: onnx_ir.Value
    product: onnx_ir.Node
    columns: slice
    bias: tuple[onnx_ir.Node, onnx_ir.Value] | None


def value_product(attention: onnx_ir.Value, channels: int) -> ValueProduct | None:
    """What makes the values of an attention that gives ``attention``; None where that is something else, or others read them too."""
    values = _values_of(attention)
    if values is None:
        return None
    whole, start = _packed(values)
    biased = whole.producer()
    product = biased
    if biased is not None and biased.op_type == "Add":
        result = computed_input(biased)
        product = result.producer() if result is not None else None
    if product is None or product.op_type != "MatMul" or product.inputs[1] is None or product.inputs[1].const_value is None:
        return None
    bias = None if product is biased else bias_after(product)
    if product is not biased and (bias is None or bias[0] is not biased):
        return None
    return ValueProduct(values, product, slice(start, start + channels), bias)


def scale_values(model: onnx_ir.Model, attention: onnx_ir.Value, factor: np.ndarray) -> onnx_ir.Value | None:
    """Multiply what a fused attention gives by a factor [channels], in the weight and bias of the product that makes its values.

    Returns:
        The values; None, and the graph is as it was, where ``attention`` is something else, or where others read those values too.
    """
    found = value_product(attention, len(factor))
    if found is None:
        return None
    weight = _array(found.product.inputs[1]).copy()
    weight[:, found.columns] *= factor
    found.product.replace_input_with(1, new_initializer(model, f"{found.product.name}_values_scaled_weight", weight))
    if found.bias is not None:
        _replace_bias(model, found.bias, found.columns, lambda bias: bias * factor, f"{found.product.name}_values_scaled_bias")
    return found.value


def center_values(model: onnx_ir.Model, attention: onnx_ir.Value, mean: np.ndarray) -> onnx_ir.Value | None:
    """Subtract a mean [channels] from the values of a fused attention, and add what the result lacks to the bias of the product that reads it.

    Both go into biases that are there already, so nothing more is computed.

    Returns:
        The values; None, and the graph is as it was, where one of the two has no bias of its own or is something else.
    """
    found, maker = value_product(attention, len(mean)), attention.producer()
    reader = only_reader_of(maker, "MatMul")
    after = bias_after(reader) if reader is not None else None
    if found is None or found.bias is None or reader is None or after is None:
        return None
    missing = mean @ _array(reader.inputs[1])
    _replace_bias(model, found.bias, found.columns, lambda bias: bias - mean, f"{found.product.name}_values_centered_bias")
    _replace_bias(model, after, slice(None), lambda bias: bias + missing, f"{reader.name}_of_centered_values_bias")
    return found.value


def _replace_bias(
    model: onnx_ir.Model,
    bias: tuple[onnx_ir.Node, onnx_ir.Value],
    columns: slice,
    change: Callable[[np.ndarray], np.ndarray],
    name: str,
) -> None:
    add, constant = bias
    changed = _array(constant).astype(np.float32)
    changed[columns] = change(changed[columns])
    place = next(place for place, value in enumerate(add.inputs) if value is constant)
    add.replace_input_with(place, new_initializer(model, name, changed))


def _values_of(attention: onnx_ir.Value) -> onnx_ir.Value | None:
    """The values [batch, sequence, channels] that a fused attention reads, or an ``If`` of two, if nothing else reads them."""
    maker = attention.producer()
    if maker is None:
        return None
    branches = [attribute.as_graph() for attribute in maker.attributes.values()] if maker.op_type == "If" else [[maker]]
    nodes = [node for branch in branches for node in branch]
    values = {node.inputs[2] for node in nodes if node.op_type == ATTENTION and len(node.inputs) > 2}
    value = values.pop() if len(values) == 1 and len(nodes) == len(branches) else None
    if value is None or any(use.node not in nodes or use.idx != 2 for use in value.uses()):
        return None
    return value


def _packed(value: onnx_ir.Value) -> tuple[onnx_ir.Value, int]:
    """What a value was split from along its channels, and at which channel it begins; itself, and 0, where it was not."""
    split = value.producer()
    if split is None or split.op_type != "Split" or split.attributes.get_int("axis", 0) not in (-1, 2):
        return value, 0
    whole, sizes = split.inputs[0], split.inputs[1] if len(split.inputs) > 1 else None
    if whole is None or sizes is None or sizes.const_value is None or len(tuple(whole.uses())) != 1:
        return value, 0
    before = sizes.const_value.numpy()[: list(split.outputs).index(value)]
    return whole, int(before.sum())


def _array(value: onnx_ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # value_product and bias_after saw it
    return value.const_value.numpy()
