"""Feature extraction: the hidden states of one text."""

from __future__ import annotations

import numpy as np


def features(last_hidden_state: np.ndarray) -> list[list[list[float]]]:
    """Nested lists [1, sequence, hidden] of ``last_hidden_state`` [sequence, hidden], as the transformers pipeline gives them."""
    nested: list[list[list[float]]] = np.asarray(last_hidden_state, np.float32)[None].tolist()
    return nested
