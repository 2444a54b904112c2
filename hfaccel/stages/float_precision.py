"""In which precision an engine computes what is left in float: bfloat16 where the target has it, and where it is no slower.

Processors with matrix units for bfloat16 (AMX) compute it twice as fast as float32 and more; those that have but instructions for it may
take longer than for float32, and virtual machines often hide the units.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hfaccel.stages.race import Entrant, is_faster, settings_race

if TYPE_CHECKING:
    from pathlib import Path

    from hfaccel.recipe.schema import Rung
    from hfaccel.stages.base import StageContext


def with_faster_precision(rung: Rung, graph: Path, size_bytes: int, ctx: StageContext) -> Rung:
    """The rung with bfloat16 only where that is measured to be faster, if the ladder leaves it to hfaccel (``auto``).

    Off the target nothing is timed: there bfloat16 stays where the target has it.

    Args:
        rung: made for the target; ``inference_precision`` is bf16 if the target has it.
        graph: that the rung made.
        size_bytes: of the graph and its weights.
        ctx: of the stage.
    """
    open_to_both = any(item.name == rung.name and item.inference_precision == "auto" for item in ctx.recipe.quantize.ladder)
    if not (open_to_both and ctx.on_target and rung.inference_precision == "bf16"):
        return rung
    in_float32 = replace(rung.session(), inference_precision="f32")
    timings = settings_race(Entrant(graph, in_float32, size_bytes), rung.session(), ctx)
    return rung if is_faster(timings) else rung.model_copy(update={"inference_precision": "f32"})
