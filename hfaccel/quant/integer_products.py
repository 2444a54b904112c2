"""Products of 8 bit with one scale for all of an activation: calibrated (``static``) or of each call (``dynamic``).

onnxruntime's own quantizers write operators that it fuses when it opens the graph, but for a bias after a calibrated product, which stays
an operator of its own: one more pass over the result, a twentieth of MiniLM's time. Here the fused operators are written, bias
included. Another engine needs the standard pairs of ``QuantizeLinear`` and ``DequantizeLinear`` around float products.
"""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.channel_weight import ChannelWeights
from hfaccel.quant.scheme import activation_grid, bias_after
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import DOMAIN, new_initializer, shared_initializer, take_over

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_ir

    from hfaccel.quant.channel_weight import ChannelWeight
    from hfaccel.recipe.weight_format import WeightFormat


def store_dynamic(model: onnx_ir.Model, names: Collection[str], weights: WeightFormat, *, per_channel: bool) -> None:
    """Compute the named MatMuls of a graph, each with a float weight, in 8 bit with the range of each call; in place.

    An activation that several of them read is rounded once.
    """
    products = [node for node in model.graph if node.name in names]
    readers = Counter(node.inputs[0] for node in products)
    stored = ChannelWeights(model, weights, per_channel=per_channel)
    rounded: dict[onnx_ir.Value, onnx_ir.Node] = {}
    for node in products:
        activation, (levels, scales) = node.inputs[0], stored.of(node)
        assert activation is not None  # matmul_sites names only MatMuls with an activation
        if readers[activation] == 1:
            _replace(model, node, "DynamicQuantizeMatMul", [activation, levels, scales, None])
            continue
        if activation not in rounded:
            rounded[activation] = _node("DynamicQuantizeLinear", [activation], f"{activation.name}_rounded", outputs=3)
            model.graph.insert_before(node, rounded[activation])
        integers, scale, zero = rounded[activation].outputs
        _replace(model, node, "MatMulIntegerToFloat", [integers, levels, scale, scales, zero, None])
    _tidy(model)


def store_static(
    model: onnx_ir.Model,
    names: Collection[str],
    ranges: Mapping[str, tuple[float, float]],
    weights: WeightFormat,
    *,
    per_channel: bool,
    portable: bool = False,
    rounded: Mapping[str, ChannelWeight] = MappingProxyType({}),
) -> None:
    """Compute the named MatMuls of a graph, each with a float weight, in 8 bit with calibrated ranges; in place.

    Args:
        model: the graph.
        names: of the MatMuls.
        ranges: lowest and highest value of the activations, by name.
        weights: how they are stored.
        per_channel: one scale per output channel of a weight, else one for all of it.
        portable: in standard operators that any engine reads, and fuses if it can.
        rounded: weights that are rounded already, by name.
    """
    stored = ChannelWeights(model, weights, per_channel=per_channel, rounded=rounded)
    activations: dict[str, tuple[onnx_ir.Value, ...]] = {}
    back: dict[str, onnx_ir.Value] = {}
    for node in [node for node in model.graph if node.name in names]:
        integers, scale, zero = _rounded(model, node, ranges, activations)
        levels, scales = stored.of(node)
        if portable:
            node.replace_input_with(0, _back(model, node, [integers, scale, zero], back))
            node.replace_input_with(1, _back(model, node, [levels, scales, _zeros(model, scales)], back))
        else:
            _replace(model, node, "MatMulIntegerToFloat", [integers, levels, scale, scales, zero, None])
    _tidy(model)


def _back(
    model: onnx_ir.Model, node: onnx_ir.Node, rounded: list[onnx_ir.Value], known: dict[str, onnx_ir.Value]
) -> onnx_ir.Value:
    """Levels with their scale and zero level as floats again, put before a node; ``known`` are those made so far."""
    name = rounded[0].name or ""
    if name not in known:
        made = _node("DequantizeLinear", rounded, f"{name}_back", axis=1 if rounded[1].shape else None)
        model.graph.insert_before(node, made)
        known[name] = made.outputs[0]
    return known[name]


def _rounded(
    model: onnx_ir.Model,
    node: onnx_ir.Node,
    ranges: Mapping[str, tuple[float, float]],
    known: dict[str, tuple[onnx_ir.Value, ...]],
) -> tuple[onnx_ir.Value, ...]:
    """Levels uint8 of what a MatMul reads, their scale and their zero level; ``known`` are those made so far."""
    activation = node.inputs[0]
    assert activation is not None and activation.name is not None  # matmul_sites names only MatMuls with an activation
    name = activation.name
    if name not in known:
        scale, zero = activation_grid(*ranges[name])
        grid = new_initializer(model, f"{name}_scale", scale), new_initializer(model, f"{name}_zero_level", zero)
        rounding = _node("QuantizeLinear", [activation, *grid], f"{name}_rounded")
        model.graph.insert_before(node, rounding)
        known[name] = (rounding.outputs[0], *grid)
    return known[name]


def _replace(model: onnx_ir.Model, node: onnx_ir.Node, operator: str, operands: list[onnx_ir.Value | None]) -> None:
    """Put onnxruntime's operator in the place of a MatMul, and of the bias after it if there is one."""
    import onnx_ir

    added = bias_after(node)
    if added is not None:
        operands = [*operands, added[1]]
    product = onnx_ir.node(operator, operands, domain=DOMAIN, name=node.name)
    model.graph.insert_before(node, product)
    last = node if added is None else added[0]
    take_over(last, product.outputs[0])
    if last is not node:
        model.graph.remove(node, safe=True)


def _zeros(model: onnx_ir.Model, scales: onnx_ir.Value) -> onnx_ir.Value:
    """Zero levels int8 for scales of a weight: openvino wants them written out."""
    assert scales.shape is not None  # an initializer
    shape = scales.shape.numpy()
    return shared_initializer(model, "zero_levels_" + "_".join(map(str, shape)), np.zeros(shape, dtype=np.int8))


def _node(operator: str, operands: list[onnx_ir.Value], name: str, *, outputs: int = 1, axis: int | None = None) -> onnx_ir.Node:
    import onnx_ir

    attributes = {} if axis is None else {"axis": axis}
    node = onnx_ir.node(operator, operands, attributes=attributes, num_outputs=outputs, name=name)
    for number, output in enumerate(node.outputs):
        output.name = f"{name}_{number}"
    return node


def _tidy(model: onnx_ir.Model) -> None:
    model.graph.opset_imports[DOMAIN] = 1
    drop_unused(model)
