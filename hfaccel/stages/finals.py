"""The final race: all candidates that hold the accuracy gate are timed once more, together, and must keep the limits on time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.stages.candidates import FLOAT_PARENT, Candidate, PointTiming
from hfaccel.stages.choice import merit
from hfaccel.stages.parents import graph_path
from hfaccel.stages.race import Entrant, final_race, with_timings

if TYPE_CHECKING:
    from hfaccel.artifact.artifact import Artifact
    from hfaccel.stages.base import StageContext

BUSY = 1.5
"""A float graph that takes this many times what it took in the quick race runs on a busy machine."""


def race_finalists(judged: Sequence[Candidate], quantized: Artifact, ctx: StageContext) -> list[Candidate]:
    """The candidates, those that hold every gate with timings of one race; dropped are those slower than float or over a limit.

    Speed-ups of quick races were measured at different times, so they decide nothing. Off the target nothing is timed.

    Args:
        judged: all candidates, with the accuracy gate's reasons.
        quantized: of the quantize stage; its graph is the float parent.
        ctx: of the stage.
    """
    floating = next((item for item in judged if item.name == FLOAT_PARENT), None)
    limit = ctx.recipe.measure.max_p95_ms
    holding = [item for item in judged if item.reason is None and item.name != FLOAT_PARENT]
    if not ctx.on_target or floating is None or (not holding and limit is None):
        return list(judged)
    holding.sort(key=lambda item: -merit(item, ctx.recipe.measure.objective))
    entrants = {item.name: Entrant(graph_path(item, quantized, ctx), item.session, item.size_bytes) for item in holding}
    float_entrant = Entrant(quantized.graph_path, floating.session, floating.size_bytes)
    quick = {item.point: item.candidate_ms for item in floating.timings}
    raced = final_race(FLOAT_PARENT, float_entrant, entrants, ctx)
    timings = {name: tuple(_unless_busy(item, quick) for item in items) for name, items in raced.items()}
    return [_raced(item, timings.get(item.name), limit) if item.reason is None else item for item in judged]


def _unless_busy(timing: PointTiming, quick_float_ms: Mapping[str, float]) -> PointTiming:
    """The timing, not stable if the float graph took much longer than in the quick race: other work on the machine slows engines unequally."""
    calm_ms = BUSY * quick_float_ms.get(timing.point, math.inf)
    return replace(timing, stable=timing.stable and timing.parent_ms <= calm_ms)


def _raced(candidate: Candidate, timings: tuple[PointTiming, ...] | None, limit_ms: float | None) -> Candidate:
    if timings is None:
        detail = "holds all gates; others were faster in the quick race, and memory has no room for more in the final one"
        return replace(candidate, reason="not-better-than-chosen", detail=detail)
    if candidate.name == FLOAT_PARENT:
        timed = replace(candidate, timings=timings, finalist=True)
    else:
        timed = with_timings(candidate, timings, quick=False)
    over = [item for item in timings if limit_ms is not None and item.candidate_p95_ms > limit_ms]
    if timed.reason is not None or not over:
        return timed
    told = ", ".join(f"{item.point} {item.candidate_p95_ms:.3g} ms" for item in over)
    return replace(timed, reason="p95-over-limit", detail=f"95 of 100 runs took up to: {told}; limit {limit_ms:g} ms")
