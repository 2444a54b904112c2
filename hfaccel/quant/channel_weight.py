"""Weights in 8 bit with one scale per output channel, or one for all, symmetric around zero.

x86 without VNNI multiplies unsigned activations by signed weights in pairs of neighbouring inputs and adds the two products in 16 bits, which
saturate: 255 * 127 * 2 is twice what they hold. The usual remedies are weights of 7 bits, a bit less for all, or unsigned ones, whose kernel
is exact and a fifth slower. But two large weights of one sign are seldom neighbours: where a channel's scale lets the two of any pair
add up to at most 128, nothing can saturate, whatever the activations are. On MiniLM that makes steps 1.29 times as wide in the
median, where 7 bits make them twice as wide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.recipe.weight_format import WeightFormat
from hfaccel.rewrites.graphs import new_initializer

if TYPE_CHECKING:
    import onnx_ir

LARGEST_PAIR = 128
"""Two weights of one sign, neighbours in a channel: 255 * 128 is the most that 16 bits hold."""
_BEFORE_ROUNDING = LARGEST_PAIR - 0.5
"""Each of the two may be rounded up by a half."""
_EXACT = WeightFormat()


@dataclass(frozen=True)
class ChannelWeight:
    """A rounded weight.

    Attributes:
        levels: int8 [in, out].
        scales: float32 [out], or [] where one serves them all.
    """

    levels: np.ndarray
    scales: np.ndarray

    @classmethod
    def nearest(cls, weight: np.ndarray, weights: WeightFormat = _EXACT, *, per_channel: bool = True) -> ChannelWeight:
        """A float weight [in, out] rounded to the nearest levels."""
        scales = weight_scales(weight, weights, per_channel=per_channel)
        return cls(np.rint(weight / scales).astype(np.int8), scales)

    def dequantized(self) -> np.ndarray:
        """float32 [in, out]."""
        return np.asarray(self.levels.astype(np.float32) * self.scales)

    def store(self, model: onnx_ir.Model, name: str) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Constants of a graph: levels and scales."""
        return new_initializer(model, f"{name}_levels", self.levels), new_initializer(model, f"{name}_scales", self.scales)


class ChannelWeights:
    """Rounds and stores the weights of a graph's MatMuls; one that several of them share is stored once.

    Args:
        model: the graph.
        weights: how they are stored.
        per_channel: one scale per output channel of a weight, else one for all of it.
        rounded: those that are rounded already, by name; the others go to the nearest levels.
    """

    def __init__(
        self,
        model: onnx_ir.Model,
        weights: WeightFormat,
        *,
        per_channel: bool = True,
        rounded: Mapping[str, ChannelWeight] = MappingProxyType({}),
    ) -> None:
        self._model = model
        self._weights = weights
        self._per_channel = per_channel
        self._rounded = rounded
        self._stored: dict[str, tuple[onnx_ir.Value, onnx_ir.Value]] = {}

    def of(self, node: onnx_ir.Node) -> tuple[onnx_ir.Value, onnx_ir.Value]:
        """Levels int8 [in, out] and scales of a MatMul's weight."""
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None and weight.name is not None  # matmul_sites names only such
        if weight.name not in self._stored:
            made = self._rounded.get(weight.name)
            if made is None:
                made = ChannelWeight.nearest(weight.const_value.numpy(), self._weights, per_channel=self._per_channel)
            self._stored[weight.name] = made.store(self._model, weight.name)
        return self._stored[weight.name]


def weight_scales(weight: np.ndarray, weights: WeightFormat = _EXACT, *, per_channel: bool = True) -> np.ndarray:
    """The smallest scales, float32 [out] or [], with which a float weight [in, out] is rounded to levels that its format allows."""
    axis = 0 if per_channel else None
    scales = np.abs(weight).max(axis=axis) / (2 ** (weights.bits - 1) - 1)
    if weights.sums_in_16_bits:
        scales = np.maximum(scales, largest_pairs(weight).max(axis=axis) / _BEFORE_ROUNDING)
    return np.asarray(np.maximum(scales, np.finfo(np.float32).tiny), dtype=np.float32)


def largest_pairs(weight: np.ndarray) -> np.ndarray:
    """Of each two neighbours of a weight [in, out] the magnitude of their sum, [(in + 1) // 2, out]; of different signs the larger one's."""
    paired = weight if len(weight) % 2 == 0 else np.concatenate([weight, np.zeros_like(weight[:1])])
    first, second = paired[::2], paired[1::2]
    positive = np.maximum(first, 0) + np.maximum(second, 0)
    return np.asarray(np.maximum(positive, positive - first - second))
