"""The grid of a block, scale and zero point: of some clipped ranges the one with the least error, weighted by what each input is worth."""

from __future__ import annotations

import numpy as np

from hfaccel.quant.weight_only import BlockwiseWeight

_SHRINKS = (1.0, 0.92, 0.84, 0.76)
"""Of each end of a block's range: clipping its largest weights may serve the others better."""
_SYMMETRIC_SHRINKS = (1.15, 1.08, 1.0, 0.92, 0.86, 0.8, 0.74)
"""Of what the furthest weight would need to have the last level: above 1 it is the last but one or between two levels."""
_CLIPPING_HELPS_BELOW = 255
"""Levels: with so many the largest weight costs the others nothing."""


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
        exact = np.asarray(weight[part], dtype=np.float32)
        scale, zero = clipped_grid(exact, importance[part].astype(np.float32), highest)
        levels[:, block, :count], scales[:, block], zeros[:, block] = _nearest(exact, scale, zero, highest).T, scale, zero
        levels[:, block, count:] = zeros[:, block, None]
    return BlockwiseWeight(levels, scales, zeros, bits)


def clipped_grid(weights: np.ndarray, importance: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, float32 [out], of one block [in, out]: of some clipped ranges that with the least weighted error."""
    low, high = np.minimum(weights.min(axis=0), 0), np.maximum(weights.max(axis=0), 0)
    least = np.full(weights.shape[1], np.inf, dtype=np.float32)
    scales, zeros = np.ones_like(low), np.zeros_like(low)
    for lower in _SHRINKS:
        for upper in _SHRINKS:
            scale = (high * upper - low * lower) / np.float32(highest)
            scale = np.where(scale > 0, scale, np.float32(1))
            zero = np.clip(np.rint(-low * lower / scale), 0, highest)
            error = importance @ np.square((_nearest(weights, scale, zero, highest) - zero) * scale - weights)
            better = error < least
            for kept, new in ((scales, scale), (zeros, zero), (least, error)):
                np.copyto(kept, new, where=better)
    return scales, zeros


def symmetric_grid(weights: np.ndarray, importance: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray]:
    """The same where zero is the middle level.

    There is one level more below the middle than above. Few levels are not wasted: the weight furthest from zero gets that one, where
    need be by a scale below zero, as onnxruntime's and llama.cpp's own rounding does.
    """
    middle = (highest + 1) // 2
    zeros = np.full(weights.shape[1], middle, dtype=np.float32)
    furthest = np.take_along_axis(weights, np.abs(weights).argmax(axis=0)[None], axis=0)[0]
    furthest = np.where(np.abs(furthest) > 0, furthest, np.finfo(np.float32).tiny)
    few = highest < _CLIPPING_HELPS_BELOW
    tried = [-sign * furthest * shrink / middle for shrink in _SYMMETRIC_SHRINKS for sign in (1, -1)]
    least, scales = np.full(weights.shape[1], np.inf, dtype=np.float32), np.abs(furthest)
    for scale in tried if few else [np.abs(furthest) / (middle - 1)]:
        scale = scale.astype(np.float32)
        error = importance @ np.square((_nearest(weights, scale, zeros, highest) - zeros) * scale - weights)
        better = error < least
        least, scales = np.where(better, error, least), np.where(better, scale, scales)
    return scales, zeros


def _nearest(weights: np.ndarray, scale: np.ndarray, zero: np.ndarray, highest: int) -> np.ndarray:
    return np.asarray(np.clip(np.rint(weights / scale) + zero, 0, highest))
