"""Weights with one scale per output channel, rounded by the second moments of what their MatMuls read (GPTQ, see :mod:`hfaccel.quant.gptq`).

A weight that several MatMuls read, as where layers share theirs, is rounded by the moments of all of them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.channel_weight import ChannelWeight
from hfaccel.quant.gptq import compensated_channels, first_tokens
from hfaccel.quant.moments import grouped, second_moments

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import onnx_ir

    from hfaccel.quant.calibration import Feeds
    from hfaccel.recipe.weight_format import WeightFormat

TOKENS = 4096
"""Of calibration. MiniLM's answers on other texts move by 4.3 % with half as many, by 4.2 % with these, by 4.1 % with twice as many."""

DAMPING = 0.1
"""Added to the diagonal of the moments, as a share of its mean: weights fitted closely to some texts serve others less. On random words MiniLM's
answers move by 7.5 % with a tenth as much, by 6.3 % with this, on news by 4.2 % with either."""
MOST_BYTES = 600_000_000
"""Of moments held at once: those of BERT-base fit, and its float graph is written and opened once in place of three times (15 s)."""


def compensated_weights(
    model: onnx_ir.Model, names: Collection[str], batches: Sequence[Feeds], weights: WeightFormat, *, workdir: Path
) -> dict[str, ChannelWeight]:
    """The rounded weights of the named MatMuls, by name of the weight.

    Args:
        model: a float graph; it is not changed.
        names: of its MatMuls.
        batches: calibration texts.
        weights: how they will be stored.
        workdir: where a graph may lie meanwhile.
    """
    products = [(node.inputs[0], node.inputs[1]) for node in model.graph if node.name in names]
    reads = [(read.name or "", weight) for read, weight in products if read is not None and weight is not None]
    exact = {weight.name or "": weight.const_value.numpy() for _, weight in reads if weight.const_value is not None}
    waiting = Counter(weight.name or "" for _, weight in reads)
    sums: dict[str, np.ndarray] = {}
    rounded: dict[str, ChannelWeight] = {}
    some = first_tokens(batches, TOKENS)
    for group in grouped({read: len(exact[weight.name or ""]) for read, weight in reads}, MOST_BYTES):
        moments = second_moments(model, group, some, workdir=workdir)
        for read, name in [(read, weight.name or "") for read, weight in reads if read in moments]:
            sums[name] = sums[name] + moments[read] if name in sums else moments[read]
            waiting[name] -= 1
        for name in [name for name in sums if waiting[name] == 0]:
            rounded[name] = _rounded(exact[name], sums.pop(name), weights)
    return rounded


def _rounded(weight: np.ndarray, moments: np.ndarray, weights: WeightFormat) -> ChannelWeight:
    damped = moments + np.eye(len(moments), dtype=np.float32) * (DAMPING * np.diag(moments).mean())
    made = compensated_channels(weight, damped, weights)
    levels = made.levels[:, 0].T.astype(np.int16) - 2 ** (made.bits - 1)
    return ChannelWeight(np.ascontiguousarray(levels.astype(np.int8)), np.ascontiguousarray(made.scales[:, 0]))
