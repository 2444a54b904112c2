"""Text classification: label scores of one text or pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfaccel.artifact.contract import Activation, ProblemType
from hfaccel.runtime.heads.activations import sigmoid, softmax


def label_scores(logits: np.ndarray, problem_type: ProblemType | None, activation: Activation | None = None) -> np.ndarray:
    """Scores as the transformers pipeline computes them.

    Args:
        logits: [..., labels].
        problem_type: regression gives the raw values; multi-label, and a single label, one sigmoid a label; else softmax.
        activation: comes before ``problem_type`` where it is given.

    Returns:
        Float32, same shape.
    """
    if activation == "identity" or (activation is None and problem_type == "regression"):
        return np.asarray(logits, np.float32)
    if activation == "sigmoid" or problem_type == "multi_label_classification" or logits.shape[-1] == 1:
        return sigmoid(logits)
    return softmax(logits)


def best_label(scores: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """The label with the highest score; ``scores`` [labels]."""
    best = int(scores.argmax())
    return {"label": labels[best], "score": float(scores[best])}


def top_labels(scores: np.ndarray, labels: Sequence[str], top_k: int | None) -> list[dict[str, Any]]:
    """Labels with the highest scores first; ``top_k`` None gives all. ``scores`` [labels]."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": labels[index], "score": float(scores[index])} for index in order.tolist()]
