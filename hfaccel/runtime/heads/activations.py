"""Activations that several heads share."""

from __future__ import annotations

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities along the last axis, same shape, float32."""
    values = np.asarray(logits, np.float32)
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    probabilities: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return probabilities


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Each value through the logistic function, same shape, float32; does not overflow."""
    values = np.asarray(logits, np.float32)
    small = np.exp(-np.abs(values))
    result: np.ndarray = np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    return result
