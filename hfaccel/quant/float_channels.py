"""MatMuls that 8 bit are too few for, because few channels of what they read stand out: those channels stay in float, the others do not.

What one scale cannot serve is a handful of channels that are many times larger than the others (LLM.int8(), Dettmers et al.,
arXiv:2208.07339, which parts them at 6 times). Computed beside the others they cost a product as narrow as they are few, where all of the
MatMul in float costs three to four times its time in 8 bit. In a feed-forward block channels are neurons, and what makes them is computed in
float too (:mod:`hfaccel.quant.outlier_neurons`); elsewhere they are picked from the activation (:mod:`hfaccel.quant.massive_channels`).
Exact in float arithmetic, but for the order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hfaccel.quant.massive_channels import find_massive_channels, split_massive_channels
from hfaccel.quant.outlier_neurons import feed_forward_blocks, split_outlier_neurons

if TYPE_CHECKING:
    import onnx_ir

    from hfaccel.quant.calibration import ActivationStatistics

STANDS_OUT = 6.0
"""Times the largest magnitude of the median channel."""
NEURONS = 16
"""Split off a block, so that the widths of its products remain what kernels like."""


def keep_channels(
    model: onnx_ir.Model, statistics: dict[str, ActivationStatistics], names: Sequence[str], *, neurons: bool
) -> dict[str, tuple[str, ...]]:
    """Split the channels that stand out off the named MatMuls.

    Args:
        model: float graph; changed in place.
        statistics: of its activations; those of what is split are changed with it.
        names: of the MatMuls.
        neurons: whether the neurons of feed-forward blocks are still to be split; else their channels are picked as elsewhere.

    Returns:
        By name of each MatMul that has such channels: the small MatMuls of what was split off, which must stay in float.
    """
    found = find_massive_channels(model, statistics, STANDS_OUT, names)
    split = {}
    for block in feed_forward_blocks(model) if neurons else ():
        name = block.down.name or ""
        few = name in found and len(found[name].channels) <= NEURONS
        if few and (parts := split_outlier_neurons(model, statistics, NEURONS, only={name})):
            split[name] = parts
    # Once more: the first product of a block that was split has fewer outputs now.
    rest = [name for name in names if name not in split]
    found = find_massive_channels(model, statistics, STANDS_OUT, rest)
    small = split_massive_channels(model, found, statistics)
    return split | {name: (part,) for name, part in zip(found, small, strict=True)}
