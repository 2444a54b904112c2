"""Feed-forward blocks that may stay whole: where neurons with outlier activations are split off for next to nothing.

Each split costs time (in openvino half a percent to one percent of a small model's). What it saves shows when the block's second product alone
is in 8 bit: its error, of which a scale that the outliers no longer set would leave the share of the squares of the two ranges. MiniLM's last
two of six layers, of 1.6 and 2.0 times the range, move its answers by 1 % each, in the root of their squares 4.37 % in place of 4.25 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hfaccel.quant.observed import first_texts
from hfaccel.quant.outlier_neurons import feed_forward_blocks
from hfaccel.quant.sensitivity import rank_by_sensitivity
from hfaccel.quant.switches import EightBitTrips, SwitchedGraph
from hfaccel.recipe.weight_format import WeightFormat

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.quant.calibration import ActivationStatistics, Feeds
    from hfaccel.recipe.schema import Rung


FEW_BATCHES = 2
"""Calibration batches whose first texts are looked at; fewer where that took more runs than calibration."""


def blocks_to_split(
    rung: Rung, model: onnx_ir.Model, statistics: Mapping[str, ActivationStatistics], batches: Sequence[Feeds], *, scratch: Path
) -> tuple[str, ...]:
    """Names of the second MatMuls of all blocks but those that, left whole together, move the outputs by no more than the rung allows.

    Args:
        rung: says how many neurons would be split off, and how much the outputs may move, relative to them.
        model: a float graph; it is not changed.
        statistics: of its activations.
        batches: of calibration.
        scratch: where a graph may lie meanwhile.
    """
    names = [block.down.name or "" for block in feed_forward_blocks(model)]
    few = max(1, min(FEW_BATCHES, len(batches) // (1 + len(names))))
    errors = split_errors(model, statistics, rung.outlier_neurons, first_texts(batches[:few]), workdir=scratch)
    total, whole = 0.0, set[str]()
    for name in sorted(errors, key=errors.__getitem__):
        total += errors[name]
        if total > rung.whole_blocks**2:
            break
        whole.add(name)
    return tuple(name for name in names if name not in whole)


def split_errors(
    model: onnx_ir.Model, statistics: Mapping[str, ActivationStatistics], count: int, batches: Sequence[Feeds], *, workdir: Path
) -> dict[str, float]:
    """What splitting the ``count`` loudest neurons off each block saves: the part of the outputs' squares that they are moved by without.

    Args:
        model: a float graph; it is not changed.
        statistics: of its activations.
        count: neurons of a block.
        batches: a few texts.
        workdir: where a graph may lie meanwhile.

    Returns:
        By name of the block's second MatMul.
    """
    saved, ranges = {}, {}
    for block in feed_forward_blocks(model):
        value = block.down.inputs[0]
        known = statistics.get(value.name or "") if value is not None else None
        if value is None or known is None or len(known.channel_abs_max) <= count:
            continue
        largest = np.sort(known.channel_abs_max)[::-1]
        saved[block.down.name or ""] = 1 - float(largest[count] / max(largest[0], np.finfo(np.float32).tiny)) ** 2
        ranges[value.name or ""] = known.range("minmax")
    if not saved:
        return {}
    switched = SwitchedGraph(model, list(saved), EightBitTrips(ranges, WeightFormat(), per_channel=True), workdir=workdir)
    ranking = rank_by_sensitivity(switched, batches, blocks=[(name,) for name in saved])
    return {name: error * saved[name] for name, error in ranking}
