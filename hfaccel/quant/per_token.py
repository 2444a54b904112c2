"""Products of 8 bit in which every token has a scale of its own, and no channel of a token stands out.

``DynamicQuantizeMatMul`` has one scale for all tokens of a call: one token with large values rounds all others off, and an answer depends
on what else is in its batch. Here each token is divided by its largest value, put on 255 fixed levels, and the product multiplied by
that value again (row-wise scales, Dettmers et al., LLM.int8, arXiv:2208.07339): a token's result is its own.

Channels that stand out would set the scale of their token. So activations are *turned*: groups of channels are multiplied by a
Hadamard matrix, which spreads each channel over its group, and the weights by the same one beforehand. It is orthogonal and
symmetric, so the product stays what it was (QuaRot, Ashkboos et al., arXiv:2404.00456, does so with all channels at once). With groups of 64
the error on SmolLM2's feed-forward blocks is that of blocks of 64 with a scale each (1.4e-4 against 1.3e-4 of the result's power; 9.0e-4
without turning, 1.6e-4 with groups of 32), and onnxruntime computes it in half of their time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.channel_weight import ChannelWeight, ChannelWeights
from hfaccel.rewrites.drop_unused import drop_unused
from hfaccel.rewrites.graphs import DOMAIN, producer_of, shared_initializer, take_over
from hfaccel.rewrites.rotate_residual import hadamard

if TYPE_CHECKING:
    from collections.abc import Collection

    import onnx_ir

    from hfaccel.recipe.weight_format import WeightFormat

LARGEST = 127
ZERO_LEVEL = 128
LARGEST_GROUP = 64
_SMALLEST_GROUP = 16
"""Fewer channels leave an outlier nearly as large as it was."""


def turning_group(inputs: int) -> int | None:
    """How many channels are turned together: the largest power of two up to 64 that divides ``inputs``; None if it is too small."""
    group = min(LARGEST_GROUP, inputs & -inputs)
    return group if group >= _SMALLEST_GROUP else None


def turned(weight: np.ndarray, group: int) -> np.ndarray:
    """A weight [in, out] for activations whose groups of channels were turned."""
    inputs, outputs = weight.shape
    parts = weight.reshape(inputs // group, group, outputs)
    return np.asarray((_turning(group) @ parts).reshape(weight.shape), dtype=np.float32)


def store_per_token(model: onnx_ir.Model, names: Collection[str], weights: WeightFormat) -> None:
    """Compute the named MatMuls of a graph, each with a float weight, in this way, without turning anything; in place.

    A weight that several of them share is stored once.
    """
    products = PerTokenProducts(model)
    stored = ChannelWeights(model, weights)
    for node in list(model.graph):
        if node.name in names:
            products.replace(node, *stored.of(node), None)
    model.graph.opset_imports[DOMAIN] = 1
    drop_unused(model)


@dataclass(frozen=True)
class PerTokenTrips:
    """The round trips (:class:`hfaccel.quant.switches.RoundTrips`) of the scheme ``per-token``."""

    weights: WeightFormat

    def weight(self, _matmul: str, weight: np.ndarray) -> np.ndarray:
        """A weight [in, out] to integers and back, in float32."""
        return ChannelWeight.nearest(weight, self.weights).dequantized()

    def activation(self, model: onnx_ir.Model, matmul: onnx_ir.Node) -> list[onnx_ir.Node]:
        """Nodes that take an activation [..., in] to 8 bit per token and back."""
        activation, chain = matmul.inputs[0], _Chain(model, matmul.name or "")
        assert activation is not None  # a MatMul has two inputs
        scaled, largest = chain.scaled(activation, None)
        levels = chain.add("QuantizeLinear", "rounded", scaled, chain.step, chain.zero_level)
        chain.add("Mul", "back", chain.add("DequantizeLinear", "unscaled", levels, chain.step, chain.zero_level), largest)
        return chain.made


class PerTokenProducts:
    """Puts such products into a graph; tokens that several products read are rounded once.

    Args:
        model: the graph.
    """

    def __init__(self, model: onnx_ir.Model) -> None:
        self._model = model
        self._tokens: dict[tuple[str, int | None], tuple[onnx_ir.Value, onnx_ir.Value]] = {}
        # Of each result: what it is before every token is multiplied by its largest value, and those.
        self._unscaled: dict[onnx_ir.Value, tuple[onnx_ir.Value, onnx_ir.Value]] = {}

    def replace(self, node: onnx_ir.Node, weight: onnx_ir.Value, scales: onnx_ir.Value, group: int | None) -> None:
        """Compute a product with a constant in this way.

        Args:
            node: its first input is the activation [..., in]; it goes.
            weight: int8 [in, out], turned if there is a ``group``.
            scales: float32 [out].
            group: channels of the activation that are turned together; None for none.
        """
        activation = node.inputs[0]
        assert activation is not None and activation.name is not None  # of a product
        late = self._scale_later(activation)
        tokens = (activation.name, group)
        if tokens not in self._tokens:
            chain = _Chain(self._model, f"{activation.name}_turned" if group else activation.name)
            scaled, largest = chain.scaled(activation, group)
            self._tokens[tokens] = chain.add("QuantizeLinear", "rounded", scaled, chain.step, chain.zero_level), largest
            self._model.graph.insert_before(node, chain.made)
        levels, largest = self._tokens[tokens]
        chain = _Chain(self._model, node.name or "")
        factors = levels, weight, chain.step, scales, chain.zero_level
        product = chain.add("MatMulIntegerToFloat", "levels_product", *factors, domain=DOMAIN)
        if late is not None:
            largest = chain.add("Mul", "both_scales", largest, late)
        result = chain.add("Mul", "per_token", product, largest)
        self._model.graph.insert_before(node, chain.made)
        take_over(node, result)
        self._unscaled[result] = product, largest

    def _scale_later(self, activation: onnx_ir.Value) -> onnx_ir.Value | None:
        """Leave the scale of each token out of what only a product like these reads, which would divide by it; returns it, or None.

        It is that of the one side of a gated feed-forward block to which no activation function is applied. The product's own scale is
        one number a token, the side has thousands: prompts of 128 tokens take 0.98 of the time (SmolLM2).
        """
        gating = producer_of(activation, "Mul")
        if gating is None or activation.is_graph_output() or len(activation.uses()) != 1:
            return None
        for place, side in enumerate(gating.inputs):
            if side in self._unscaled and len(side.uses()) == 1 and not side.is_graph_output():
                unscaled, largest = self._unscaled[side]
                gating.replace_input_with(place, unscaled)
                return largest
        return None


class _Chain:
    """Nodes that are being made, with the constants that they share with others of the graph.

    Attributes:
        made: the nodes so far, not yet in the graph.
        step: of the fixed levels.
        zero_level: the one that stands for zero.
    """

    def __init__(self, model: onnx_ir.Model, name: str) -> None:
        self._model = model
        self._name = name
        self.made: list[onnx_ir.Node] = []
        self.step = self._shared("step", np.array(1 / LARGEST, dtype=np.float32))
        self.zero_level = self._shared("zero_level", np.array(ZERO_LEVEL, dtype=np.uint8))

    def add(self, operator: str, what: str, *operands: onnx_ir.Value, domain: str = "", **attributes: int) -> onnx_ir.Value:
        """The result of a new node."""
        import onnx_ir

        name = f"{self._name}_{what}"
        self.made.append(onnx_ir.node(operator, operands, attributes=attributes, domain=domain, name=name))
        return self.made[-1].outputs[0]

    def scaled(self, activation: onnx_ir.Value, group: int | None) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Tokens, turned in groups or not, inside -1 and 1; and the largest magnitude of each, float32 [..., 1]."""
        values = self._turned(activation, group) if group else activation
        last = self._shared("last_axis", np.array([-1], dtype=np.int64))
        smallest = self._shared("smallest", np.array(np.finfo(np.float32).tiny, dtype=np.float32))
        above = self.add("ReduceMax", "above", values, last, keepdims=1)
        below = self.add("Neg", "below", self.add("ReduceMin", "lowest", values, last, keepdims=1))
        largest = self.add("Max", "largest", above, below, smallest)
        return self.add("Div", "scaled", values, largest), largest

    def _turned(self, values: onnx_ir.Value, group: int) -> onnx_ir.Value:
        """Every group of channels times the Hadamard matrix."""
        shape, width = self.add("Shape", "shape", values), self._shared(f"groups_{group}", np.array([-1, group], dtype=np.int64))
        groups, turning = self.add("Reshape", "groups", values, width), self._shared(f"turning_{group}", _turning(group))
        return self.add("Reshape", "whole", self.add("MatMul", "spread", groups, turning), shape)

    def _shared(self, name: str, array: np.ndarray) -> onnx_ir.Value:
        return shared_initializer(self._model, f"per_token_{name}", array)


def _turning(group: int) -> np.ndarray:
    return np.asarray(hadamard(group) / np.sqrt(group), dtype=np.float32)
