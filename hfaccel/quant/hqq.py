"""Half-quadratic quantization: the zero point of each block is found without any calibration texts.

After Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml, 2023): what rounding loses is measured by a
norm that forgives a few large errors, ``sum |w - w'|^0.7``, here in steps of the block's scale. An auxiliary error takes the large part of each difference (the proximal
step), and the zero point is the mean of what the levels then miss. ``MatMulNBits`` leaves its fast path where zero points are not
levels, so they are rounded at the end; then moving them alone gains nothing, and they are solved for some smaller scales of each block
too. A block keeps whatever is closest in squares, which is what a product sees: closest by the norm itself is worse than the nearest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hfaccel.quant.weight_only import BlockwiseWeight

NORM = 0.7
_ROUNDS = 4
_PENALTY, _PENALTY_GROWTH = 10.0, 1.01
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Of a block's scale: with a zero point that is a level, moving it alone gains nothing."""
_SMALLEST = 1e-8
_VALUES_AT_ONCE = 1 << 20


def half_quadratic(weight: np.ndarray, nearest: BlockwiseWeight) -> BlockwiseWeight:
    """Round a weight [in, out] to blocks whose zero points are found by half-quadratic steps.

    Args:
        weight: the exact one.
        nearest: the same rounded to the nearest, with zero points.
    """
    assert nearest.zero_points is not None  # a contradiction of the rung otherwise
    outputs, blocks, size = nearest.levels.shape
    exact = np.zeros((outputs, blocks * size), dtype=np.float32)
    exact[:, : len(weight)] = weight.T
    counts = (
        (np.arange(blocks * size) < len(weight)).reshape(blocks, size).astype(np.float32)
    )  # what pads the last block does not
    levels, scales, zero_points = nearest.levels.copy(), nearest.scales.copy(), nearest.zero_points.copy()
    step = max(1, _VALUES_AT_ONCE // exact.shape[1])
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        wanted, first = exact[part].reshape(-1, blocks, size), nearest.scales[part, :, None]
        zeros = zero_points[part, :, None].astype(np.float32)
        least = _squares((levels[part] - zeros) * first - wanted, counts)
        for shrink in _SHRINKS:
            scale = np.where(first == 0, np.float32(1), first * np.float32(shrink))
            found = np.rint(np.clip(_solved(wanted / scale, zeros, counts, nearest.bits), 0, 2**nearest.bits - 1))
            new_levels = _levels(wanted / scale, found, nearest.bits)
            loss = _squares((new_levels - found) * scale - wanted, counts)
            better = loss < least
            least[better], levels[part][better] = loss[better], new_levels[better].astype(np.uint8)
            scales[part][better], zero_points[part][better] = scale[..., 0][better], found[..., 0][better].astype(np.uint8)
    return replace(nearest, levels=levels, scales=scales, zero_points=zero_points)


def _solved(wanted: np.ndarray, zeros: np.ndarray, counts: np.ndarray, bits: int) -> np.ndarray:
    """Zero points [out, blocks, 1], not rounded, of weights [out, blocks, block_size] in steps of their scale."""
    penalty, number = _PENALTY, counts.sum(axis=-1, keepdims=True)
    for _ in range(_ROUNDS):
        levels = _levels(wanted, zeros, bits)
        difference = wanted - levels + zeros
        size = np.abs(difference)
        shrunk = np.maximum(size - np.maximum(size, _SMALLEST) ** (NORM - 1) / penalty, 0)
        zeros = ((levels - wanted + np.sign(difference) * shrunk) * counts).sum(axis=-1, keepdims=True) / number
        penalty *= _PENALTY_GROWTH
    return np.asarray(zeros)


def _levels(wanted: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(np.clip(np.rint(wanted + zeros), 0, 2**bits - 1))


def _squares(difference: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.asarray((np.square(difference) * counts).sum(axis=-1))
