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

from hfaccel.quant.attention_values import scale_values
from hfaccel.quant.calibration import ActivationStatistics
from hfaccel.quant.scheme import matmul_sites
from hfaccel.rewrites.graphs import new_initializer

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
        values = scale_values(model, activation, factor) if not others else None
        if values is not None or (all(map(_is_product, others)) and scale_norm(model, activation, factor, others)):
            changed = (name,) if values is None or values.name not in statistics else (name, values.name)
            statistics |= {each: statistics[each].scaled(factor) for each in changed}
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


def smoothing_scale(channel_abs_max: np.ndarray, weights: list[np.ndarray], alpha: float) -> np.ndarray:
    """The scale [channels] by which activations are divided; geometric mean 1, constant or dead channels are safe."""
    weight_abs_max = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    scale = np.maximum(channel_abs_max, _SMALLEST) ** alpha / np.maximum(weight_abs_max, _SMALLEST) ** (1 - alpha)
    return np.asarray(scale / np.exp(np.log(scale).mean()), dtype=np.float32)


def _is_product(node: onnx_ir.Node) -> bool:
    """Whether a node that reads an activation is its product with a constant weight."""
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.const_value is not None


def _weight(node: onnx_ir.Node) -> np.ndarray:
    constant = node.inputs[1]
    assert constant is not None and constant.const_value is not None  # matmul_sites names only constant weights
    return constant.const_value.numpy()
