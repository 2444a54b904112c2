"""SmoothQuant: move the outliers of an activation into the weights that it meets, where 8 bits per channel can hold them.

After Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2022): with
``s_k = max|x_k|^alpha / max|w_k|^(1 - alpha)``, ``x W = (x / s) (s W)``. The division goes into the norm before the product where products
alone read it; in encoders whose norms also feed the residual path it is a Mul of its own. What an attention gives is a mean of values,
channel by channel, so there the division goes into the product that makes the values.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.calibration import ActivationStatistics
from hfaccel.quant.scheme import bias_after, matmul_sites
from hfaccel.rewrites.fuse_attention import ATTENTION
from hfaccel.rewrites.graphs import computed_input, new_initializer

if TYPE_CHECKING:
    import onnx_ir

_SMALLEST = 1e-5


def smooth_activations(
    model: onnx_ir.Model,
    statistics: dict[str, ActivationStatistics],
    alpha: float,
    *,
    names: Collection[str],
    exclude: Collection[str] = (),
) -> int:
    """Scale activations before the MatMuls that read them; exact in float arithmetic.

    Args:
        model: changed in place.
        statistics: per activation name; those of the scaled values are added.
        alpha: share of the outliers that moves into the weights, 0 to 1.
        names: activations to scale, where ``statistics`` knows them.
        exclude: names of MatMuls that keep the unscaled activation.

    Returns:
        How many activations were scaled.
    """
    import onnx_ir

    nodes = {node.name: node for node in model.graph}
    readers: dict[str, list[onnx_ir.Node]] = {}
    products = {nodes[site.node] for site in matmul_sites(model)}
    for site in matmul_sites(model):
        if site.activation in names and site.activation in statistics and site.node not in exclude:
            readers.setdefault(site.activation, []).append(nodes[site.node])
    for name, matmuls in readers.items():
        activation = matmuls[0].inputs[0]
        assert activation is not None  # matmul_sites names only MatMuls with an activation
        weights = [_weight(node) for node in matmuls]
        scale = smoothing_scale(statistics[name].channel_abs_max, weights, alpha)
        factor = (1.0 / scale).astype(np.float32)
        for node, weight in zip(matmuls, weights, strict=True):
            node.replace_input_with(1, new_initializer(model, f"{node.name}_smoothed_weight", weight * scale[:, None]))
        others = {use.node for use in activation.uses()}.difference(matmuls)
        if (not others and scale_values(model, activation, factor)) or (
            others <= products and scale_norm(model, activation, factor, others)
        ):
            statistics[name] = statistics[name].scaled(factor)
            continue
        constant = new_initializer(model, f"{name}_smoothing", factor)
        product = onnx_ir.node("Mul", [activation, constant], num_outputs=1, name=f"{name}_smoothed")
        output = product.outputs[0]
        statistics[f"{name}_smoothed"] = statistics[name].scaled(factor)
        output.name, output.shape, output.type = f"{name}_smoothed", activation.shape, activation.type
        model.graph.insert_before(matmuls[0], product)
        for node in matmuls:
            node.replace_input_with(0, product.outputs[0])
    return len(readers)


def scale_norm(model: onnx_ir.Model, activation: onnx_ir.Value, factor: np.ndarray, unscaled: Collection[onnx_ir.Node]) -> bool:
    """Multiply what a norm gives by a factor [channels], in its weight and bias.

    Args:
        model: changed in place.
        activation: read by products alone.
        factor: to multiply by.
        unscaled: those of the products whose weights take it back.

    Returns:
        False, and the graph is as it was, where ``activation`` is something else.
    """
    norm = activation.producer()
    if norm is None or norm.op_type != "LayerNormalization" or activation.is_graph_output():
        return False
    constants = [value for value in norm.inputs[1:] if value is not None]
    if any(value.const_value is None for value in constants):
        return False
    for place, value in enumerate(constants, 1):
        assert value.const_value is not None  # seen above
        norm.replace_input_with(
            place, new_initializer(model, f"{norm.name}_smoothed_{place}", value.const_value.numpy() * factor)
        )
    for node in unscaled:
        node.replace_input_with(1, new_initializer(model, f"{node.name}_unsmoothed_weight", _weight(node) / factor[:, None]))
    return True


def scale_values(model: onnx_ir.Model, attention: onnx_ir.Value, factor: np.ndarray) -> bool:
    """Multiply what a fused attention gives by a factor [channels], in the weight and bias of the product that makes its values.

    Returns:
        False, and the graph is as it was, where ``attention`` is something else, or where others read those values too.
    """
    values = _values_of(attention)
    if values is None:
        return False
    whole, start = _packed(values)
    biased = whole.producer()
    product = biased
    if biased is not None and biased.op_type == "Add":
        result = computed_input(biased)
        product = result.producer() if result is not None else None
    if product is None or product.op_type != "MatMul" or product.inputs[1] is None or product.inputs[1].const_value is None:
        return False
    bias = None if product is biased else bias_after(product)
    if product is not biased and (bias is None or bias[0] is not biased):
        return False
    columns = slice(start, start + len(factor))
    weight = _weight(product).copy()
    weight[:, columns] *= factor
    product.replace_input_with(1, new_initializer(model, f"{product.name}_values_scaled_weight", weight))
    if bias is not None:
        add, constant = bias
        assert constant.const_value is not None  # of bias_after
        shift = constant.const_value.numpy().copy()
        shift[columns] *= factor
        place = next(place for place, value in enumerate(add.inputs) if value is constant)
        add.replace_input_with(place, new_initializer(model, f"{product.name}_values_scaled_bias", shift))
    return True


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


def smoothing_scale(channel_abs_max: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """The scale [channels] by which activations are divided; geometric mean 1, constant or dead channels are safe."""
    weight_abs_max = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    scale = np.maximum(channel_abs_max, _SMALLEST) ** alpha / np.maximum(weight_abs_max, _SMALLEST) ** (1 - alpha)
    return np.asarray(scale / np.exp(np.log(scale).mean()), dtype=np.float32)


def _weight(node: onnx_ir.Node) -> np.ndarray:
    constant = node.inputs[1]
    assert constant is not None and constant.const_value is not None  # matmul_sites names only constant weights
    return constant.const_value.numpy()
