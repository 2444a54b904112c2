"""The grid of a block, scale and zero point: of some clipped ranges the one with the least error, weighted by what each input is worth."""

from __future__ import annotations

import numpy as np

from hfaccel.quant.weight_only import BlockwiseWeight

_SHRINKS = (1.0, 0.92, 0.84, 0.76)
"""Of each end of a block's range: clipping its largest weights may serve the others better."""


def clipped_to_nearest(weight: np.ndarray, importance: np.ndarray, *, bits: int, block_size: int) -> BlockwiseWeight:
    """Round a weight [in, out] to the nearest level of blocks with zero points, after a search of where to clip each block.

    Args:
        weight: of a product.
        importance: what a squared error in the weights of each input costs, [in].
        bits: 4 or 8.
        block_size: inputs that share a scale.
    """
    inputs, outputs = weight.shape
    blocks, highest = -(-inputs // block_size), 2**bits - 1
    levels = np.empty((outputs, blocks, block_size), dtype=np.uint8)
    scales, zeros = np.empty((outputs, blocks), dtype=np.float32), np.empty((outputs, blocks), dtype=np.uint8)
    for block in range(blocks):
        part = slice(block * block_size, min(inputs, (block + 1) * block_size))
        count = part.stop - part.start
        found = _clipped_block(np.asarray(weight[part], dtype=np.float32), importance[part].astype(np.float32), highest)
        levels[:, block, :count], scales[:, block], zeros[:, block] = found[0].T, found[1], found[2]
        levels[:, block, count:] = zeros[:, block, None]
    return BlockwiseWeight(levels, scales, zeros, bits)


def _clipped_block(weights: np.ndarray, importance: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels [in, out], scale [out] and zero point [out] of one block [in, out]."""
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    least = np.full(weights.shape[1], np.inf, dtype=np.float32)
    levels, scales, zeros = np.zeros_like(weights), np.ones_like(low), np.zeros_like(low)
    for lower in _SHRINKS:
        for upper in _SHRINKS:
            scale = (high * upper - low * lower) / np.float32(highest)
            scale = np.where(scale > 0, scale, np.float32(1))
            zero = np.clip(np.rint(-low * lower / scale), 0, highest)
            level = np.clip(np.rint(weights / scale) + zero, 0, highest)
            error = importance @ np.square((level - zero) * scale - weights)
            better = error < least
            np.copyto(levels, level, where=better)
            np.copyto(scales, scale, where=better)
            np.copyto(zeros, zero, where=better)
            np.copyto(least, error, where=better)
    return levels, scales, zeros
