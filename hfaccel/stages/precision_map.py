"""Which precision each MatMul of the shipped graph has, by layer and role: for the report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from hfaccel.quant.layers import matmul_places
from hfaccel.rewrites.graphs import load_graph
from hfaccel.stages.candidates import Candidate, MatMulPrecision
from hfaccel.stages.export import PARAMETERS_FILE
from hfaccel.stages.parents import float_graphs, rung_of

if TYPE_CHECKING:
    from hfaccel.artifact.contract import Precision
    from hfaccel.stages.base import StageContext


def precision_map(chosen: Candidate, ctx: StageContext) -> tuple[MatMulPrecision, ...]:
    """The MatMuls of the float graph that a candidate was made from, each with its precision in the candidate."""
    digests = json.loads((ctx.artifacts["export"].folder / PARAMETERS_FILE).read_text(encoding="utf-8"))
    rest: Precision = "bf16" if chosen.session.inference_precision == "bf16" else "fp32"
    kept = {name for name, _ in chosen.kept_float}
    rung, graphs = rung_of(chosen.name, ctx.recipe.quantize.ladder), float_graphs(ctx)
    scope = rung.graph if rung is not None and rung.graph in graphs else "optimized"
    places = matmul_places(load_graph(graphs[scope].graph_path), digests)
    return tuple(
        MatMulPrecision(
            place.name, place.layer, place.role, "int8" if chosen.precision == "int8" and place.name not in kept else rest
        )
        for place in places
    )
