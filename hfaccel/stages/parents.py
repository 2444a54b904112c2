"""What candidates are made from and where their graphs lie: the float graphs by scope, and the rung of the ladder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.recipe.schema import GraphScope, Rung
    from hfaccel.stages.base import StageContext
    from hfaccel.stages.candidates import Candidate

FALLBACK_SUFFIX, MIXED_SUFFIX, OUTLIERS_SUFFIX, FLOAT_CACHE_SUFFIX = "-fallback", "-mixed", "-outliers", "-float-cache"
"""End the names of candidates that the search made of a rung: with some MatMuls in float, with some in blocks of 8 bit, where the
others have one scale per tensor or channel, or 4 bits, with channels that stand out in float, and with keys and values in float."""
_SEARCHED = (FALLBACK_SUFFIX, MIXED_SUFFIX, OUTLIERS_SUFFIX, FLOAT_CACHE_SUFFIX)

ACCURACY_REASONS = (
    "loss-over-budget",
    "cosine-under-minimum",
    "agreement-under-minimum",
    "slice-loss-over-budget",
    "batch-variant",
)
"""Why the accuracy gate refuses what a search may mend."""

FALLBACK_FOLDER = "fallback"
"""Under the accuracy stage's folder: graphs that the search made; all others lie in the quantize artifact."""


def float_graphs(ctx: StageContext) -> dict[GraphScope, Artifact]:
    """The float graphs that the stages so far have made; where a stage is switched off, that of the one before."""
    optimized = ctx.artifacts.get("optimize", ctx.artifacts["export"])
    return {"optimized": optimized, "fused": ctx.artifacts.get("fuse", optimized)}


def _rung_of(name: str, ladder: Sequence[Rung]) -> Rung | None:
    """The rung that the candidate of this name was made of; None for the float graph."""
    made_of = [name, *(name.removesuffix(suffix) for suffix in _SEARCHED)]
    return next((rung for rung in ladder if rung.name in made_of), None)


def rung_as_found(candidate: Candidate, ladder: Sequence[Rung]) -> Rung | None:
    """The rung that makes a candidate again without a search: that of the ladder with what the search found; None for the float graph."""
    rung = _rung_of(candidate.name, ladder)
    if rung is None:
        return None
    found = {
        "name": candidate.name,
        "keep_float": 0,
        "float_matmuls": tuple(name for name, _ in candidate.kept_float),
        "blockwise_matmuls": candidate.blockwise,
        "outlier_matmuls": candidate.channelwise,
        "inference_precision": candidate.session.inference_precision,
    }
    if candidate.name == rung.name + FLOAT_CACHE_SUFFIX:
        found["cache_bits"] = None
    if candidate.eight_bit:
        found |= {"eight_bit": (), "eight_bit_matmuls": tuple(name for name, _ in candidate.eight_bit)}
    return rung.model_copy(update=found)


def graph_path(candidate: Candidate, quantized: Artifact, ctx: StageContext) -> Path:
    """Where a candidate's graph lies while the accuracy stage runs."""
    made_here = Path(candidate.graph).parts[:1] == (FALLBACK_FOLDER,)
    return (ctx.workdir if made_here else quantized.folder) / candidate.graph
