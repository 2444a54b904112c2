"""Rounding learned by signed gradients: each weight's offset before it is rounded, and where each block is clipped.

After Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (arXiv:2309.05516). There the
output of a transformer block is compared, with gradients by a deep-learning framework; here that of one product, of which the second
moments H of its activation say all: half the gradient of tr(D^T H D) by the rounded weight is H D, with D its difference to the
exact one. Rounding itself passes gradients on as if it were not there. Each output channel keeps the best step it has seen.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hfaccel.quant.clipping import clipped_to_nearest
from hfaccel.quant.descent import regularized
from hfaccel.quant.weight_only import BlockwiseWeight

STEPS = 50
_MOMENTUM = 0.5
_LARGEST_OFFSET = 0.5
_LEAST_CLIP = 0.5
_VALUES_AT_ONCE = 1 << 20


def learned(weight: np.ndarray, moments: np.ndarray, *, bits: int, block_size: int, steps: int = STEPS) -> BlockwiseWeight:
    """Round a weight [in, out] to blocks with zero points.

    Args:
        weight: of a product.
        moments: of its activation [in, in].
        bits: 4 or 8.
        block_size: inputs that share a scale.
        steps: of the descent; the first one is as long as all offsets' way to the end divided by their number, the last one 0.
    """
    start = clipped_to_nearest(weight, np.diag(moments), bits=bits, block_size=block_size)
    assert start.zero_points is not None  # made so
    outputs, blocks, _ = start.levels.shape
    padded = np.zeros((blocks * block_size, outputs), dtype=np.float32)
    padded[: len(weight)] = weight
    cost = regularized(moments, len(padded))
    levels, scales, zeros = start.levels.copy(), start.scales.copy(), start.zero_points.copy()
    at_once = max(1, _VALUES_AT_ONCE // len(padded))
    for first in range(0, outputs, at_once):
        part = slice(first, first + at_once)
        exact = np.ascontiguousarray(padded[:, part]).reshape(blocks, block_size, -1)
        own = (levels[part].transpose(1, 2, 0), scales[part].T[:, None], zeros[part].T[:, None])
        grid = _Grid(*(np.ascontiguousarray(item, dtype=np.float32) for item in own))
        found = _descend(exact, cost, grid, 2**bits - 1, steps)
        levels[part], scales[part], zeros[part] = found.levels.transpose(2, 0, 1), found.scales[:, 0].T, found.zeros[:, 0].T
    return BlockwiseWeight(levels, scales, zeros, bits)


class _Grid(NamedTuple):
    """Levels [blocks, block_size, out], scales and zero points [blocks, 1, out], all float32."""

    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray


def _descend(exact: np.ndarray, cost: np.ndarray, grid: _Grid, highest: int, steps: int) -> _Grid:
    """What a weight [blocks, block_size, out] is rounded to, no worse than the given grid."""
    low, high = -grid.zeros * grid.scales, (highest - grid.zeros) * grid.scales
    offsets, average, clips = np.zeros_like(exact), np.zeros_like(exact), [np.ones_like(low), np.ones_like(low)]
    best, least = _Grid(*(item.copy() for item in grid)), np.full(exact.shape[2], np.inf)
    for step in range(steps):
        difference = ((grid.levels - grid.zeros) * grid.scales - exact).reshape(len(cost), -1)
        slope = cost @ difference
        loss = np.einsum("io,io->o", difference, slope, dtype=np.float64)
        better = loss < least
        least[better] = loss[better]
        for kept, new in zip(best, grid, strict=True):
            kept[..., better] = new[..., better]
        length = (1 - step / steps) / steps
        average = _MOMENTUM * average + (1 - _MOMENTUM) * slope.reshape(exact.shape)
        offsets = np.clip(offsets - length * np.sign(average), -_LARGEST_OFFSET, _LARGEST_OFFSET)
        # A clipped weight follows its own end of the range, any other the scale, to which both ends add.
        inner = average * (grid.levels - grid.zeros - exact / grid.scales)
        for end, (limit, edge, share) in enumerate(((low, 0, -low / highest), (high, highest, high / highest))):
            slopes = np.where(grid.levels == edge, average * limit, inner * share).sum(axis=1, keepdims=True)
            clips[end] = np.clip(clips[end] - length * np.sign(slopes), _LEAST_CLIP, 1)
        grid = _on_grid(exact, offsets, low * clips[0], high * clips[1], highest)
    return best


def _on_grid(exact: np.ndarray, offsets: np.ndarray, low: np.ndarray, high: np.ndarray, highest: int) -> _Grid:
    scales = np.maximum((high - low) / np.float32(highest), np.finfo(np.float32).tiny)
    zeros = np.clip(np.rint(-low / scales), 0, highest)
    return _Grid(np.clip(np.rint(exact / scales + offsets) + zeros, 0, highest), scales, zeros)
