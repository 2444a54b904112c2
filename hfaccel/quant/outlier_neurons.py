"""Keep the few feed-forward neurons with outlier activations in float, the many others go to 8 bit.

A feed-forward block is a sum over its neurons: ``gelu(x W1 + b1) W2 = sum_n gelu(x W1[:, n] + b1[n]) W2[n]``. A handful of
neurons (8 of 1536 in MiniLM) reach magnitudes five times those of all others and so set the 8-bit scale for everybody.
Split into two groups the block is the same function, and the big group's scale fits it: measured on MiniLM, the error of the
second product falls twentyfold, at the price of a MatMul 1 % as wide.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.calibration import ActivationStatistics
from hfaccel.quant.scheme import bias_after, matmul_sites
from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    import onnx_ir

_ACTIVATIONS = frozenset({"Gelu", "Relu"})
_WORTH_A_SPLIT = 1.4


@dataclass(frozen=True)
class FeedForward:
    """One block: ``down(activation(up(x) + bias))``."""

    up: onnx_ir.Node
    bias: onnx_ir.Node
    activation: onnx_ir.Node
    down: onnx_ir.Node

    @property
    def bias_position(self) -> int:
        """Of the constant among what the bias adds."""
        return next(place for place, value in enumerate(self.bias.inputs) if value is not None and value.const_value is not None)


def feed_forward_blocks(model: onnx_ir.Model) -> tuple[FeedForward, ...]:
    """Blocks of the form MatMul, Add, Gelu or Relu, MatMul, each result read by the next operator only."""
    nodes = {node.name: node for node in model.graph}
    blocks = []
    for site in matmul_sites(model):
        down = nodes[site.node]
        activation = _single_producer(down.inputs[0])
        if activation is None or activation.op_type not in _ACTIVATIONS:
            continue
        bias = _single_producer(activation.inputs[0])
        if bias is None or bias.op_type != "Add":
            continue
        up = next((_single_producer(value) for value in bias.inputs if value is not None and value.const_value is None), None)
        constants = [value for value in bias.inputs if value is not None and value.const_value is not None]
        if up is None or up.op_type != "MatMul" or not constants or len(constants[0].shape or ()) != 1:
            continue
        if up.inputs[1] is not None and up.inputs[1].const_value is not None:
            blocks.append(FeedForward(up, bias, activation, down))
    return tuple(blocks)


def observed_blocks(
    model: onnx_ir.Model, statistics: Mapping[str, ActivationStatistics]
) -> Iterator[tuple[FeedForward, onnx_ir.Value, ActivationStatistics]]:
    """The blocks of which the activation was seen, each with it and its statistics."""
    for block in feed_forward_blocks(model):
        value = block.down.inputs[0]
        known = statistics.get(value.name or "") if value is not None else None
        if value is not None and known is not None:
            yield block, value, known


def split_outlier_neurons(
    model: onnx_ir.Model, statistics: dict[str, ActivationStatistics], count: int, *, only: Collection[str] | None = None
) -> tuple[str, ...]:
    """Split ``count`` neurons off every feed-forward block that has outliers; exact in float arithmetic.

    A block whose largest activation is less than 1.4 times that of the neurons that would stay is left whole: the split would cost time
    (3 % in openvino) for half a bit. The statistics of those activations become those of the neurons that stay.

    Args:
        model: float graph; changed in place.
        statistics: of its activations; changed with it.
        count: neurons of a block.
        only: names of the blocks' second MatMuls; None for all blocks.

    Returns:
        Names of the MatMuls of the split-off part, which must stay in float.
    """
    kept: list[str] = []
    for block, value, known in observed_blocks(model, statistics):
        neurons = len(known.channel_abs_max)
        if neurons <= 2 * count or (only is not None and block.down.name not in only):
            continue
        order = np.argsort(-known.channel_abs_max)
        if known.channel_abs_max[order[0]] < _WORTH_A_SPLIT * known.channel_abs_max[order[count]]:
            continue
        outliers = np.sort(order[:count])
        others = np.setdiff1d(np.arange(neurons), outliers)
        kept += _split(model, block, outliers, others)
        statistics[value.name or ""] = known.of_channels(others)
    return tuple(kept)


def _split(model: onnx_ir.Model, block: FeedForward, outliers: np.ndarray, others: np.ndarray) -> tuple[str, str]:
    import onnx_ir

    up_weight, down_weight = constant_of(block.up, 1), constant_of(block.down, 1)
    bias = constant_of(block.bias, block.bias_position)
    name = block.down.name

    biased = bias_after(block.down)
    last = biased[0] if biased is not None else block.down  # a bias stays beside its product, where kernels add it on the way
    result = last.outputs[0]
    readers = list(result.uses())
    small = [
        new_initializer(model, f"{name}_outlier_up_weight", up_weight[:, outliers]),
        new_initializer(model, f"{name}_outlier_bias", bias[outliers]),
        new_initializer(model, f"{name}_outlier_down_weight", down_weight[outliers]),
    ]
    up = onnx_ir.node("MatMul", [block.up.inputs[0], small[0]], name=f"{name}_outlier_up")
    add = onnx_ir.node("Add", [up.outputs[0], small[1]], name=f"{name}_outlier_bias_add")
    attributes = dict(block.activation.attributes)
    activation = onnx_ir.node(
        block.activation.op_type, [add.outputs[0]], attributes=attributes, name=f"{name}_outlier_activation"
    )
    down = onnx_ir.node("MatMul", [activation.outputs[0], small[2]], name=f"{name}_outlier_down")
    total = onnx_ir.node("Add", [result, down.outputs[0]], name=f"{name}_with_outliers")
    for node in (up, add, activation, down, total):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}_value", result.type
    total.outputs[0].shape = result.shape
    model.graph.insert_after(last, [up, add, activation, down, total])
    for reader, position in readers:
        reader.replace_input_with(position, total.outputs[0])

    block.up.replace_input_with(1, new_initializer(model, f"{block.up.name}_main_weight", up_weight[:, others]))
    block.bias.replace_input_with(block.bias_position, new_initializer(model, f"{block.bias.name}_main_bias", bias[others]))
    block.down.replace_input_with(1, new_initializer(model, f"{name}_main_weight", down_weight[others]))
    for node in (block.up, block.bias, block.activation):
        output = node.outputs[0]
        if output.shape is not None:
            output.shape = onnx_ir.Shape([*output.shape[:-1], len(others)])
    return up.name or "", down.name or ""


def _single_producer(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def constant_of(node: onnx_ir.Node, position: int) -> np.ndarray:
    """The weight or the bias that a node of a block reads at a position."""
    value = node.inputs[position]
    assert value is not None and value.const_value is not None  # feed_forward_blocks checked it
    return value.const_value.numpy()
