"""Which MatMuls move the model's answers most when only they are in 8 bit: no labels needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hfaccel.quant.calibration import Feeds
from hfaccel.quant.switches import SwitchedGraph


def rank_by_sensitivity(graph: SwitchedGraph, batches: Sequence[Feeds]) -> list[tuple[str, float]]:
    """MatMul names with the relative squared error of the outputs when only that one is in 8 bit, worst first.

    Args:
        graph: with the MatMuls to rank; it is left with none switched on.
        batches: a few padded batches of real text.
    """

    def outputs(names: Sequence[str]) -> list[np.ndarray]:
        graph.switch_on(names)
        return [array for feeds in batches for array in graph.run(feeds).values()]

    reference = outputs(())
    errors = [(name, relative_error(reference, outputs((name,)))) for name in graph.names]
    graph.switch_on(())
    return sorted(errors, key=lambda item: -item[1])


def relative_error(reference: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """Squared distance of all outputs together, relative to the squares of the reference."""
    difference = sum(float(np.square(a - b).sum()) for a, b in zip(reference, actual, strict=True))
    return difference / max(1e-30, sum(float(np.square(a).sum()) for a in reference))
