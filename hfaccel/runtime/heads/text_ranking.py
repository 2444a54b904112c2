"""Text ranking: how well a document answers a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfaccel.artifact.contract import Activation
from hfaccel.errors import SettingsError
from hfaccel.runtime.heads.activations import sigmoid


def relevance(logits: np.ndarray, activation: Activation | None = None) -> float:
    """Score of one (query, document) pair: its only logit through the activation; None is the sigmoid, as cross encoders default to.

    Raises:
        SettingsError: the model gives more than one value for a pair.
    """
    if logits.shape[-1] != 1:
        raise SettingsError(
            f"ranking needs one value for a pair, this model gives {logits.shape[-1]}",
            hint="compile it with --task text-classification",
        )
    return float((logits if activation == "identity" else sigmoid(logits)).item())


def ranking(scores: Sequence[float]) -> list[dict[str, Any]]:
    """Dicts with index (position in ``scores``) and score, best first."""
    order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return [{"index": index, "score": scores[index]} for index in order]
