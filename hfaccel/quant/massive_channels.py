"""Channels that are hundreds of times larger than the others, in a few tokens, stay in float.

Language models write a vector of enormous size for a text's first token, which attention then leans on (massive activations, Sun et al.,
arXiv:2402.17762). It comes out of two or three channels of one or two feed-forward blocks: in SmolLM2-135M out of two of 1,536, with values
of 2,953 and 1,056 where the median of a channel's largest value is 1.2. Rounding the weights of these channels, and to one scale with them the
others of the token, does a third of the harm of all 8-bit products together. They are computed on their own:

    x -> MatMul(W)    x -> Mul(0 at these channels) -> MatMul(W, whose rows of these channels are 0) -> Add
                      x -> Gather(these channels) --> MatMul(these rows of W) ------------------------> Add

Exact but for the order of summation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.scheme import matmul_sites
from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.quant.calibration import ActivationStatistics

_MOST = 64
"""Where more channels of a product stand out, none does: that is how they are spread."""


def split_massive_channels(
    model: onnx_ir.Model, statistics: Mapping[str, ActivationStatistics], ratio: float, names: Collection[str]
) -> tuple[str, ...]:
    """Split off the channels whose largest magnitude is more than ``ratio`` times the median channel's.

    Args:
        model: float graph; changed in place.
        statistics: of activations by name; those without are left alone.
        ratio: to the median of the largest magnitudes of a product's channels.
        names: of the MatMuls that may be split.

    Returns:
        Names of the small MatMuls of what was split off, which must stay in float.
    """
    chosen = [site for site in matmul_sites(model) if site.node in names]
    nodes = {node.name: node for node in model.graph}
    return tuple(
        _split(model, nodes[site.node], massive)
        for site in chosen
        if (known := statistics.get(site.activation)) is not None and len(massive := _massive(known.channel_abs_max, ratio))
    )


def _massive(largest: np.ndarray, ratio: float) -> np.ndarray:
    found = np.flatnonzero(largest > ratio * max(float(np.median(largest)), float(np.finfo(np.float32).tiny)))
    return found if len(found) <= _MOST else found[:0]


def _split(model: onnx_ir.Model, node: onnx_ir.Node, channels: np.ndarray) -> str:
    import onnx_ir

    activation, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
    assert activation is not None and weight is not None and weight.const_value is not None  # of a site
    name, values = f"{node.name}_massive", weight.const_value.numpy()
    readers = list(result.uses())
    others = np.ones(len(values), dtype=np.float32)
    others[channels] = 0
    rest = onnx_ir.node("Mul", [activation, new_initializer(model, f"{name}_others", others)], name=f"{name}_left_out")
    places = new_initializer(model, f"{name}_channels", channels.astype(np.int64))
    picked = onnx_ir.node("Gather", [activation, places], {"axis": -1}, name=f"{name}_picked")
    rows = new_initializer(model, f"{name}_weight", values[channels])
    product = onnx_ir.node("MatMul", [picked.outputs[0], rows], name=name)
    total = onnx_ir.node("Add", [result, product.outputs[0]], name=f"{name}_added")
    for made in (rest, picked, product, total):
        made.outputs[0].name, made.outputs[0].type = f"{made.name}_value", result.type
    rest.outputs[0].shape, product.outputs[0].shape, total.outputs[0].shape = activation.shape, result.shape, result.shape
    model.graph.insert_before(node, [rest, picked, product])
    model.graph.insert_after(node, total)
    for reader, position in readers:
        reader.replace_input_with(position, total.outputs[0])
    node.replace_input_with(0, rest.outputs[0])
    # The name still says which part of the model it is.
    node.replace_input_with(1, new_initializer(model, f"{weight.name}_others", values * others[:, None]))
    return name
