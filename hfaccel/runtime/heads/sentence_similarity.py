"""Sentence similarity: vectors and their cosines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def vectors(embeddings: Sequence[np.ndarray], dimension: int) -> np.ndarray:
    """Float32 [n, dimension] of n vectors [dimension]; also when n is 0."""
    if not len(embeddings):
        return np.zeros((0, dimension), np.float32)
    return np.stack(embeddings).astype(np.float32, copy=False)


def cosines(embeddings: np.ndarray) -> np.ndarray:
    """Cosine of every pair, [n, n], of vectors [n, dimension]; 0 for a vector of zeros."""
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    unit = embeddings / np.where(lengths > 0, lengths, 1)
    result: np.ndarray = unit @ unit.T
    return result
