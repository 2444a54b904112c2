"""The ways to round weights in blocks that look at activations, by the name that a rung gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hfaccel.quant.auto_round import learned
from hfaccel.quant.awq import clipped, scale_by_activations, shortly_descended
from hfaccel.quant.descent import descended
from hfaccel.quant.gptq import MomentRounding, compensated

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import onnx_ir

    from hfaccel.quant.calibration import Feeds
    from hfaccel.recipe.schema import Rung

MOMENT_ROUNDINGS: Mapping[str, MomentRounding] = {
    "gptq": compensated,
    "quant-ease": descended,
    "awq": clipped,
    "awq-quant-ease": descended,
    "auto-round": learned,
}
"""Method of a rung -> how it rounds one weight; those that need no calibration texts are in :mod:`hfaccel.quant.weight_only`."""
_TRIALS: Mapping[str, MomentRounding] = {"awq": clipped, "awq-quant-ease": shortly_descended}
"""Method that scales activations first -> what scales are compared with."""


def scale_first(rung: Rung, model: onnx_ir.Model, names: Collection[str], batches: Sequence[Feeds], *, workdir: Path) -> None:
    """Scale what the named MatMuls of a float graph read, where the method of the rung says so; exact in float arithmetic.

    Args:
        rung: method, bits and block size.
        model: changed in place.
        names: of the MatMuls.
        batches: calibration texts.
        workdir: for graphs on the way.
    """
    trial = _TRIALS.get(rung.method)
    if trial is not None:
        scale_by_activations(rung, model, names, batches, workdir=workdir, trial=trial)
