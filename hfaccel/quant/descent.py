"""Levels and scales of a rounded weight, improved one after the other until the product changes least on the texts seen.

With the second moments H of the activation, what rounding costs is tr(D^T H D) for the difference D to the exact weight. Levels are
gone through input by input, each set to the best one while all others stay (Behdin et al., QuantEase, arXiv:2309.01885); between such
rounds all scales of an output channel are solved for at once, a small linear system each. Every step lowers the cost, none needs an
inverse of H, and what comes out is stored like any other weight in blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hfaccel.quant.gptq import compensated
from hfaccel.quant.weight_only import BlockwiseWeight

SHRINKAGE = 0.15
"""Share by which products of different channels are taken smaller: the moments of few texts overstate how channels move together."""
ROUNDS = 4
_SMALLEST_MOMENT = 1e-6
"""Of a channel, as a share of the mean: one that was never active costs next to nothing, but not nothing."""
_INPUTS_AT_ONCE = 64
_VALUES_AT_ONCE = 1 << 20
"""Of a weight, and of the linear systems for its scales; output channels do not depend on each other."""


@dataclass
class _Channels:
    """Some output channels of a weight on their way, all float32; inputs are padded to whole blocks.

    Attributes:
        exact: [in, out].
        levels: [in, out].
        scales: [blocks, out].
        zeros: [blocks, out].
    """

    exact: np.ndarray
    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def block_size(self) -> int:
        return len(self.exact) // len(self.scales)

    def centred(self) -> np.ndarray:
        """Levels above the zero point [in, out]."""
        return np.asarray(self.levels - np.repeat(self.zeros, self.block_size, axis=0))

    def rounded(self) -> np.ndarray:
        """The weight that they stand for [in, out]."""
        return np.asarray(self.centred() * np.repeat(self.scales, self.block_size, axis=0))


def descended(weight: np.ndarray, moments: np.ndarray, *, bits: int, block_size: int, rounds: int = ROUNDS) -> BlockwiseWeight:
    """Round a weight [in, out] to blocks with zero points, by descent from what :mod:`hfaccel.quant.gptq` finds.

    Args:
        weight: of a product.
        moments: of its activation [in, in].
        bits: 4 or 8.
        block_size: inputs that share a scale.
        rounds: over all levels, each but the last followed by one over the scales.
    """
    start = compensated(weight, regularized(moments, len(weight)), bits=bits, block_size=block_size)
    return improved(start, weight, moments, rounds=rounds)


def improved(start: BlockwiseWeight, weight: np.ndarray, moments: np.ndarray, *, rounds: int = ROUNDS) -> BlockwiseWeight:
    """A rounded weight whose product is no further from the exact one, by the cost that the module describes.

    Args:
        start: what to improve.
        weight: the exact one [in, out].
        moments: of the activation [in, in].
        rounds: as of :func:`descended`.
    """
    outputs, blocks, block_size = start.levels.shape
    middle = np.full((outputs, blocks), 2 ** (start.bits - 1), dtype=np.uint8)
    zeros = middle if start.zero_points is None else start.zero_points
    cost = regularized(moments, blocks * block_size)
    padded = np.zeros((blocks * block_size, outputs), dtype=np.float32)
    padded[: len(weight)] = weight
    levels, scales = start.levels.copy(), start.scales.copy()
    step = max(1, _VALUES_AT_ONCE // max(len(padded), blocks * blocks))
    for first in range(0, outputs, step):
        part = slice(first, first + step)
        channels = _Channels(
            np.ascontiguousarray(padded[:, part]),
            np.ascontiguousarray(levels[part].reshape(-1, blocks * block_size).T, dtype=np.float32),
            np.ascontiguousarray(scales[part].T, dtype=np.float32),
            np.ascontiguousarray(zeros[part].T, dtype=np.float32),
        )
        for number in range(rounds):
            if number:
                _solve_scales(channels, cost)
            _set_levels(channels, cost, 2**start.bits - 1)
        levels[part] = channels.levels.T.reshape(-1, blocks, block_size).astype(np.uint8)
        scales[part] = channels.scales.T
    return BlockwiseWeight(levels, scales, start.zero_points, start.bits)


def regularized(moments: np.ndarray, width: int) -> np.ndarray:
    """The moments [in, in] with smaller products of different channels, float32 [width, width] with channels of no cost at the end."""
    inputs, diagonal = len(moments), np.diag(moments)
    smallest = _SMALLEST_MOMENT * (float(diagonal.mean()) or 1.0)
    cost = np.zeros((width, width), dtype=np.float32)
    cost[:inputs, :inputs] = moments * (1 - SHRINKAGE)
    np.fill_diagonal(cost, smallest)
    cost[np.arange(inputs), np.arange(inputs)] = np.maximum(diagonal, smallest)
    return cost


def _set_levels(channels: _Channels, cost: np.ndarray, highest: int) -> None:
    """Set the level of each input in turn to the best one, all others given."""
    size, width = channels.block_size, len(cost)
    rounded, inverse = channels.rounded(), 1 / np.diag(cost)
    slope = cost @ (rounded - channels.exact)  # half of the derivative of the cost by each weight
    for start in range(0, width, _INPUTS_AT_ONCE):
        stop = min(width, start + _INPUTS_AT_ONCE)
        inner, own_slope = cost[start:stop, start:stop], slope[start:stop].copy()
        changes = np.empty_like(own_slope)
        for place in range(stop - start):
            row = start + place
            scale = channels.scales[row // size]
            level = np.rint((rounded[row] - own_slope[place] * inverse[row]) / scale)
            level = np.clip(level + channels.zeros[row // size], 0, highest)
            changes[place] = (level - channels.levels[row]) * scale
            channels.levels[row] = level
            own_slope[place + 1 :] += inner[place + 1 :, place, None] * changes[place]
        slope[stop:] += cost[stop:, start:stop] @ changes


def _solve_scales(channels: _Channels, cost: np.ndarray) -> None:
    """Set all scales of each output channel to the best ones for its levels."""
    blocks, size = len(channels.scales), channels.block_size
    outputs, centred = channels.exact.shape[1], channels.centred()

    def by_block(values: np.ndarray) -> np.ndarray:
        return np.asarray((centred * values).reshape(blocks, size, outputs).sum(axis=1))

    system = np.empty((outputs, blocks, blocks), dtype=np.float64)
    for block in range(blocks):
        part = slice(block * size, (block + 1) * size)
        system[:, :, block] = by_block(cost[:, part] @ centred[part]).T
    wanted = by_block(cost @ channels.exact).T.astype(np.float64)
    diagonal = np.einsum("oii->oi", system)
    # A block of nothing but zeros has no scale to find, and keeps its own.
    weakest = 1e-6 * diagonal.mean(axis=1, keepdims=True) + np.finfo(np.float32).tiny
    before = channels.scales.T.astype(np.float64)
    right = wanted + weakest * before
    diagonal += weakest
    after = np.linalg.solve(system, right[..., None])[..., 0].astype(np.float32).astype(np.float64)

    def costs(scales: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("oi,oij,oj->o", scales, system, scales, optimize=True) - 2 * (scales * right).sum(axis=1))

    better = (after > 0).all(axis=1) & (costs(after) < costs(before))
    channels.scales[:, better] = after[better].T.astype(np.float32)
