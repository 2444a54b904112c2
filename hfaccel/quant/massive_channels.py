"""Channels that are hundreds of times larger than the others, in a few tokens, stay in float.

Language models write a vector of enormous size for a text's first token, which attention then leans on (massive activations, Sun et al.,
arXiv:2402.17762). It comes out of two or three channels of one or two feed-forward blocks: in SmolLM2-135M out of two of 1,536, with values
of 2,953 and 1,056 where the median of a channel's largest value is 1.2. Rounding the weights of these channels, and to one scale with them the
others of the token, does a third of the harm of all 8-bit products together. They are computed on their own:

    x -> MatMul(W)    x -> Mul(0 at these channels) -> MatMul(W, whose rows of these channels are 0) -> Add
                      x -> Gather(these channels) --> MatMul(these rows of W) ------------------------> Add

Exact but for the order of summation. Where prompts have a graph of their own that is enough: first tokens are read there, and in single steps the
four small operators of each product would cost a tenth of the time. The moments that the other graph is rounded by
(:mod:`hfaccel.quant.gptq`) then see these channels no larger than ordinary ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.scheme import matmul_sites
from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.quant.calibration import ActivationStatistics

_MOST = 64
"""Where more channels of a product stand out, none does: that is how they are spread."""


@dataclass(frozen=True)
class MassiveChannels:
    """Of one product.

    Attributes:
        channels: int64, which of its input.
        rows: float32 [channels, out], of its weight.
        limit: largest magnitude of an ordinary channel.
    """

    channels: np.ndarray
    rows: np.ndarray
    limit: float

    def clipped(self, values: np.ndarray) -> np.ndarray:
        """Activations [tokens, in] whose massive channels are no larger than the limit."""
        copied = values.copy()
        copied[:, self.channels] = np.clip(copied[:, self.channels], -self.limit, self.limit)
        return copied


def find_massive_channels(
    model: onnx_ir.Model, statistics: Mapping[str, ActivationStatistics], ratio: float, names: Collection[str]
) -> dict[str, MassiveChannels]:
    """Of each product that has some: the channels whose largest magnitude is more than ``ratio`` times the median channel's.

    Args:
        model: float graph.
        statistics: of activations by name; those without are left alone.
        ratio: to the median of the largest magnitudes of a product's channels.
        names: of the MatMuls that may have some.
    """
    nodes = {node.name: node for node in model.graph}
    found = {}
    for site in matmul_sites(model):
        known = statistics.get(site.activation) if site.node in names else None
        if known is None:
            continue
        limit = ratio * max(float(np.median(known.channel_abs_max)), float(np.finfo(np.float32).tiny))
        channels = np.flatnonzero(known.channel_abs_max > limit)
        if 0 < len(channels) <= _MOST:
            weight = nodes[site.node].inputs[1]
            assert weight is not None and weight.const_value is not None  # of a site
            found[site.node] = MassiveChannels(channels.astype(np.int64), weight.const_value.numpy()[channels], limit)
    return found


def split_massive_channels(
    model: onnx_ir.Model, found: Mapping[str, MassiveChannels], statistics: dict[str, ActivationStatistics] | None = None
) -> tuple[str, ...]:
    """Split the channels of float products off.

    Args:
        model: float graph; changed in place.
        found: by name of the MatMul.
        statistics: of activations; where some are given, those of what is left of one are added.

    Returns:
        Names of the small MatMuls of what was split off, which must stay in float.
    """
    small = []
    for node in [node for node in model.graph if node.name in found]:
        massive, (activation, weight) = found[node.name or ""], node.inputs
        assert activation is not None and weight is not None and weight.const_value is not None  # find_massive_channels saw it
        others = weight.const_value.numpy().copy()
        others[massive.channels] = 0
        small.append(split_off(model, node, massive, len(others)))
        rest = node.inputs[0]
        if statistics is not None and activation.name in statistics and rest is not None:
            statistics[rest.name or ""] = statistics[activation.name].without_channels(massive.channels)
        # The name still says which part of the model it is.
        node.replace_input_with(1, new_initializer(model, f"{weight.name}_others", others))
    return tuple(small)


def split_off(model: onnx_ir.Model, node: onnx_ir.Node, massive: MassiveChannels, inputs: int) -> str:
    """Compute massive channels beside a product, whose weight must have zeros in their place; returns the name of the small MatMul.

    Args:
        model: changed in place.
        node: the product, of any kind whose first input is the activation.
        massive: its channels.
        inputs: how many channels the activation has.
    """
    import onnx_ir

    activation, result = node.inputs[0], node.outputs[0]
    assert activation is not None  # a product has one
    name, readers = f"{node.name}_massive", list(result.uses())
    others = np.ones(inputs, dtype=np.float32)
    others[massive.channels] = 0
    rest = onnx_ir.node("Mul", [activation, new_initializer(model, f"{name}_others", others)], name=f"{name}_left_out")
    places = new_initializer(model, f"{name}_channels", massive.channels)
    picked = onnx_ir.node("Gather", [activation, places], {"axis": -1}, name=f"{name}_picked")
    rows = new_initializer(model, f"{name}_weight", massive.rows)
    product = onnx_ir.node("MatMul", [picked.outputs[0], rows], name=name)
    total = onnx_ir.node("Add", [result, product.outputs[0]], name=f"{name}_added")
    for made in (rest, picked, product, total):
        made.outputs[0].name, made.outputs[0].type = f"{made.name}_value", activation.type
    rest.outputs[0].shape, product.outputs[0].shape, total.outputs[0].shape = activation.shape, result.shape, result.shape
    model.graph.insert_before(node, [rest, picked, product])
    model.graph.insert_after(node, total)
    for reader, position in readers:
        reader.replace_input_with(position, total.outputs[0])
    node.replace_input_with(0, rest.outputs[0])
    return name
